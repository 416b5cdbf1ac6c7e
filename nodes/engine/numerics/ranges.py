"""What measured activation ranges mean: which precisions hold them, and what to say about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..models.trace import FP16_MAX
from ..weights.components import Replica
from ..weights.precision import ROLE_PRECISIONS, Precision

OUTLIER = 6.0  # LLM.int8's threshold, https://huggingface.co/papers/2208.07339
MARGIN = 4.0  # another prompt or picture easily doubles a magnitude
MANY_OUTLIERS = 0.5  # of a block's columns: LLM.int8 then multiplies most of it a second time, in FP32
MAX_NAMED = 4  # blocks in a verdict


@dataclass(frozen=True)
class BlockRange:
    """What one block's activations reached in one forward.

    name: dotted, "transformer_blocks.57". largest: the largest magnitude of all its modules' outputs and its
    linear layers' inputs, NaN or infinity if one was. outliers: the share of its linear layers' input columns
    that reach 6, which LLM.int8 takes out of INT8. overflows: the share of its modules' output channels
    that reach 65504.
    """

    name: str
    largest: float
    outliers: float
    overflows: float

    @property
    def number(self) -> int:
        return int(self.name.rpartition(".")[2])


Ranges = Mapping[str, Sequence[BlockRange]]  # by what is compared: the steps, or the text encoder's towers


@dataclass(frozen=True)
class Verdict:
    """Whether a precision holds the ranges measured: `safe`, `at risk` or `breaks`, and why."""

    precision: str
    verdict: str
    why: str


def judge(role: str, ranges: Ranges) -> list[Verdict]:
    """A verdict for each precision of the component.

    The rules. FP16 as arithmetic breaks where a magnitude reaches its limit of 65504, and is at risk within
    a factor of 4 of it: these ranges are of one prompt, picture and seed. LLM.int8 (`int8-bnb`) is FP16
    inside, but at threshold 6 every column that reaches 6 is multiplied in FP32 and the rest stays small, so
    its range is safe; where more than half of a block's columns do, it multiplies most of the block twice
    and is at risk of being slower than FP32. All others keep FP32's or BF16's range, 3e38, from end to end
    (`int8-fast` by an FP32 scale for each token), and break only where FP32 itself does: where NaN or
    infinity was measured.
    """
    blocks = _worst(ranges)
    return [_judge(precision, blocks) for precision in ROLE_PRECISIONS[role].values()]


def report(replica: Replica, ranges: Ranges) -> str:
    """What was measured and the verdicts, as a few lines of text."""
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
    """Each block at its largest of all that was measured of it, in its order."""
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
    """For sorting: NaN above all."""
    return math.inf if math.isnan(value) else value


def _named(blocks: Sequence[BlockRange]) -> str:
    """The blocks with their ranges, the largest first, a few of them."""
    ordered = sorted(blocks, key=lambda block: _order(block.largest), reverse=True)
    named = ", ".join(f"{block.name} ({block.largest:.3g})" for block in ordered[:MAX_NAMED])
    return named + (f" and {len(blocks) - MAX_NAMED} more blocks" if len(blocks) > MAX_NAMED else "")
