"""Project what our kernels take on a Tesla P40, from their machine code for sm_61. It needs no GPU.

NVRTC 12 compiles the kernels, Triton's cuobjdump disassembles them, and a model of a multiprocessor replays
their main loops. docs/pascal.md explains the arithmetic. Nothing of it was measured on a P40.
Usage: python pascal.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from compiling import ALL, compile_for, resources
from engine.cards.card import Card
from engine.cards.speeds import Speeds
from engine.cuda.attention import KEYS, QUERIES
from engine.cuda.products import DEPTH, TILE
from engine.weights.estimates import FORWARDS, Edit, Shape, forward_seconds
from engine.weights.precision import PRECISIONS, resolve
from multiprocessor import BLOCKS, Multiprocessor
from sass import HALF_RATE, Instruction, disassemble, find_cuobjdump, issue_cycles, paths

PASCAL = "sm_61"
SHAPE, EDIT = Shape(layers=60, width=3072), Edit()
IMAGE_TOKENS, TEXT_TOKENS = EDIT.tokens - EDIT.text_tokens, EDIT.text_tokens
MULTIPROCESSORS, CLOCKS = 30, (1.531e9, 1.303e9)  # of a P40: boost and base
BANDWIDTH, REACHED = 310e9, 0.8  # a copy's bytes a second on a P40, and the share that kernels reach: assumed
READ_CYCLES = (2, 4)  # of shared memory for a read of 16 bytes: the best and the worst case
# What a P40 was thought to do before there were these kernels.
BEFORE = Speeds(fp32=10.0, fp32_attention=5.3, int8=25.0, bandwidth=310.0)

# Bytes that rows.cu reads and writes for each token and channel of a block, FP32 arithmetic, `int8-fast`.
INT8, NUMBER = 1, 4  # bytes; a sum of a product (INT32) and an activation (FP32) have the same
ROTATION = 8 / 2 / SHAPE.heads  # a complex number for each pair of a head's channels, read once for a token
BETWEEN = {
    "norm, modulate, rotate, quantise: attention's input": NUMBER + INT8,
    "queries: finish, norm, rotate": 2 * NUMBER + ROTATION,
    "keys: finish, norm, rotate": 2 * NUMBER + ROTATION,
    "values: finish": 2 * NUMBER,
    "rotate, quantise: attention's result": NUMBER + INT8,
    "finish, gate, add to the residual": 3 * NUMBER,
    "norm, modulate, rotate, quantise: the MLP's input": NUMBER + INT8,
    "finish, GELU, rotate, quantise: four times as wide": 4 * (NUMBER + INT8),
    "finish, gate, add to the residual again": 3 * NUMBER,
}
# The same for what attention.cu does before `attend`.
PACKING = {
    "measure keys and values": 2 * NUMBER,
    "pack queries": NUMBER + INT8,
    "pack keys": NUMBER + INT8,
    "pack values": NUMBER + INT8,
}
# Rows and columns of a block's matrices, and how many there are of each, in each of the two streams.
WIDTH, HIDDEN = SHAPE.width, 4 * SHAPE.width
MATRICES = {(WIDTH, WIDTH): 4, (HIDDEN, WIDTH): 1, (WIDTH, HIDDEN): 1}
# Source, kernel, warps of a block, turns of a loop inside the main one.
MAIN_LOOPS = (("attention.cu", "attend", 4, 7), ("product.cu", "multiply_int8", 8, 1))


@dataclass(frozen=True)
class Loop:
    """A kernel's main loop, once through all its paths. warps: of a block."""

    name: str
    trace: Sequence[Instruction]
    warps: int

    @cached_property
    def counts(self) -> Counter[str]:
        return Counter(instruction.operation for instruction in self.trace)

    @cached_property
    def cycles(self) -> dict[int, float]:
        """In the model, that a multiprocessor takes for one block: by READ_CYCLES."""
        return {read: Multiprocessor(self.trace, self.warps, read).cycles() for read in READ_CYCLES}

    def peak(self, read: int) -> float:
        """The share of DP4A's rate."""
        return self.counts["IDP"] * self.warps / 4 / self.cycles[read]

    def row(self) -> list[str]:
        count, total = self.counts, len(self.trace)
        known = count["IDP"], count["LDS"], count["MUFU"] + count["RRO"], count["SHFL"]
        numbers = (
            *known,
            total - sum(known),
            sum(one.stall == 0 for one in self.trace),
            sum(one.operation in HALF_RATE for one in self.trace),
            sum(one.conflicts for one in self.trace),
            issue_cycles(self.trace),
        )
        return [
            f"`{self.name}`",
            *map(str, numbers),
            f"{count['IDP'] / issue_cycles(self.trace):.0%}",
            " to ".join(f"{self.cycles[read]:.0f}" for read in READ_CYCLES),
            " to ".join(f"{self.peak(read):.0%}" for read in reversed(READ_CYCLES)),
        ]


