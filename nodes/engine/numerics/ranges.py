"""Judge which precisions hold the measured activation ranges, and report it as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..models.trace import FP16_MAX
from ..weights.components import Replica
from ..weights.precision import ROLE_PRECISIONS, Precision

OUTLIER = 6.0  # LLM.int8's threshold, https://huggingface.co/papers/2208.07339
MARGIN = 4.0  # another prompt or picture can double a magnitude
MANY_OUTLIERS = 0.5  # of a block's columns; above it, LLM.int8 multiplies most of the block twice
MAX_NAMED = 4  # blocks that a verdict names


@dataclass(frozen=True)
class BlockRange:
    """The ranges of one block's activations in one forward.

    name: dotted, such as "transformer_blocks.57". largest: the largest magnitude of its modules' outputs and
    its linear layers' inputs; NaN or infinity if there was one. outliers: the share of its linear layers'
    input columns that reach 6, which LLM.int8 does not multiply in INT8. overflows: the share of its modules'
    output channels that reach 65504.
    """

    name: str
    largest: float
    outliers: float
    overflows: float

    @property
    def number(self) -> int:
        return int(self.name.rpartition(".")[2])


Ranges = Mapping[str, Sequence[BlockRange]]  # by step, or by tower of the text encoder


@dataclass(frozen=True)
class Verdict:
    """Whether a precision holds the ranges measured: `safe`, `at risk` or `breaks`, and why."""

    precision: str
    verdict: str
    why: str


def judge(role: str, ranges: Ranges) -> list[Verdict]:
    """A verdict for each precision of the component.

    FP16 arithmetic breaks where a magnitude reaches 65504. It is at risk within a factor of 4 of that limit,
    because the ranges are of one prompt, picture and seed. LLM.int8 (`int8-bnb`) computes in FP16, but it
    multiplies columns that reach 6 in FP32, and the other columns are small: its range is safe. It is at risk
    of being slower than FP32 where more than half of a block's columns reach 6, because it multiplies these
    twice. All other precisions keep the range of FP32 or BF16, 3e38 (`int8-fast` by an FP32 scale for each
    token). They break only where NaN or infinity was measured, as FP32 does.
    """
    blocks = _worst(ranges)
    return [_judge(precision, blocks) for precision in ROLE_PRECISIONS[role].values()]


def report(replica: Replica, ranges: Ranges) -> str:
    """The measured ranges and the verdicts as a few lines of text."""
    lines = [f"Measured on the {replica}:"]
    for label, blocks in ranges.items():
        block = max(blocks, key=lambda block: _order(block.largest))
        columns = max(blocks, key=lambda block: block.outliers)
        channels = max(blocks, key=lambda block: block.overflows)
        lines.append(
            f"{label}: largest {block.largest:.4g} in {block.name}; "
            f"{columns.outliers:.1%} of columns reach {OUTLIER:.0f} in {columns.name}; "
            f"{channels.overflows:.1%} of channels reach {FP16_MAX:.0f} in {channels.name}"
        )
    lines += [f"{row.precision}: {row.verdict} ({row.why})" for row in judge(replica.spec.role, ranges)]
    return "\n".join(lines)


def _judge(precision: Precision, blocks: Sequence[BlockRange]) -> Verdict:
    broken = [block for block in blocks if not math.isfinite(block.largest)]
    if precision.compute is torch.float16:
        return _judge_fp16(precision.name, blocks)
    if broken:
        return Verdict(precision.name, "breaks", f"NaN or infinity was measured in {_named(broken)}")
    if precision.fp16_inside:
        return _judge_outliers(precision.name, blocks)
    if precision.storage is torch.float16:
        arithmetic = _judge_fp16(precision.name, blocks)
        why = f"as storage only; as FP16 arithmetic: {arithmetic.verdict}, {arithmetic.why}"
        return Verdict(precision.name, "safe", why)
    return Verdict(precision.name, "safe", "its limit is 3e38 from end to end")


def _judge_fp16(name: str, blocks: Sequence[BlockRange]) -> Verdict:
    over = [block for block in blocks if not block.largest < FP16_MAX]
    near = [block for block in blocks if not block.largest * MARGIN < FP16_MAX]
    if over:
        return Verdict(name, "breaks", f"passes {FP16_MAX:.0f} in {_named(over)}")
    if near:
        why = f"within a factor of {MARGIN:.0f} of {FP16_MAX:.0f} in {_named(near)}"
        return Verdict(name, "at risk", why)
    return Verdict(name, "safe", f"a factor of {MARGIN:.0f} or more below {FP16_MAX:.0f}, with this input")


def _judge_outliers(name: str, blocks: Sequence[BlockRange]) -> Verdict:
    many = [block for block in blocks if block.outliers > MANY_OUTLIERS]
    if many:
        why = f"slow: over {MANY_OUTLIERS:.0%} of columns reach {OUTLIER:.0f} in {_named(many)}"
        return Verdict(name, "at risk", why)
    return Verdict(name, "safe", f"columns that reach {OUTLIER:.0f} are computed in FP32")


def _worst(ranges: Ranges) -> list[BlockRange]:
    """Each block with the largest of all its measurements, in the order of the blocks."""
    worst: dict[str, BlockRange] = {}
    for block in (block for blocks in ranges.values() for block in blocks):
        seen = worst.setdefault(block.name, block)
        worst[block.name] = BlockRange(
            block.name,
            max(seen.largest, block.largest, key=_order),
            max(seen.outliers, block.outliers),
            max(seen.overflows, block.overflows),
        )
    return list(worst.values())


def _order(value: float) -> float:
    """A sort key that puts NaN last."""
    return math.inf if math.isnan(value) else value


def _named(blocks: Sequence[BlockRange]) -> str:
    """The names and ranges of up to MAX_NAMED blocks, the largest first."""
    ordered = sorted(blocks, key=lambda block: _order(block.largest), reverse=True)
    named = ", ".join(f"{block.name} ({block.largest:.3g})" for block in ordered[:MAX_NAMED])
    return named + (f" and {len(blocks) - MAX_NAMED} more blocks" if len(blocks) > MAX_NAMED else "")
