"""Machine code of Pascal's cards, as cuobjdump prints it: instructions, their cost, the paths of a loop.

Every three instructions follow a word. It says for each how many cycles to wait after it, which of six
barriers it waits for, and which it ends (https://github.com/NervanaSystems/maxas/wiki/Control-Codes).
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NO_BARRIER = 7
WORD = 8  # bytes
BANKS = 4  # of the registers: reading two of one bank takes a cycle more
ARITHMETIC = {"IDP", "FFMA", "FADD", "FMUL", "XMAD", "IADD", "IADD3", "LOP3"}
HALF_RATE = {
    *("FMNMX", "IMNMX", "SHL", "SHR", "SHF", "ISETP", "FSETP", "ISCADD", "LEA", "BFE", "BFI", "ICMP", "ISET"),
    *("FSET", "PSETP"),
}


@dataclass(frozen=True)
class Instruction:
    """stall: cycles until the warp's next one; 0 where both may be issued at once. written, read: the barrier
    that ends when its result is written, or its registers are read. waits: for these barriers. conflicts:
    cycles more, as its registers share banks.
    """

    address: int
    text: str
    stall: int
    written: int
    read: int
    waits: tuple[int, ...]
    conflicts: int = 0

    @property
    def name(self) -> str:
        """Such as LDS.U.128."""
        return re.sub(r"^@!?P\d\s+", "", self.text).split()[0]

    @property
    def operation(self) -> str:
        """Such as LDS."""
        return self.name.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"BRA .*?0x([0-9a-f]+)", self.text)
        if found is None:
            return None
        address = int(found[1], 16)
        return address + WORD if address % (4 * WORD) == 0 else address  # after the word for three

    @property
    def issue_cycles(self) -> int:
        """Of a scheduler, if it is not issued together with another."""
        return 1 + (self.operation in HALF_RATE) + self.conflicts


def find_cuobjdump() -> Path | None:
    """Triton's, if it is installed."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def disassemble(cuobjdump: Path, binary: bytes) -> dict[str, list[Instruction]]:
    """Each kernel's instructions."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.cubin")
        path.write_bytes(binary)
        command = [cuobjdump, "-sass", path]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    bodies = re.split(r"Function : (\w+)", text)[1:]
    return {name: _instructions(body) for name, body in zip(bodies[::2], bodies[1::2], strict=True)}


def _instructions(body: str) -> list[Instruction]:
    found: list[Instruction] = []
    controls: list[int] = []
    kept: dict[int, int] = {}  # registers that the last instruction left in the operands' places
    for line in body.splitlines():
        if control := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/", line):
            controls = [int(control[1], 16) >> 21 * number & 0x1FFFFF for number in range(3)]
        elif match := re.match(r"\s*/\*([0-9a-f]{4,5})\*/\s+(.*?)/\*", line):
            text, control = re.sub(r"[{};]", "", match[2]).strip(), controls.pop(0)
            waits = tuple(number for number in range(6) if control >> 11 + number & 1)
            conflicts, kept = _conflicts(text, kept)
            numbers = control & 15, control >> 5 & 7, control >> 8 & 7
            found.append(Instruction(int(match[1], 16), text, *numbers, waits, conflicts))
    return found


def _conflicts(text: str, kept: dict[int, int]) -> tuple[int, dict[int, int]]:
    """Cycles lost to banks, and what stays in the operands' places for the next instruction."""
    name, _, operands = re.sub(r"^@!?P\d\s+", "", text).partition(" ")
    if name.partition(".")[0] not in ARITHMETIC:
        return 0, {}
    read, keeps = set(), {}
    for place, operand in enumerate(operands.split(",")[1:]):
        if register := re.match(r"\s*-?\|?R(\d+)(\.reuse)?", operand):
            number = int(register[1])
            if kept.get(place) != number:
                read.add(number)
            if register[2]:
                keeps[place] = number
    banks = [number % BANKS for number in read]
    return max((banks.count(bank) for bank in banks), default=1) - 1, keeps


def main_loop(instructions: Sequence[Instruction]) -> tuple[int, int]:
    """The first and last index of the longest loop."""
    indices = {instruction.address: index for index, instruction in enumerate(instructions)}
    loops = [
        (indices[instruction.target], index)
        for index, instruction in enumerate(instructions)
        if instruction.target is not None and instruction.target < instruction.address
    ]
    return max(loops, key=lambda loop: loop[1] - loop[0])


def paths(instructions: Sequence[Instruction], inner_turns: int) -> list[list[Instruction]]:
    """All ways through the main loop once. A loop inside it is gone through `inner_turns` times."""
    indices = {instruction.address: index for index, instruction in enumerate(instructions)}
    first, last = main_loop(instructions)
    found = []
    open_paths: list[tuple[int, list[Instruction], int]] = [(first, [], 1)]
    while open_paths:
        index, path, turn = open_paths.pop()
        while index != last:
            instruction = instructions[index]
            path.append(instruction)
            index += 1
            if instruction.target is None:
                continue
            if instruction.target < instruction.address:
                turn = turn + 1 if turn < inner_turns else 0
                index = indices[instruction.target] if turn else index
                continue
            if instruction.text.startswith("@"):
                open_paths.append((index, list(path), turn))
            index = indices[instruction.target]
        found.append([*path, instructions[last]])
    return found


def issue_cycles(trace: Sequence[Instruction]) -> int:
    """That a scheduler takes to issue them, if nothing is waited for."""
    return sum(one.issue_cycles - (one.stall == 0) for one in trace)
