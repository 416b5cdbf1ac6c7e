"""What fits where, and how long it takes, on machines that are not here."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine.cards.card import Card
from engine.drawing import WIDTH
from engine.errors import CheckpointError, InputError
from engine.files.checkpoint import Checkpoint, open_checkpoint
from engine.planning.machine import unusable
from engine.planning.memory_map import COLOURS, draw_memory_map
from engine.planning.planner import ROLES, Choice, make_plan
from engine.planning.sharing import Sharer
from engine.sampling.layout import CFG, LAYERS
from engine.units import GIB
from engine.weights.estimates import (
    Edit,
)
from engine.weights.formats import Nf4Linear
from engine.weights.precision import PRECISIONS, ROLE_PRECISIONS, Precision, resolve
from engine.weights.room import DoesNotFitError
from machines import H100, MACHINES, P40, gpu, machine_of, p40s
from PIL import ImageColor


@pytest.mark.parametrize(
    ("machine", "expected", "turns"),
    [
        ("four P40", ["int8 gpu:0", "fp32 gpu:1", "fp32 gpu:2"], 1),
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
    assert f"with a Lightning LoRA (8 steps, cfg 1) {4 * plan.step_seconds:.0f} s" in str(plan)
    minutes = 40 * plan.step_seconds / 60
    assert f"{minutes:.0f} min for 40 steps (projected from assumed speeds)" in plan.speed


def test_four_p40_share_the_transformer(real_size: Checkpoint) -> None:
    plan = make_plan(MACHINES["four P40"], real_size)
    assert str(plan.sharing) == "cfg+sequence over gpu:0, gpu:1, gpu:2 and gpu:3"
    assert [there.device.card.label for there in plan.copies] == ["gpu:1", "gpu:2", "gpu:3"]
    one = make_plan(p40s(1), real_size).step_seconds
    assert plan.step_seconds / one == pytest.approx(0.28, abs=0.01)
    told = str(plan)
    reload = plan.placement("text_encoder").weights / 1e9 / 40  # in each edit: it takes turns with a copy
    assert (
        f"not cfg+sequence over gpu:0 and gpu:1: {one / 2 + reload:.3g} s a step instead of {one:.3g}" in told
    )
    assert "not sequence over gpu:0, gpu:1, gpu:2 and gpu:3: " in told
    assert "transformer and text encoder take turns on gpu:1" in told


def test_fast_cards_wait_for_the_program(real_size: Checkpoint) -> None:
    """Four H100s in BF16 take 0.48 s a step and two of them 0.35 (measured): queueing takes longer."""
    cards = [gpu(number, "H100", 79, True, H100) for number in range(4)]
    plan = make_plan(replace(machine_of(*cards), copy_rate=100.0), real_size)
    assert str(plan.sharing) == "cfg+sequence over gpu:0 and gpu:1"
    four = next(line for line in plan.rejected if line.startswith("cfg+sequence over gpu:0, gpu:1"))
    assert float(four.split(": ")[1].split()[0]) == pytest.approx(0.48)


def test_without_a_copy_rate_only_the_branches_are_shared(real_size: Checkpoint) -> None:
    plan = make_plan(replace(MACHINES["four P40"], copy_rate=None), real_size)
    assert "not sequence over gpu:0 and gpu:1: time unknown" in str(plan)


def test_the_slower_the_copies_the_fewer_cards_share(real_size: Checkpoint) -> None:
    def sharing(rate: float) -> str:
        return str(make_plan(replace(p40s(3), copy_rate=rate), real_size).sharing)

    assert sharing(10.0) == "sequence over gpu:0, gpu:1 and gpu:2"
    assert sharing(1.0) == "cfg+sequence over gpu:0 and gpu:1"


def test_a_card_that_the_user_chose_is_not_shared(real_size: Checkpoint) -> None:
    plan = make_plan(p40s(2), real_size, choices={"transformer": Choice("gpu:1")})
    assert plan.sharing is None and plan.placement("transformer").device.card.label == "gpu:1"
    assert plan.step_seconds == make_plan(p40s(1), real_size).step_seconds


def test_a_much_slower_card_is_not_worth_half_of_guidance(real_size: Checkpoint) -> None:
    slow = replace(H100, bf16=50.0)
    plan = make_plan(machine_of(gpu(0, "H100", 79, True, H100), gpu(1, "old", 79, True, slow)), real_size)
    assert plan.sharing is None
    assert f"not cfg+sequence over gpu:0 and gpu:1: 2.51 s a step instead of {plan.step_seconds:.3g}" in str(
        plan
    )


def test_cards_that_share_compute_alike(real_size: Checkpoint) -> None:
    cards = gpu(0, "H100", 79, True, H100), gpu(1, "Tesla P40", 23.9, False, P40)
    int8 = {"transformer": Choice(precision="int8")}
    plan = make_plan(machine_of(*cards), real_size, choices=int8)
    assert plan.sharing is None
    assert "sharing with gpu:1 (Tesla P40): it has no native BF16. Set math of FireRed Load" in str(plan)
    machine = machine_of(*(replace(card, speeds=P40) for card in cards))
    fp32 = {"transformer": Choice(precision="int8", math="fp32")}
    assert str(make_plan(machine, real_size, choices=fp32).sharing) == "cfg+sequence over gpu:0 and gpu:1"


def test_a_second_card_that_is_too_small_is_told(real_size: Checkpoint) -> None:
    plan = make_plan(MACHINES["two unequal cards"], real_size)
    assert plan.sharing is None
    assert "not sharing: no second card holds the int8 transformer" in str(plan)


# What FireRed Parallel asks


def sharer(checkpoint: Checkpoint, precision: str, rate: float | None = 6.0) -> Sharer:
    resolved = resolve(PRECISIONS[precision], p40s(1).gpus[0].card)
    return Sharer(checkpoint, resolved, lambda precision, card: True, copy_rate=rate)


def test_a_model_too_big_for_a_card_is_shared_by_layers(real_size: Checkpoint) -> None:
    found = sharer(real_size, "fp32").choose(p40s(2).gpus)
    assert str(found) == "layers over gpu:0 and gpu:1" and found.counts == (30, 30)
    small = replace(p40s(2).gpus[1], free=12 * GIB)
    found = sharer(real_size, "fp32").choose((p40s(2).gpus[0], small), LAYERS, named=True)
    assert sum(found.counts) == 60 and 15 < found.counts[1] < 25
    with pytest.raises(DoesNotFitError, match=r"layers takes 25\.3 GiB .* have 22\.. GiB in all"):
        sharer(real_size, "fp32").choose((small, replace(small, free=11 * GIB)), LAYERS)


def test_named_cards_that_cannot_hold_a_copy_are_refused(real_size: Checkpoint) -> None:
    cards = p40s(2).gpus
    with pytest.raises(DoesNotFitError, match=r"takes 25\.3 GiB .* to work with; gpu:0 .*mode layers"):
        sharer(real_size, "fp32").choose(cards, CFG, named=True)
    assert str(sharer(real_size, "int8").choose(cards, CFG, named=True)) == "cfg over gpu:0 and gpu:1"
    broken = unusable("gpu:1", torch.device("cuda", 1), RuntimeError("CUDA error: busy"))
    with pytest.raises(InputError, match=r"gpu:1 cannot take part: gpu:1 does not answer: CUDA error: busy"):
        sharer(real_size, "int8").choose((cards[0], broken), named=True)
    assert sharer(real_size, "int8").choose((cards[0], broken)) is None


def test_a_card_that_only_slows_the_other_down_is_left_alone(real_size: Checkpoint) -> None:
    (lead, other), asked = p40s(2).gpus, sharer(real_size, "int8")
    for gib in (8, 4, 1):
        assert asked.choose((lead, replace(other, free=gib * GIB))) is None
    assert asked.choose((lead, replace(other, free=GIB)), LAYERS) is None


def test_layers_count_the_scores_of_attention_without_a_fused_kernel(real_size: Checkpoint) -> None:
    plain = frozenset({("transformer", torch.float32)})
    cards = [replace(each, card=replace(each.card, unfused=plain)) for each in p40s(2).gpus]
    asked = sharer(real_size, "int8")
    assert asked.choose(cards, LAYERS, named=True).counts == (30, 30)
    with pytest.raises(DoesNotFitError, match=r"14\.\d GiB to work with on each"):
        asked.choose([replace(each, free=20 * GIB) for each in cards], LAYERS, named=True)


def test_fp16_is_shared_by_branches_alone(real_size: Checkpoint) -> None:
    cards = [gpu(number, "V100", 79, False, replace(P40, fp16=90.0)) for number in range(2)]
    plan = make_plan(
        replace(machine_of(*cards), copy_rate=10.0), real_size,
        choices={"transformer": Choice(precision="fp16")},
    )  # fmt: skip
    assert str(plan.sharing) == "cfg over gpu:0 and gpu:1"
    assert str(sharer(real_size, "fp16").choose(cards, named=True)) == "cfg over gpu:0 and gpu:1"


def test_layers_keep_both_branches_in_flight(real_size: Checkpoint) -> None:
    """With blocks dealt in six turns to two cards, a step takes 13 parts of 24."""
    cards, asked = p40s(2).gpus, sharer(real_size, "int8")
    one = make_plan(p40s(1), real_size).step_seconds
    assert asked.choose(cards, LAYERS).seconds / one == pytest.approx(13 / 24)


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
    assert not any("activations too" in line for line in make_plan(p40s(4, slow), real_size).rejected)


def test_int8_attention_is_offered_on_a_p40(real_size: Checkpoint) -> None:
    """Under 15 s a step is projected (docs/pascal.md): 10.9 to 13.1, and this at the cautious end."""
    (told,) = (each for each in make_plan(p40s(1), real_size).rejected if "attention int8" in each)
    seconds = re.search(r"int8-fast .* with attention int8: ([\d.]+) s a step, but rounds", told)
    assert seconds is not None and float(seconds[1]) == pytest.approx(13.3, abs=0.1)
    without = p40s(1, replace(P40, int8_attention=None))
    assert not any("attention int8" in each for each in make_plan(without, real_size).rejected)


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