def loops() -> list[Loop]:
    """Of `attend` (a tile of keys and values) and of `multiply_int8` (a step of DEPTH bytes)."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        raise SystemExit("Install triton: its cuobjdump reads the machine code.")
    found = []
    for source, name, warps, turns in MAIN_LOOPS:
        code = disassemble(cuobjdump, compile_for(PASCAL, source, {}).binary)[name]
        found.append(Loop(name, [one for path in paths(code, turns) for one in path], warps))
    return found


def waves(blocks: int) -> int:
    """Rounds of as many blocks as run at once."""
    return -(-blocks // (BLOCKS * MULTIPROCESSORS))


def attend_seconds(loop: Loop, read: int, clock: float) -> float:
    """Of a layer, without packing."""
    key_tiles, query_tiles = -(-EDIT.tokens // KEYS), -(-EDIT.tokens // QUERIES)
    return waves(query_tiles * SHAPE.heads) * BLOCKS * key_tiles * loop.cycles[read] / clock


def product_seconds(loop: Loop, read: int, clock: float) -> float:
    """Of a layer's products, those of both streams."""
    steps = 0
    for tokens in (IMAGE_TOKENS, TEXT_TOKENS):
        for (out, width), count in MATRICES.items():
            tiles = -(-tokens // TILE) * -(-out // TILE)
            steps += count * waves(tiles) * BLOCKS * (width // DEPTH)
    return steps * loop.cycles[read] / clock


def byte_seconds(kernels: dict[str, float]) -> float:
    """Of a layer, for bytes by token and channel."""
    return sum(kernels.values()) * EDIT.tokens * SHAPE.width / (BANDWIDTH * REACHED)


def projection_rows(attend: Loop, multiply: Loop) -> list[list[str]]:
    """A row for each clock and each case of shared memory."""
    rows = []
    for clock in CLOCKS:
        for read in READ_CYCLES:
            attention = attend_seconds(attend, read, clock) + byte_seconds(PACKING)
            products, between = product_seconds(multiply, read, clock), byte_seconds(BETWEEN)
            forward = SHAPE.layers * (attention + products + between)
            rates = [
                SHAPE.attention_flops(EDIT.tokens) / SHAPE.layers / attention / 1e12,
                SHAPE.linear_flops(EDIT.tokens) / SHAPE.layers / products / 1e12,
            ]
            rows.append([
                f"{clock / 1e9} GHz, {read} cycles",
                f"{attention * 1e3:.1f}", f"{rates[0]:.1f}",
                f"{products * 1e3:.1f}", f"{rates[1]:.1f}",
                f"{between * 1e3:.1f}",
                f"{forward:.2f}", f"{FORWARDS * forward:.1f}",
            ])  # fmt: skip
    return rows


def before() -> float:
    """Seconds of a forward of `int8-fast`, as it was projected before."""
    card = Card("gpu:0", "Tesla P40", torch.device("cpu"), native_bf16=False, memory=0)
    seconds = forward_seconds(BEFORE, SHAPE, EDIT.tokens, resolve(PRECISIONS["int8-fast"], card))
    assert seconds is not None
    return seconds


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def main() -> None:
    taken = []
    for source, macros in ALL:
        for name, found in resources(compile_for(PASCAL, source, macros).log).items():
            kind = "BF16" if "BF16" in macros else ""
            taken.append([f"`{name}`", kind, str(found.registers), str(found.shared), str(found.spilled)])
    print_table(["kernel", "", "registers", "shared bytes", "spilled"], taken)

    attend, multiply = loops()
    header = (
        "main loop, a warp", "IDP", "LDS", "MUFU, RRO", "SHFL", "others", "issued with another",
        "at half rate", "bank conflicts", "issue cycles", "IDP of them", "modelled cycles of a block",
        "of DP4A's rate",
    )  # fmt: skip
    print_table(header, [attend.row(), multiply.row()])
    for title, kernels in (("between products", BETWEEN), ("packing for attention", PACKING)):
        rows = [[name, f"{count:.2f}"] for name, count in kernels.items()]
        total = f"{sum(kernels.values()):.2f}: {byte_seconds(kernels) * 1e3:.1f} ms a layer"
        print_table([f"bytes for each token and channel, {title}", ""], [*rows, ["together", total]])
    header = (
        "clock, cycles of a read", "attention, ms a layer", "TFLOPS", "products, ms a layer", "TOPS",
        "between, ms a layer", "forward, s", "step, s",
    )  # fmt: skip
    print_table(header, projection_rows(attend, multiply))
    print(f"\nProjected before: forward {before():.1f} s, step {FORWARDS * before():.1f} s.")


if __name__ == "__main__":
    main()
