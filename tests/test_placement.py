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
from engine.cards.speeds import ASSUMED, Speeds
from engine.errors import CheckpointError, InputError
from engine.files.checkpoint import Checkpoint, open_checkpoint
from engine.models import loading
from engine.planning.machine import unusable
from engine.planning.memory_map import COLOURS, WIDTH, draw_memory_map
from engine.planning.placement import ROLES, Fixed, place
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
from machines import H100, MACHINES, gpu, machine_of, p40s
from PIL import ImageColor
from test_precision import run_transformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

P40_CARD = Card("gpu:0", "Tesla P40", torch.device("cpu"), native_bf16=False, memory=24 * GIB)
BF16_CARD = Card("gpu:0", "H100", torch.device("cpu"), native_bf16=True, memory=80 * GIB)
P40 = ASSUMED["Tesla P40"]
CFG = ("none", "cfg")


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
    there = place(machine, real_size, fixed={role: Fixed(precision=precision, math=math)}).place(role)
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
    assert place(machine_of(device), real_size).place("transformer").precision.name == "int8"
    unfused = frozenset({("transformer", torch.float32)})
    device = replace(device, card=replace(device.card, unfused=unfused))
    there = place(machine_of(device), real_size).place("transformer")
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
    ("precision", "math", "speeds", "seconds"),
    [
        ("fp32", "fp32", H100, 3.55),
        ("int8", "fp32", H100, 3.62),
        ("int8-fast", "fp32", replace(H100, bf16=None), 1.87),
        ("int8-fast", "fp32", H100, 1.55),
        ("int8-bnb", "fp32", H100, 1.81),
        ("nf4", "fp32", H100, 3.55),
        ("bf16", "bf16", H100, 0.39),
    ],
)
def test_forwards_take_the_measured_seconds(
    real_size: Checkpoint, precision: str, math: str, speeds: Speeds, seconds: float
) -> None:
    row = resolve(PRECISIONS[precision], BF16_CARD, math)
    assert forward_seconds(speeds, Shape.of(real_size), 8442, row) == pytest.approx(seconds, rel=0.05)


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
    assert Edit(512, 768, references=0, prompt_tokens=100).tokens == 32 * 48 + 100
    assert Edit(references=3, reference_megapixels=0.5).tokens == 4096 + 3 * (2048 + 196) + 54
    shape = Shape.of(real_size)
    assert shape.linear_flops(8492) == pytest.approx(115.4e12, rel=1e-3)
    assert shape.attention_flops(8492) == pytest.approx(53.2e12, rel=1e-3)


def test_guidance_over_two_cards_takes_the_slower_ones_forward(real_size: Checkpoint) -> None:
    shape, row = Shape.of(real_size), resolve(PRECISIONS["int8"], BF16_CARD, "fp32")
    alone = step_seconds((P40,), shape, Edit(), row)
    slow = replace(P40, fp32=P40.fp32 / 2)
    assert step_seconds((P40, P40), shape, Edit(), row, "cfg") == pytest.approx(alone / 2)
    both = step_seconds((P40, slow), shape, Edit(), row, "cfg")
    assert both == pytest.approx(forward_seconds(slow, shape, 8442, row)) and both < alone
    assert step_seconds((P40,), shape, Edit(guided=False), row) == pytest.approx(alone / 2)
    assert step_seconds((P40,), shape, Edit(), resolve(PRECISIONS["bf16"], BF16_CARD)) is None


def test_workspace_grows_with_tokens_and_pixels(real_size: Checkpoint) -> None:
    fp32 = resolve(PRECISIONS["fp32"], P40_CARD)

    def gib(role: str, edit: Edit, **options: bool) -> float:
        return workspace_bytes(role, real_size, fp32, edit, **options) / GIB

    assert gib("transformer", Edit(references=3)) / gib("transformer", Edit()) == pytest.approx(17026 / 8442)
    assert gib("vae", Edit(2048, 2048)) == pytest.approx(4 * gib("vae", Edit()))
    assert gib("vae", Edit(2048, 2048, references=0), tiled=True) < 0.04 * gib("vae", Edit(2048, 2048))
    assert gib("text_encoder", Edit()) < gib("text_encoder", Edit(references=10)) < 1.6


# Placements


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
    plan = place(MACHINES[machine], real_size)
    found = [f"{there.precision.name} {there.device.card.label}" for there in plan.places]
    assert found == expected
    assert all(there.fits for there in plan.places)
    assert len(plan.turns()) == turns and ("take turns on" in str(plan)) == bool(turns)


