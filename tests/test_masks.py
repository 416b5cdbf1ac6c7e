"""A LATENT's content, its noise mask and `denoise` mean what they mean to core's KSampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import replica_for
from core_vae import CORE_VAE
from engine.errors import InputError, NonFiniteError
from engine.files.cache import DiskCache
from engine.files.checkpoint import Checkpoint
from engine.latents import grid_size, pack, read_latent, unpack
from engine.masks import read_mask, softened
from engine.models import loading
from engine.sampling.conditioning import POSITIVE
from engine.sampling.denoise import Kept, add_noise, denoise
from engine.sampling.options import SamplingOptions, StepCacheOptions
from engine.sampling.resume import SavedRun
from engine.sampling.sampling import SamplingRun, sample
from engine.sampling.schedule import Schedule, make_schedule
from prompts import (
    PHOTO,
    SAMPLE,
    changed,
    edit_prompt,
    failure,
    keep_tensor,
    kept_tensor,
    succeed,
    with_node,
)
from test_parallel import MODES, alone, difference, layout, load_all, prepared
from test_resume import Stop, sampled_steps, stop_at
from test_sampling import plan

from launcher.client import Client, Prompt
from launcher.server import Server

SCHEDULE = "40"


def left_half(*size: int) -> torch.Tensor:
    mask = torch.zeros(*size)
    mask[..., : size[-1] // 2] = 1
    return mask


def picture(batch: int = 1, height: int = 4, width: int = 6) -> torch.Tensor:
    return torch.randn(batch, 16, 1, height, width, generator=torch.Generator().manual_seed(7))


def masked(**more: Any) -> dict[str, Any]:
    """Arguments of prepare_run for two pictures, the second of which changes in its left half only."""
    mask = torch.cat([torch.full((1, 1, 1, 4, 6), 0.6), left_half(1, 1, 1, 4, 6)])
    return dict(samples=picture(2), mask=mask, steps=4) | more


# What core does


@pytest.mark.parametrize("differential", [-1.0, 1.0, 0.25])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_masked_sampling_is_cores(client: Client, work: Path, differential: float, strength: float) -> None:
    """Core's Euler, its masks and its DifferentialDiffusion, against our loop on the same field."""
    prompt = with_node({}, "1", "ProbeLatent", shape="1,16,1,6,10", fill="0.7")
    prompt = with_node(prompt, "2", "SolidMask", value=0.4, width=40, height=50)
    prompt = with_node(prompt, "3", "SolidMask", value=1.0, width=17, height=23)
    inputs = dict(destination=["2", 0], source=["3", 0], x=5, y=9, operation="add")
    prompt = with_node(prompt, "4", "MaskComposite", **inputs)
    prompt = with_node(prompt, "5", "FeatherMask", mask=["4", 0], left=9, top=9, right=9, bottom=9)
    prompt = with_node(prompt, "6", "SetLatentNoiseMask", samples=["1", 0], mask=["5", 0])
    numbers = dict(steps=7, seed=3, denoise=strength, differential=differential)
    prompt = with_node(prompt, "7", "ProbeKSampler", latent=["6", 0], name="by_core", **numbers)
    succeed(client, keep_tensor(prompt, ["6", 0], "masked"))
    core, latent = kept_tensor(work, "by_core"), kept_tensor(work, "masked")
    given = read_latent(latent)
    assert given.mask is not None and given.mask.unique().numel() > 5
    assert torch.allclose(given.mask.expand_as(core["mask"]), core["mask"], atol=1e-6)
    sigmas, noise = core["sigmas"], pack(core["noise"])
    mask = pack(given.mask.expand_as(core["mask"]))
    kept = Kept(pack(given.samples), noise, mask, max(differential, 0.0))
    start = add_noise(kept.picture, noise, sigmas[0].item())
    schedule = Schedule(sigmas, sigmas[:-1])
    found = denoise(lambda x, _: {POSITIVE: 1 + 0.3 * torch.sin(x)}, start, schedule, 1.0, kept=kept)
    assert torch.allclose(unpack(found, 6, 10), core["samples"], atol=1e-5)
    assert (core["samples"] - latent["samples"]).abs().max() > 0.1  # something was changed


