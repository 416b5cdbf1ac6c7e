"""What fits where, and how long it takes, on machines that are not here."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import replica_for
from engine.cards.card import Card
from engine.drawing import WIDTH
from engine.errors import CheckpointError, InputError
from engine.files.checkpoint import Checkpoint, open_checkpoint
from engine.models import loading
from engine.planning.machine import unusable
from engine.planning.memory_map import COLOURS, draw_memory_map
from engine.planning.plan import Plan
from engine.planning.planner import ROLES, Choice, make_plan
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
from engine.weights.formats import Nf4Linear
from engine.weights.precision import PRECISIONS, ROLE_PRECISIONS, Precision, resolve
from machines import H100, MACHINES, P40, gpu, machine_of, p40s
from PIL import ImageColor
from test_precision import run_transformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

P40_CARD = Card("gpu:0", "Tesla P40", torch.device("cpu"), native_bf16=False, memory=24 * GIB)
BF16_CARD = Card("gpu:0", "H100", torch.device("cpu"), native_bf16=True, memory=80 * GIB)


# Estimates


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
    seconds = step_seconds([H100], Shape.of(real_size), Edit(), row)
    assert seconds / measured - 1 == pytest.approx(off, abs=0.01)


def test_no_time_is_told_where_a_speed_that_it_needs_is_unknown(real_size: Checkpoint) -> None:
    row = resolve(PRECISIONS["bf16"], BF16_CARD)
    for speeds in (None, P40, replace(H100, bandwidth=None), replace(H100, bf16_attention=None)):
        assert forward_seconds(speeds, Shape.of(real_size), 8442, row) is None
        assert step_seconds([H100, speeds], Shape.of(real_size), Edit(), row) is None


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


def test_guidance_over_two_cards_takes_the_slower_ones_forward(real_size: Checkpoint) -> None:
    shape, row = Shape.of(real_size), resolve(PRECISIONS["int8"], BF16_CARD, "fp32")
    alone = step_seconds([P40], shape, Edit(), row)
    slow = replace(P40, fp32=P40.fp32 / 2)
    assert step_seconds([P40, P40], shape, Edit(), row) == pytest.approx(alone / 2)
    both = step_seconds([P40, slow], shape, Edit(), row)
    assert both == pytest.approx(forward_seconds(slow, shape, 8442, row)) and both < alone


def test_workspace_grows_with_tokens_and_pixels(real_size: Checkpoint) -> None:
    fp32 = resolve(PRECISIONS["fp32"], P40_CARD)

    def gib(role: str, edit: Edit, **options: bool) -> float:
        return workspace_bytes(role, real_size, fp32, edit, **options) / GIB

    assert gib("transformer", Edit(references=3)) / gib("transformer", Edit()) == pytest.approx(17026 / 8442)
    assert gib("vae", Edit(2048, 2048)) == pytest.approx(4 * gib("vae", Edit()))
    assert gib("vae", Edit(2048, 2048, references=0), tiled=True) < 0.04 * gib("vae", Edit(2048, 2048))
    assert gib("text_encoder", Edit()) < gib("text_encoder", Edit(references=10)) < 1.6


# Plans


@pytest.mark.parametrize(
    ("machine", "expected", "turns"),
    [
        ("four P40", ["int8 gpu:0", "fp32 gpu:1", "fp32 gpu:2"], 0),
        ("two unequal cards", ["int8 gpu:1", "int8 gpu:0", "bf16 gpu:0"], 0),
        ("one 24 GB card", ["int8 gpu:0", "bf16 gpu:0", "bf16 gpu:0"], 1),
        ("one 16 GB card", ["int8 gpu:0", "bf16 gpu:0", "bf16 gpu:0"], 1),
        ("one 80 GB card", ["bf16 gpu:0", "bf16 gpu:0", "bf16 gpu:0"], 0),
        ("96 GB of unified memory", ["bf16 gpu:0", "bf16 gpu:0", "bf16 gpu:0"], 0),
        ("64 GB and no GPU", ["fp32 cpu", "fp32 cpu", "fp32 cpu"], 0),
    ],
)
def test_every_machine_gets_its_plan(
    real_size: Checkpoint, machine: str, expected: list[str], turns: int
) -> None:
    plan = make_plan(MACHINES[machine], real_size)
    found = [f"{there.precision.name} {there.device.card.label}" for there in plan.placements]
    assert found == expected
    assert all(there.fits for there in plan.placements)
    assert len(plan.turns()) == turns and ("take turns on" in str(plan)) == bool(turns)


def test_four_p40_say_what_was_not_chosen_and_why(real_size: Checkpoint) -> None:
    plan = make_plan(MACHINES["four P40"], real_size)
    assert plan.rejected[:2] == (
        "transformer bf16: no native BF16 on gpu:0 (Tesla P40)",
        "transformer fp32 on gpu:0: 25.3 GiB + 1.1 GiB to work with do not fit 23.4 GiB",
    )
    assert plan.rejected[2:] == (cfg_line(plan),)
    minutes = 40 * plan.step_seconds / 60
    assert f"{minutes:.0f} min for 40 steps (projected from assumed speeds)" in plan.speed


def cfg_line(plan: Plan) -> str:
    """What the plan says of a second card for the other half of guidance."""
    return next((line for line in plan.rejected if line.startswith("cfg")), "")


def test_a_second_card_for_guidance_is_told_with_what_it_would_gain(real_size: Checkpoint) -> None:
    plan = make_plan(MACHINES["four P40"], real_size)
    half, alone = f"{plan.step_seconds / 2:.3g}", f"{plan.step_seconds:.3g}"
    assert cfg_line(plan) == (
        f"cfg over gpu:0 and gpu:3: {half} s a step instead of {alone}, but not available yet"
    )
    assert "no second card" in cfg_line(make_plan(MACHINES["two unequal cards"], real_size))
    assert cfg_line(make_plan(MACHINES["one 80 GB card"], real_size)) == ""


def test_a_much_slower_card_is_not_worth_half_of_guidance(real_size: Checkpoint) -> None:
    slow = replace(H100, bf16=50.0)
    plan = make_plan(machine_of(gpu(0, "H100", 79, True, H100), gpu(1, "old", 79, True, slow)), real_size)
    assert cfg_line(plan).startswith("cfg over gpu:0 and gpu:1: 2.5")
    assert cfg_line(plan).endswith(f" s a step instead of {plan.step_seconds:.3g}")


def test_the_halves_of_guidance_are_computed_alike(real_size: Checkpoint) -> None:
    cards = gpu(0, "H100", 79, True, H100), gpu(1, "Tesla P40", 23.9, False, P40)
    int8 = {"transformer": Choice(precision="int8")}
    plan = make_plan(machine_of(*cards), real_size, choices=int8)
    assert cfg_line(plan) == "cfg: no second card holds the int8 transformer"
    machine = machine_of(*(replace(card, speeds=P40) for card in cards))
    fp32 = {"transformer": Choice(precision="int8", math="fp32")}
    assert "cfg over gpu:0 and gpu:1" in cfg_line(make_plan(machine, real_size, choices=fp32))


def test_auto_never_takes_a_card_that_cannot_be_used(real_size: Checkpoint) -> None:
    asked: list[str] = []

    def runs(role: str, precision: Precision, card: Card) -> bool:
        asked.append(card.label)
        return True

    broken = unusable("gpu:1", torch.device("cuda", 1), RuntimeError("CUDA error: out of memory"))
    small = machine_of(gpu(0, "GTX 1060", 5.9, False), broken)
    plan = make_plan(small, real_size, runs=runs)
    assert [there.device.card.label for there in plan.placements] == ["gpu:0"] * 3
    (said,) = [line for line in plan.rejected if line.startswith("gpu:1")]
    assert "CUDA error: out of memory" in said and "gpu:1" not in asked
    plan = make_plan(small, real_size, choices={"vae": Choice("gpu:1")}, runs=runs)
    assert plan.placement("vae").reason == broken.fault and "gpu:1" not in asked
    alone = make_plan(machine_of(broken), real_size)
    assert {there.reason for there in alone.placements} == {broken.fault}
    for machine in (small, machine_of(broken)):
        assert draw_memory_map(make_plan(machine, real_size)).width == WIDTH


def test_the_fastest_card_gets_the_transformer(real_size: Checkpoint) -> None:
    cards = [
        gpu(index, "card", 79, True, replace(H100, bf16=speed)) for index, speed in enumerate((300, 700))
    ]
    assert [there.device.card.label for there in make_plan(machine_of(*cards), real_size).placements] == [
        "gpu:1",
        "gpu:0",
        "gpu:0",
    ]


def test_nothing_is_evicted_where_a_smaller_precision_elsewhere_avoids_it(real_size: Checkpoint) -> None:
    plan = make_plan(MACHINES["two unequal cards"], real_size)
    assert "text encoder bf16 on gpu:1: would take turns with the transformer" in plan.rejected
    small = machine_of(gpu(0, "RTX 4090", 23.6, True), gpu(1, "GTX 1060", 5.9, False))
    encoder = make_plan(small, real_size).placement("text_encoder")
    assert (encoder.precision.name, encoder.device.card.label) == ("bf16", "gpu:0")  # rather than nf4 apart


def test_what_is_free_decides_and_not_what_the_card_has(real_size: Checkpoint) -> None:
    card = gpu(0, "H100", 79.2, True)
    assert make_plan(machine_of(card), real_size).placement("transformer").precision.name == "bf16"
    busy = replace(card, free=20 * GIB)
    assert make_plan(machine_of(busy), real_size).placement("transformer").precision.name == "int8"


def test_nf4_needs_its_library_and_a_component_that_fits_nowhere_says_so(real_size: Checkpoint) -> None:
    machine = machine_of(gpu(0, "RTX 3060", 11.9, True))
    assert make_plan(machine, real_size).placement("transformer").precision.name == "nf4"
    plan = make_plan(machine, real_size, runs=lambda role, precision, card: precision.layer is not Nf4Linear)
    there = plan.placement("transformer")
    assert there.precision.name == "int8" and not there.fits
    assert (
        there.reason == "only 11.4 GiB were free, and nothing smaller runs there"
        and there.description.endswith("does not fit")
    )


def test_a_library_is_tried_only_where_it_decides(real_size: Checkpoint) -> None:
    tried: list[str] = []

    def runs(role: str, precision: Precision, card: Card) -> bool:
        tried.append(precision.name)
        return True

    make_plan(MACHINES["one 80 GB card"], real_size, runs=runs)
    assert tried == ["bf16"] * 3


def test_what_is_chosen_stays_and_the_others_stay_where_they_were(real_size: Checkpoint) -> None:
    machine, free = MACHINES["four P40"], make_plan(MACHINES["four P40"], real_size)
    nf4 = {"transformer": Choice(precision="nf4", reason="chosen")}
    plan = make_plan(machine, real_size, choices=nf4)
    assert (
        plan.placement("transformer").precision.name == "nf4"
        and plan.placement("transformer").reason == "chosen"
    )
    assert plan.placements[1:] == free.placements[1:]
    moved = make_plan(
        machine, real_size, choices={"transformer": Choice("gpu:3"), "vae": Choice("cpu", math="bf16")}
    )
    assert [there.device.card.label for there in moved.placements] == ["gpu:3", "gpu:0", "cpu"]
    assert moved.placement("vae").precision.compute is torch.bfloat16
    with pytest.raises(InputError, match=r"no gpu:7\. Choose gpu:0, gpu:1, gpu:2, gpu:3, cpu or auto"):
        make_plan(machine, real_size, choices={"vae": Choice("gpu:7")})


def test_the_cpu_of_a_unified_memory_takes_from_the_same_bytes(real_size: Checkpoint) -> None:
    machine = machine_of(gpu(0, "GPU", 32, True), unified=True)
    choices = {"text_encoder": Choice("cpu")}
    (together,) = make_plan(machine, real_size, choices=choices).turns()
    assert [there.device.card.label for there in together] == ["gpu:0", "cpu", "gpu:0"]
    assert not make_plan(replace(machine, unified=False), real_size, choices=choices).turns()


def test_int8_fast_is_offered_where_measurements_say_it_is_faster(real_size: Checkpoint) -> None:
    """It rounds activations too, so the user has to choose it."""
    quick, slow = replace(P40, int8=40.0, fp32_attention=10.0), replace(P40, int8=P40.fp32)
    usual = make_plan(p40s(4, quick, measured=True), real_size)
    assert usual.placement("transformer").precision.name == "int8" and "measured speeds" in usual.speed
    assert any("int8-fast" in line and "rounds activations too" in line for line in usual.rejected)
    assert not any("int8-fast" in line for line in make_plan(p40s(4, slow), real_size).rejected)


def test_a_picture_too_large_to_decode_whole_is_decoded_in_tiles(real_size: Checkpoint) -> None:
    machine = MACHINES["one 16 GB card"]
    assert not make_plan(machine, real_size).placement("vae").tiled
    vae = make_plan(machine, real_size, Edit(4096, 4096)).placement("vae")
    assert vae.tiled and vae.fits and vae.description.endswith("in tiles")


def test_a_missing_component_is_left_out_and_named_when_asked_for(tiny_copy: Path) -> None:
    (tiny_copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    plan = make_plan(MACHINES["four P40"], open_checkpoint(tiny_copy))
    assert [there.role for there in plan.placements] == ["transformer", "text_encoder"]
    with pytest.raises(CheckpointError, match=r"No \.safetensors weights in .*vae"):
        plan.placement("vae")


def test_a_plan_names_what_is_missing_beside_a_component(tiny_copy: Path) -> None:
    (tiny_copy / "scheduler" / "scheduler_config.json").unlink()
    plan = make_plan(MACHINES["four P40"], open_checkpoint(tiny_copy))
    assert [there.role for there in plan.placements] == list(ROLES)
    assert "problem: " in str(plan) and "scheduler" in str(plan) and "s a step" in str(plan)
    assert draw_memory_map(plan).width == WIDTH


def test_every_role_can_be_set_to_every_precision(real_size: Checkpoint) -> None:
    for role in ROLES:
        for name in ROLE_PRECISIONS[role]:
            plan = make_plan(MACHINES["64 GB and no GPU"], real_size, choices={role: Choice(precision=name)})
            assert plan.placement(role).precision.name == name


# The picture


@pytest.mark.parametrize("machine", MACHINES)
def test_bars_are_as_long_as_the_bytes(real_size: Checkpoint, machine: str) -> None:
    plan = make_plan(MACHINES[machine], real_size)
    picture = draw_memory_map(plan)
    assert picture.width == WIDTH
    longest = max(device.card.memory for device in plan.machine.automatic)
    for there in plan.placements:
        is_colour = (np.asarray(picture) == ImageColor.getrgb(COLOURS[there.role])).all(axis=2)
        columns = (is_colour.sum(axis=0) > 30).sum()  # lines of text in that colour are lower
        assert columns == pytest.approx(there.weights / longest * (WIDTH - 80), abs=4)


def test_a_component_larger_than_its_card_stays_inside_the_picture(real_size: Checkpoint) -> None:
    picture = draw_memory_map(make_plan(machine_of(gpu(0, "GTX 1060", 5.9, False)), real_size))
    right = picture.crop((WIDTH - 38, 0, WIDTH, picture.height))
    assert right.getextrema() == ((255, 255), (255, 255), (255, 255))