def test_four_p40_say_what_was_not_chosen_and_why(real_size: Checkpoint) -> None:
    plan = place(MACHINES["four P40"], real_size)
    assert plan.rejected[:2] == (
        "transformer bf16: no native BF16 on gpu:0 (Tesla P40)",
        "transformer fp32 on gpu:0: 25.3 GiB + 1.1 GiB to work with do not fit 23.4 GiB",
    )
    assert plan.rejected[2].startswith("cfg over gpu:0 and gpu:3: ")
    assert plan.rejected[2].endswith(f"s a step instead of {plan.step_seconds:.3g}, but not available yet")
    assert "projected from assumed speeds" in plan.speed and plan.total_seconds == 40 * plan.step_seconds


def test_cfg_takes_a_second_card_where_it_can_run(real_size: Checkpoint) -> None:
    alone, both = (place(MACHINES["four P40"], real_size, modes=modes) for modes in (("none",), CFG))
    assert (alone.mode, both.mode) == ("none", "cfg")
    cards = [there.device.card.label for there in both.places if there.role == "transformer"]
    assert cards == ["gpu:0", "gpu:3"]
    assert both.step_seconds == pytest.approx(alone.step_seconds / 2)
    assert place(MACHINES["two unequal cards"], real_size, modes=CFG).mode == "none"
    assert place(MACHINES["four P40"], real_size, Edit(guided=False), modes=CFG).mode == "none"
    (shared,) = place(p40s(2), real_size, modes=CFG).turns()
    assert {there.role for there in shared} == set(ROLES)


def test_a_much_slower_card_is_not_worth_half_of_guidance(real_size: Checkpoint) -> None:
    slow = replace(H100, bf16=50.0)
    plan = place(
        machine_of(gpu(0, "H100", 79, True, H100), gpu(1, "old", 79, True, slow)), real_size, modes=CFG
    )
    assert plan.mode == "none"
    assert plan.rejected == (f"cfg over gpu:0 and gpu:1: 2.52 s a step instead of {plan.step_seconds:.3g}",)


def test_the_halves_of_guidance_are_computed_alike(real_size: Checkpoint) -> None:
    cards = gpu(0, "H100", 79, True, H100), gpu(1, "Tesla P40", 23.9, False, P40)
    machine = machine_of(*cards)
    plan = place(machine, real_size, fixed={"transformer": Fixed(precision="int8")}, modes=CFG)
    assert plan.mode == "none" and "cfg: no second card holds the int8 transformer" in plan.rejected
    cards = tuple(replace(card, speeds=P40) for card in cards)
    fp32 = Fixed(precision="int8", math="fp32")
    assert place(machine_of(*cards), real_size, fixed={"transformer": fp32}, modes=CFG).mode == "cfg"


def test_auto_never_takes_a_card_that_cannot_be_used(real_size: Checkpoint) -> None:
    asked: list[str] = []

    def runs(role: str, precision: Precision, card: Card) -> bool:
        asked.append(card.label)
        return True

    broken = unusable("gpu:1", torch.device("cuda", 1), RuntimeError("CUDA error: out of memory"))
    small = machine_of(gpu(0, "GTX 1060", 5.9, False), broken)
    plan = place(small, real_size, runs=runs)
    assert [there.device.card.label for there in plan.places] == ["gpu:0"] * 3
    (said,) = [line for line in plan.rejected if line.startswith("gpu:1")]
    assert "CUDA error: out of memory" in said and "gpu:1" not in asked
    plan = place(small, real_size, fixed={"vae": Fixed("gpu:1")}, runs=runs)
    assert plan.place("vae").reason == broken.fault and "gpu:1" not in asked
    alone = place(machine_of(broken), real_size)
    assert {there.reason for there in alone.places} == {broken.fault}
    for machine in (small, machine_of(broken)):
        assert draw_memory_map(place(machine, real_size)).width == WIDTH


def test_the_fastest_card_gets_the_transformer(real_size: Checkpoint) -> None:
    cards = [
        gpu(index, "card", 79, True, replace(H100, bf16=speed)) for index, speed in enumerate((300, 700))
    ]
    assert [there.device.card.label for there in place(machine_of(*cards), real_size).places] == [
        "gpu:1",
        "gpu:0",
        "gpu:0",
    ]


def test_nothing_is_evicted_where_a_smaller_precision_elsewhere_avoids_it(real_size: Checkpoint) -> None:
    plan = place(MACHINES["two unequal cards"], real_size)
    assert "text encoder bf16 on gpu:1: would take turns with the transformer" in plan.rejected
    small = machine_of(gpu(0, "RTX 4090", 23.6, True), gpu(1, "GTX 1060", 5.9, False))
    encoder = place(small, real_size).place("text_encoder")
    assert (encoder.precision.name, encoder.device.card.label) == ("bf16", "gpu:0")  # rather than nf4 apart


def test_what_is_free_decides_and_not_what_the_card_has(real_size: Checkpoint) -> None:
    card = gpu(0, "H100", 79.2, True)
    assert place(machine_of(card), real_size).place("transformer").precision.name == "bf16"
    busy = replace(card, free=20 * GIB)
    assert place(machine_of(busy), real_size).place("transformer").precision.name == "int8"