@pytest.mark.parametrize(
    ("steps", "strength", "of"), [(4, 0.5, 8), (7, 0.6, 11), (1, 0.3, 3), (9, 0.01, 900)]
)
def test_denoise_takes_the_last_steps_of_a_longer_schedule(
    tiny: Checkpoint, steps: int, strength: float, of: int
) -> None:
    config = tiny.component("scheduler").config()
    part, whole = make_schedule(config, steps, 64, denoise=strength), make_schedule(config, of, 64)
    assert part.steps == steps and torch.allclose(part.sigmas, whole.sigmas[-steps - 1 :], atol=1e-6)
    assert torch.allclose(part.timesteps, whole.timesteps[-steps:], atol=1e-6)


def test_a_denoise_of_nearly_nothing_is_no_error(tiny: Checkpoint) -> None:
    config = tiny.component("scheduler").config()
    assert make_schedule(config, 3, 64, denoise=1e-320).sigmas.isfinite().all()


def test_a_denoise_of_nearly_one_is_one_as_in_core(tiny: Checkpoint) -> None:
    config = tiny.component("scheduler").config()
    assert torch.equal(
        make_schedule(config, 5, 64, denoise=0.99995).sigmas, make_schedule(config, 5, 64).sigmas
    )


# Runs


def test_outside_of_the_mask_nothing_changes(tiny: Checkpoint) -> None:
    transformer = loading.load(replica_for(tiny, "transformer"))
    found = sample(transformer, plan(tiny, **masked()))
    moved = (found - picture(2)).abs()
    assert moved[1, ..., 3:].max() < 1e-5 < 0.1 < moved[1, ..., :3].mean() and moved[0].mean() > 0.1
    free = sample(transformer, plan(tiny, samples=picture(2), steps=4))
    assert (found - free).abs().max() > 0.1


def test_a_smaller_denoise_stays_closer_to_the_picture(tiny: Checkpoint) -> None:
    transformer = loading.load(replica_for(tiny, "transformer"))
    moved = [
        (
            sample(transformer, plan(tiny, samples=picture(), options=SamplingOptions(denoise=d))) - picture()
        ).norm()
        for d in (0.05, 0.3, 0.7, 1.0)
    ]
    assert moved == sorted(moved) and moved[0] < moved[-1] / 5


def test_odd_latents_keep_their_place(tiny: Checkpoint) -> None:
    pictures, mask = picture(1, 5, 7), left_half(1, 1, 1, 5, 7)
    found = sample(loading.load(replica_for(tiny, "transformer")), plan(tiny, samples=pictures, mask=mask))
    moved = (found - pictures).abs()
    assert moved.shape == (1, 16, 1, 5, 7) and moved[..., 3:].max() < 1e-5 and moved[..., :3].min() > 1e-5


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_a_masked_run_stopped_at_any_step_ends_in_the_same_bits(
    tiny: Checkpoint, tmp_path: Path, threshold: float
) -> None:
    store, transformer = DiskCache(tmp_path / "runs", 10**9), loading.load(replica_for(tiny, "transformer"))
    cache = StepCacheOptions(threshold)
    options = SamplingOptions(denoise=0.8, differential=0.5, guidance_to=0.5, step_cache=cache)
    run = plan(tiny, **masked(options=options))
    expected = sample(transformer, run)
    for step in range(1, 8):
        with pytest.raises(Stop):
            sample(transformer, run, stop_at(step), saved=SavedRun(store, run.name()))
        saved = SavedRun(store, run.name())
        steps, resumed = sampled_steps(transformer, run, saved)
        assert torch.equal(resumed, expected) and steps == list(range(step + 1, 9))
        saved.forget()


def test_the_name_of_a_run_depends_on_what_it_keeps(tiny: Checkpoint) -> None:
    other = masked()["mask"].clone()
    other[0, 0, 0, 0, 0] = 0.5
    half, differential = SamplingOptions(denoise=0.5), SamplingOptions(differential=1.0)
    runs: list[SamplingRun] = [
        plan(tiny, samples=picture(2), steps=4),
        plan(tiny, **masked()),
        plan(tiny, **masked(samples=picture(2) * 1.001)),
        plan(tiny, **masked(mask=other)),
        plan(tiny, **masked(options=differential)),
        plan(tiny, **masked(options=half)),
        plan(tiny, samples=picture(2), steps=4, options=half),
    ]
    assert len({run.name() for run in runs}) == len(runs)
    starts_from_noise = plan(tiny, samples=torch.zeros(2, 16, 4, 6), steps=4, options=differential)
    assert starts_from_noise.name() == runs[0].name()  # neither counts then


