"""A model of a P40's multiprocessor: how many cycles two blocks take for a loop, from its machine code.

Four schedulers each issue an instruction of one warp in a cycle, or two where the code allows it. Arithmetic
takes a cycle of its scheduler's units, instructions at half rate two, special functions four. Shared memory
is one unit for all. Caches of instructions and the load on global memory are not in the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from sass import NO_BARRIER, Instruction

SCHEDULERS, BLOCKS = 4, 2
SPECIAL = {"MUFU", "RRO", "I2F", "F2I"}
SPECIAL_CYCLES, SPECIAL_DELAY = 4, 14
SHARED = {"LDS", "STS", "SHFL", "LDG", "STG"}
QUEUE = 80  # cycles of work that shared memory takes in advance
SHARED_DELAY, GLOBAL_DELAY, ARITHMETIC_DELAY, READ_DELAY = 24, 300, 6, 10
SYNC_CYCLES = 20
WARM_UP, WINDOW = 2, 6  # times the trace's length in cycles, that pass before and while it is watched


@dataclass
class Warp:
    block: int
    issued: int = 0  # instructions
    ready: int = 0  # when the next instruction may be issued
    waits_for_block: bool = False
    pending: list[list[int]] = field(default_factory=lambda: [[] for _ in range(6)])


class Multiprocessor:
    """trace: what each warp goes through, again and again. warps: of a block. read_cycles: that a read of 16
    bytes by each thread keeps shared memory busy, 2 where threads read the same and 4 at most.
    """

    def __init__(self, trace: Sequence[Instruction], warps: int, read_cycles: int):
        self.trace, self.read_cycles, self.now = trace, read_cycles, 0
        self.warps = [Warp(block) for block in range(BLOCKS) for _ in range(warps)]
        for warp in self.warps:
            warp.ready = warp.block * len(trace) // 2  # blocks do not run in step
        self.arithmetic, self.special = [0] * SCHEDULERS, [0] * SCHEDULERS  # when the units are free again
        self.shared = 0
        self.operations = [instruction.operation for instruction in trace]
        self.last: list[Warp | None] = [None] * SCHEDULERS

    def cycles(self) -> float:
        """That all warps of one block take for the trace, on average while two blocks run."""
        self._run(WARM_UP * len(self.trace))
        before = self.issued
        self._run(WINDOW * len(self.trace))
        passes = (self.issued - before) / len(self.trace) / (len(self.warps) / BLOCKS)
        return WINDOW * len(self.trace) / passes

    @property
    def issued(self) -> int:
        return sum(warp.issued for warp in self.warps)

    def _run(self, cycles: int) -> None:
        for _ in range(cycles):
            for scheduler in range(SCHEDULERS):
                self._step(scheduler)
            self.now += 1

    def _step(self, scheduler: int) -> None:
        """Issue an instruction of the warp that was last, else of the one that is behind most."""
        own = self.warps[scheduler::SCHEDULERS]
        for warp in sorted(own, key=lambda warp: (warp is not self.last[scheduler], warp.issued)):
            if warp.waits_for_block or warp.ready > self.now or not self._can_issue(warp, scheduler):
                continue
            self.last[scheduler] = warp
            if self._issue(warp, scheduler) == 0 and self._can_issue(warp, scheduler):
                self._issue(warp, scheduler)
            return

    def _next(self, warp: Warp) -> tuple[Instruction, str]:
        place = warp.issued % len(self.trace)
        return self.trace[place], self.operations[place]

    def _can_issue(self, warp: Warp, scheduler: int) -> bool:
        instruction, operation = self._next(warp)
        for barrier in instruction.waits:
            if any(end > self.now for end in warp.pending[barrier]):
                return False
        if operation == "DEPBAR" and (found := re.search(r"SB(\d), 0x([0-9a-f]+)", instruction.text)):
            unfinished = sum(end > self.now for end in warp.pending[int(found[1])])
            return unfinished <= int(found[2], 16)
        if operation in SPECIAL:
            return self.special[scheduler] <= self.now
        if operation in SHARED:
            return self.shared <= self.now + QUEUE
        return operation == "BAR" or self.arithmetic[scheduler] <= self.now

    def _issue(self, warp: Warp, scheduler: int) -> int:
        """Issue the warp's next instruction, and give its stall."""
        instruction, operation = self._next(warp)
        read = self.now + 4
        if operation in SPECIAL:
            self.special[scheduler] = self.now + SPECIAL_CYCLES
            written = self.now + SPECIAL_CYCLES + SPECIAL_DELAY
        elif operation in SHARED:
            self.shared = max(self.shared, self.now) + self._shared_cycles(instruction)
            written = self.shared + (GLOBAL_DELAY if operation == "LDG" else SHARED_DELAY)
            read = self.shared + READ_DELAY
        elif operation == "BAR":
            written = self.now
        else:
            self.arithmetic[scheduler] = self.now + instruction.issue_cycles
            written = self.now + ARITHMETIC_DELAY
        for barrier, end in ((instruction.written, written), (instruction.read, read)):
            if barrier != NO_BARRIER:
                warp.pending[barrier] = [one for one in warp.pending[barrier] if one > self.now] + [end]
        warp.ready = self.now + max(1, instruction.stall)
        warp.issued += 1
        if operation == "BAR":
            self._synchronize(warp)
        return instruction.stall

    def _shared_cycles(self, instruction: Instruction) -> int:
        if instruction.operation == "LDS":
            return self.read_cycles if instruction.name.endswith("128") else 1
        if instruction.operation == "STS":
            return 8 if instruction.name.endswith("128") else 1
        return 1 if instruction.operation == "SHFL" else 4

    def _synchronize(self, warp: Warp) -> None:
        """The warp waits for those of its block that have not come."""
        warp.waits_for_block = True
        block = [other for other in self.warps if other.block == warp.block]
        if all(other.waits_for_block for other in block):
            for other in block:
                other.waits_for_block, other.ready = False, self.now + SYNC_CYCLES