def test_nf4_needs_its_library_and_a_component_that_fits_nowhere_says_so(real_size: Checkpoint) -> None:
    machine = machine_of(gpu(0, "RTX 3060", 11.9, True))
    assert place(machine, real_size).place("transformer").precision.name == "nf4"
    plan = place(machine, real_size, runs=lambda role, precision, card: precision.layer is not Nf4Linear)
    there = plan.place("transformer")
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

    place(MACHINES["one 80 GB card"], real_size, runs=runs)
    assert tried == ["bf16"] * 3


def test_what_is_fixed_stays_and_the_others_stay_where_they_were(real_size: Checkpoint) -> None:
    machine, free = MACHINES["four P40"], place(MACHINES["four P40"], real_size)
    fixed = {"transformer": Fixed(precision="nf4", reason="chosen")}
    plan = place(machine, real_size, fixed=fixed)
    assert plan.place("transformer").precision.name == "nf4" and plan.place("transformer").reason == "chosen"
    assert plan.places[1:] == free.places[1:]
    moved = place(machine, real_size, fixed={"transformer": Fixed("gpu:3"), "vae": Fixed("cpu", math="bf16")})
    assert [there.device.card.label for there in moved.places] == ["gpu:3", "gpu:0", "cpu"]
    assert moved.place("vae").precision.compute is torch.bfloat16
    with pytest.raises(InputError, match=r"no gpu:7\. Choose gpu:0, gpu:1, gpu:2, gpu:3, cpu or auto"):
        place(machine, real_size, fixed={"vae": Fixed("gpu:7")})


def test_the_cpu_of_a_unified_memory_takes_from_the_same_bytes(real_size: Checkpoint) -> None:
    machine = machine_of(gpu(0, "GPU", 32, True), unified=True)
    fixed = {"text_encoder": Fixed("cpu")}
    (together,) = place(machine, real_size, fixed=fixed).turns()
    assert [there.device.card.label for there in together] == ["gpu:0", "cpu", "gpu:0"]
    assert not place(replace(machine, unified=False), real_size, fixed=fixed).turns()


def test_int8_fast_is_offered_where_measurements_say_it_is_faster(real_size: Checkpoint) -> None:
    """It rounds activations too, so the user has to choose it."""
    quick, slow = replace(P40, int8=40.0, fp32_attention=10.0), replace(P40, int8=P40.fp32)
    usual = place(p40s(4, quick, measured=True), real_size)
    assert usual.place("transformer").precision.name == "int8" and "measured speeds" in usual.speed
    assert any("int8-fast" in line and "rounds activations too" in line for line in usual.rejected)
    assert not any("int8-fast" in line for line in place(p40s(4, slow), real_size).rejected)


def test_a_picture_too_large_to_decode_whole_is_decoded_in_tiles(real_size: Checkpoint) -> None:
    machine = MACHINES["one 16 GB card"]
    assert not place(machine, real_size).place("vae").tiled
    vae = place(machine, real_size, Edit(4096, 4096)).place("vae")
    assert vae.tiled and vae.fits and vae.description.endswith("in tiles")


def test_a_missing_component_is_left_out_and_named_when_asked_for(tiny_copy: Path) -> None:
    (tiny_copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    plan = place(MACHINES["four P40"], open_checkpoint(tiny_copy))
    assert [there.role for there in plan.places] == ["transformer", "text_encoder"]
    with pytest.raises(CheckpointError, match=r"No \.safetensors weights in .*vae"):
        plan.place("vae")


def test_every_role_can_be_fixed_at_every_precision(real_size: Checkpoint) -> None:
    for role in ROLES:
        for name in ROLE_PRECISIONS[role]:
            plan = place(MACHINES["64 GB and no GPU"], real_size, fixed={role: Fixed(precision=name)})
            assert plan.place(role).precision.name == name


# The picture


@pytest.mark.parametrize("machine", MACHINES)
def test_bars_are_as_long_as_the_bytes(real_size: Checkpoint, machine: str) -> None:
    plan = place(MACHINES[machine], real_size)
    picture = draw_memory_map(plan)
    assert picture.width == WIDTH
    longest = max(device.card.memory for device in plan.machine.automatic)
    for there in plan.places:
        is_colour = (np.asarray(picture) == ImageColor.getrgb(COLOURS[there.role])).all(axis=2)
        columns = (is_colour.sum(axis=0) > 30).sum()  # lines of text in that colour are lower
        assert columns == pytest.approx(there.weights / longest * (WIDTH - 80), abs=4)


def test_a_component_larger_than_its_card_stays_inside_the_picture(real_size: Checkpoint) -> None:
    picture = draw_memory_map(place(machine_of(gpu(0, "GTX 1060", 5.9, False)), real_size))
    right = picture.crop((WIDTH - 38, 0, WIDTH, picture.height))
    assert right.getextrema() == ((255, 255), (255, 255), (255, 255))