@pytest.mark.parametrize("mode", MODES)
def test_every_way_to_share_cards_keeps_what_one_card_keeps(tiny: Checkpoint, mode: str) -> None:
    changes = masked(options=SamplingOptions(denoise=0.9, differential=1.0, guidance_to=0.5))
    shared = layout(tiny, mode)
    found = sample(load_all(shared), prepared(shared.replicas[0], layout=shared, **changes))
    assert difference(found, alone(tiny, **changes)) < 1e-5
    assert (found - picture(2))[1, ..., 3:].abs().max() < 1e-5


# On the server, with core's nodes


def masked_prompt(width: int, height: int, **mask: Any) -> Prompt:
    """The edit of a picture of that size in its left half, encoded by core's VAE."""
    prompt = with_node(edit_prompt(), "30", "VAELoader", vae_name=CORE_VAE)
    inputs = dict(image=[PHOTO, 0], upscale_method="area", width=width, height=height, crop="disabled")
    prompt = with_node(prompt, "31", "ImageScale", **inputs)
    prompt = with_node(prompt, "32", "VAEEncode", pixels=["31", 0], vae=["30", 0])
    mask = dict(value=1.0, width=width // 2, height=height) | mask
    prompt = with_node(prompt, "33", "SolidMask", **mask)
    prompt = with_node(prompt, "34", "SolidMask", value=0.0, width=width, height=height)
    inputs = dict(destination=["34", 0], source=["33", 0], x=0, y=0, operation="add")
    prompt = with_node(prompt, "35", "MaskComposite", **inputs)
    prompt = with_node(prompt, "36", "SetLatentNoiseMask", samples=["32", 0], mask=["35", 0])
    prompt = changed(prompt, SAMPLE, latent=["36", 0])
    return keep_tensor(keep_tensor(prompt, [SAMPLE, 0], "sampled"), ["32", 0], "given")


def with_schedule(prompt: Prompt, **inputs: Any) -> Prompt:
    prompt = with_node(prompt, SCHEDULE, "FireRedSchedule", transformer=["1", 0], **inputs)
    return changed(prompt, SAMPLE, transformer=[SCHEDULE, 0])


def test_a_mask_of_core_is_obeyed_and_kept(client: Client, work: Path, server: Server) -> None:
    succeed(client, masked_prompt(96, 64))
    sampled, given = kept_tensor(work, "sampled"), kept_tensor(work, "given")["samples"]
    moved = (sampled["samples"] - given).abs()
    assert moved[..., 6:].max() < 1e-4 and moved[..., :6].mean() > 0.1
    assert sampled["noise_mask"].shape == (1, 1, 64, 96)  # core's KSampler keeps it too
    assert "the noise mask lets 50.0 % of the picture change" in server.text()


def test_cores_inpainting_nodes_feed_the_sampler(client: Client, work: Path) -> None:
    inputs = dict(pixels=["31", 0], vae=["30", 0], mask=["35", 0], grow_mask_by=0)
    prompt = with_node(masked_prompt(96, 64), "37", "VAEEncodeForInpaint", **inputs)
    succeed(client, keep_tensor(changed(prompt, SAMPLE, latent=["37", 0]), ["37", 0], "given"))
    moved = (kept_tensor(work, "sampled")["samples"] - kept_tensor(work, "given")["samples"]).abs()
    assert moved[..., 6:].max() < 1e-4 and moved[..., :6].mean() > 0.1


def test_denoise_starts_from_cores_latent(client: Client, work: Path) -> None:
    prompt = changed(masked_prompt(96, 64), SAMPLE, latent=["32", 0])
    moved = []
    for strength in (0.05, 1.0):
        succeed(client, with_schedule(prompt, denoise=strength))
        given = kept_tensor(work, "given")["samples"]
        moved.append(float((kept_tensor(work, "sampled")["samples"] - given).norm()))
    assert moved[0] < moved[1] / 5


@pytest.mark.parametrize("kept_by", ["denoise", "mask"])
def test_a_latent_that_may_not_change_comes_back_at_once(client: Client, work: Path, kept_by: str) -> None:
    """denoise 0, and an empty mask."""
    prompt = (
        masked_prompt(80, 64, value=0.0)
        if kept_by == "mask"
        else with_schedule(masked_prompt(80, 64), denoise=0)
    )
    run = succeed(client, changed(prompt, SAMPLE, seed=91))
    sampled, given = kept_tensor(work, "sampled")["samples"], kept_tensor(work, "given")["samples"]
    assert torch.equal(sampled, given) and SAMPLE in run.executed


@pytest.mark.parametrize("connected", [False, True])
def test_nothing_to_start_from_is_said(client: Client, connected: bool) -> None:
    prompt = with_schedule(edit_prompt(), denoise=0.5)
    if connected:
        prompt = with_node(prompt, "21", "EmptySD3LatentImage", width=64, height=64, batch_size=1)
        prompt = changed(prompt, SAMPLE, latent=["21", 0])
    said = failure(client, prompt)
    assert (
        "denoise of FireRed Schedule is 0.5" in said and "Connect the latent of FireRed Encode Prompt" in said
    )
    assert ("the latent is empty" if connected else "no latent is connected") in said


def test_a_batch_of_masks_is_one_for_each_picture(client: Client, work: Path) -> None:
    prompt = with_node(masked_prompt(64, 64), "37", "RepeatLatentBatch", samples=["32", 0], amount=3)
    prompt = with_node(prompt, "38", "InvertMask", mask=["35", 0])
    prompt = with_node(prompt, "42", "MaskToImage", mask=["35", 0])
    prompt = with_node(prompt, "43", "MaskToImage", mask=["38", 0])
    prompt = with_node(prompt, "44", "ImageBatch", image1=["42", 0], image2=["43", 0])
    prompt = with_node(prompt, "39", "ImageToMask", image=["44", 0], channel="red")
    prompt = with_node(prompt, "41", "SetLatentNoiseMask", samples=["37", 0], mask=["39", 0])
    succeed(client, changed(prompt, SAMPLE, latent=["41", 0]))
    moved = (kept_tensor(work, "sampled")["samples"] - kept_tensor(work, "given")["samples"]).abs()
    left, right = moved[..., :4].mean(dim=(1, 2, 3, 4)), moved[..., 4:].mean(dim=(1, 2, 3, 4))
    assert (left > 0.1).tolist() == [True, False, True] and (right > 0.1).tolist() == [False, True, False]


# Bad masks


@pytest.mark.parametrize("size", [(64, 96), (8, 12), (7, 13), (500, 20), (1, 1)])
@pytest.mark.parametrize("form", [2, 3, 4, 5])
def test_masks_of_other_sizes_are_stretched(size: tuple[int, int], form: int) -> None:
    mask = torch.full(size, 0.5)[(None,) * (form - 2)]
    given = read_latent({"samples": picture(2, 8, 12), "noise_mask": mask})
    assert given.mask is not None and given.mask.shape == (2, 1, 1, 8, 12)
    assert torch.allclose(given.mask, torch.tensor(0.5))


def test_a_mask_beyond_its_range_is_cut_to_it() -> None:
    given = read_latent({"samples": picture(), "noise_mask": torch.tensor([[-3.0, 3.0]])})
    assert given.mask is not None and given.mask.min() == 0 and given.mask.max() == 1


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ("mask", "is 'mask', which is no mask"),
        (torch.zeros(3), "has shape \\(3,\\)"),
        (torch.zeros(0, 4, 4), "has shape \\(0, 4, 4\\)"),
        (torch.full((4, 4), float("nan")), "holds NaN"),
    ],
)
def test_what_is_no_mask_is_refused(mask: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"noise_mask {said}"):
        read_latent({"samples": picture(), "noise_mask": mask})


