"""How much memory and time is expected, before anything is loaded."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from conftest import replica_for
from engine.cards.card import Card
from engine.files.checkpoint import Checkpoint
from engine.limits import EXACT, INT8
from engine.models import loading
from engine.planning.planner import Choice, make_plan
from engine.units import GIB
from engine.weights.estimates import (
    Edit,
    Shape,
    decode_bytes,
    forward_seconds,
    step_seconds,
    transformer_bytes,
    workspace_bytes,
)
from engine.weights.precision import PRECISIONS, resolve
from machines import H100, MACHINES, P40, gpu, machine_of
from test_precision import run_transformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

P40_CARD = Card("gpu:0", "Tesla P40", torch.device("cpu"), native_bf16=False, memory=24 * GIB)
BF16_CARD = Card("gpu:0", "H100", torch.device("cpu"), native_bf16=True, memory=80 * GIB)


@pytest.mark.parametrize(
    ("role", "precision", "math", "peak_gib"),
    [
        ("transformer", "fp32", "fp32", 26.45),
        ("transformer", "int8", "fp32", 13.80),
        ("transformer", "int8-fast", "fp32", 13.83),
        ("transformer", "bf16", "bf16", 25.92),
        ("transformer", "int8", "bf16", 13.27),
        ("transformer", "int8-fast", "bf16", 13.48),
        ("text_encoder", "int8", "fp32", 9.3),
        ("text_encoder", "bf16", "bf16", 14.6),
        ("vae", "fp32", "fp32", 2.54),
        ("vae", "bf16", "bf16", 1.46),
    ],
)
def test_peaks_of_memory_are_the_measured_ones(
    real_size: Checkpoint, role: str, precision: str, math: str, peak_gib: float
) -> None:
    machine = MACHINES["one 80 GB card"]
    there = make_plan(machine, real_size, choices={role: Choice(precision=precision, math=math)}).placement(
        role
    )
    assert (there.weights + there.workspace) / GIB == pytest.approx(
        peak_gib, rel=0.01 if role == "transformer" else 0.04
    )


@pytest.mark.parametrize(
    ("name", "card", "measured"),
    [
        ("fp32", P40_CARD, {5370: 0.652, 8442: 1.040, 13562: 1.685, 16634: 2.073}),
        ("int8", P40_CARD, {8442: 1.039, 13562: 1.685, 16634: 2.073}),
        ("int8-fast", P40_CARD, {5370: 0.667, 8442: 1.064, 13562: 1.724, 16634: 2.121}),
        ("bf16", BF16_CARD, {5370: 0.327, 8442: 0.521, 13562: 0.846, 16634: 1.037}),
        ("int8-fast", BF16_CARD, {8442: 0.74}),
        ("nf4", P40_CARD, {8442: 1.04}),
    ],
)
def test_the_transformers_workspace_is_the_measured_one(
    real_size: Checkpoint, name: str, card: Card, measured: dict[int, float]
) -> None:
    precision = resolve(PRECISIONS[name], card)
    for tokens, gib in measured.items():
        assert transformer_bytes(real_size, precision, tokens) / GIB == pytest.approx(gib, rel=0.03)


def test_what_a_lora_adds_to_unfinished_products_is_counted(real_size: Checkpoint) -> None:
    """1.55 GiB at 8442 tokens in FP32 arithmetic, measured on an H200 with our kernels. 0.71 without it."""
    fast, int8 = (resolve(PRECISIONS[name], P40_CARD) for name in ("int8-fast", "int8"))
    assert transformer_bytes(real_size, fast, 8442, adapted=True) / GIB == pytest.approx(1.552, rel=0.03)
    assert transformer_bytes(real_size, int8, 8442, adapted=True) == transformer_bytes(real_size, int8, 8442)


def test_scores_that_no_kernel_avoids_are_counted(real_size: Checkpoint) -> None:
    """13.5 GiB at 8442 tokens beside what a fused kernel takes; torch computes 16-bit scores in FP32."""
    fp32 = resolve(PRECISIONS["fp32"], P40_CARD)
    for precision in (fp32, resolve(PRECISIONS["bf16"], BF16_CARD)):
        fused, unfused = (transformer_bytes(real_size, precision, 8442, fused=way) for way in (True, False))
        assert (unfused - fused) / GIB == pytest.approx(13.5, rel=0.01)
    needs = functools.partial(workspace_bytes, checkpoint=real_size, precision=fp32)
    large = Edit(2048, 2048, references=10)
    for role, factor in (("text_encoder", 1.2), ("vae", 3)):
        assert needs(role, edit=large, fused=False) > factor * needs(role, edit=large)
    side = 256  # attention over the whole picture comes before any tile
    tiled = decode_bytes(real_size, torch.float32, side, side, 40, fused=False)
    assert tiled == decode_bytes(real_size, torch.float32, side, side, side, fused=False) > 32 * GIB


def test_a_plan_counts_scores_and_says_so(real_size: Checkpoint) -> None:
    device = gpu(0, "RX 6800", 23.9, False)
    assert make_plan(machine_of(device), real_size).placement("transformer").precision.name == "int8"
    unfused = frozenset({("transformer", torch.float32)})
    device = replace(device, card=replace(device.card, unfused=unfused))
    there = make_plan(machine_of(device), real_size).placement("transformer")
    assert there.precision.name == "nf4" and there.workspace / GIB == pytest.approx(14.5, rel=0.01)
    assert "attention has no fused kernel there and holds its scores" in there.description


@pytest.mark.parametrize(
    ("math", "measured"),
    [
        (torch.float32, {64: 0.568, 128: 2.273, 192: 5.115, 256: 9.094}),
        (torch.bfloat16, {64: 0.332, 128: 1.328, 192: 2.988, 256: 5.312}),
    ],
)
def test_decoding_takes_what_was_measured(
    real_size: Checkpoint, math: torch.dtype, measured: dict[int, float]
) -> None:
    for side, gib in measured.items():
        assert decode_bytes(real_size, math, side, side, side) / GIB == pytest.approx(gib, rel=0.03)


@pytest.mark.parametrize(
    ("precision", "math", "measured", "off"),
    [
        ("fp32", "fp32", 6.96, 0.03),
        ("int8", "fp32", 7.13, 0.01),
        ("int8-fast", "fp32", 3.05, 0.02),
        ("bf16", "bf16", 0.678, 0.10),
        ("int8", "bf16", 0.796, -0.06),
        ("int8-fast", "bf16", 0.825, -0.12),
    ],
)
def test_a_step_is_estimated_within_what_the_documents_say(
    real_size: Checkpoint, precision: str, math: str, measured: float, off: float
) -> None:
    row = resolve(PRECISIONS[precision], BF16_CARD, math)
    seconds = step_seconds(H100, Shape.of(real_size), Edit(), row)
    assert seconds / measured - 1 == pytest.approx(off, abs=0.01)


@pytest.mark.parametrize(
    ("precision", "math", "attention", "measured", "off"),
    [
        ("fp32", "fp32", EXACT, 6.95, -0.02),
        ("int8", "fp32", EXACT, 6.96, -0.02),
        ("int8-fast", "fp32", EXACT, 2.75, -0.01),
        ("int8-fast", "fp32", INT8, 1.40, 0.02),
        ("bf16", "bf16", EXACT, 0.615, -0.06),
        ("int8-fast", "bf16", EXACT, 0.63, -0.11),
    ],
)
def test_a_step_with_our_kernels_is_estimated_as_well(
    real_size: Checkpoint, precision: str, math: str, attention: str, measured: float, off: float
) -> None:
    row = resolve(PRECISIONS[precision], BF16_CARD, math)
    speeds = replace(H100, row_kernels=True, int8_attention=103.0)
    seconds = step_seconds(speeds, Shape.of(real_size), Edit(), row, attention)
    assert seconds == pytest.approx(measured * (1 + off), rel=0.01)
    assert step_seconds(replace(speeds, int8_attention=None), Shape.of(real_size), Edit(), row, INT8) is None


def test_no_time_is_told_where_a_speed_that_it_needs_is_unknown(real_size: Checkpoint) -> None:
    row = resolve(PRECISIONS["bf16"], BF16_CARD)
    for speeds in (None, P40, replace(H100, bandwidth=None), replace(H100, bf16_attention=None)):
        assert forward_seconds(speeds, Shape.of(real_size), 8442, row) is None
        assert step_seconds(speeds, Shape.of(real_size), Edit(), row) is None


def test_the_flops_of_the_blocks_are_those_that_torch_counts(tiny: Checkpoint) -> None:
    transformer, tokens = loading.load(replica_for(tiny, "transformer")), 40 + 20
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run_transformer(transformer)
    counts = counter.get_flop_counts()
    blocks = sum(sum(ops.values()) for name, ops in counts.items() if name.endswith(("blocks.0", "blocks.1")))
    shape = Shape.of(tiny)
    assert blocks == shape.linear_flops(tokens) + shape.attention_flops(tokens)


def test_the_measured_edit_has_the_measured_tokens(real_size: Checkpoint) -> None:
    assert Edit().tokens == 8442
    assert Edit(512, 768, references=0).tokens == 32 * 48 + 54
    assert Edit(references=3, reference_megapixels=0.5).tokens == 4096 + 3 * (2048 + 196) + 54
    shape = Shape.of(real_size)
    assert shape.linear_flops(8492) == pytest.approx(115.4e12, rel=1e-3)
    assert shape.attention_flops(8492) == pytest.approx(53.2e12, rel=1e-3)


def test_workspace_grows_with_tokens_and_pixels(real_size: Checkpoint) -> None:
    fp32 = resolve(PRECISIONS["fp32"], P40_CARD)

    def gib(role: str, edit: Edit, **options: bool) -> float:
        return workspace_bytes(role, real_size, fp32, edit, **options) / GIB

    assert gib("transformer", Edit(references=3)) / gib("transformer", Edit()) == pytest.approx(17026 / 8442)
    assert gib("vae", Edit(2048, 2048)) == pytest.approx(4 * gib("vae", Edit()))
    assert gib("vae", Edit(2048, 2048, references=0), tiled=True) < 0.04 * gib("vae", Edit(2048, 2048))
    assert gib("text_encoder", Edit()) < gib("text_encoder", Edit(references=10)) < 1.6