def test_a_broken_picture_is_not_started_from(tiny: Checkpoint) -> None:
    with pytest.raises(NonFiniteError):
        plan(tiny, **masked(samples=picture(2) * float("nan")))


def test_a_mask_of_a_picture_of_native_size_stays_in_its_place() -> None:
    """The latents are larger than the picture; core would stretch the mask over all of them."""
    width, height = 85, 50
    columns, rows = grid_size(width, height)
    latent = {
        "samples": picture(1, rows // 8, columns // 8),
    }
    mask = torch.zeros(1, height, width)
    mask[..., :40] = 1
    given = read_latent(latent | {"noise_mask": mask, "native_size": (width, height)})
    assert given.mask is not None and given.mask[..., :5].eq(1).all() and given.mask[..., 5:].eq(0).all()


# Soft edges


def test_a_grown_and_feathered_mask_falls_from_one_to_zero() -> None:
    mask = torch.zeros(1, 1, 60, 80)
    mask[..., 20:30, 30:40] = 1
    for grow, feather in ((0, 0), (3, 0), (0, 7), (4, 10)):
        soft = softened(mask, grow, feather)
        line = soft[0, 0, 25, 39:]
        assert line[: grow + 1].eq(1).all() and line[grow + feather + 1 :].eq(0).all()
        assert (line.diff() <= 0).all() and line.gt(0).sum() >= grow + 1 + feather // 2 * 2 - 1
    assert softened(read_mask(torch.ones(5, 5), "mask"), 900, 900).eq(1).all()
