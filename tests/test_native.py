"""With `size` native the output lies exactly on the first picture, and the paste node keeps its pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import replica_for
from engine.errors import InputError
from engine.files.checkpoint import Checkpoint
from engine.images import mirrored, pasted
from engine.latents import grid_size
from engine.models import loading, vae
from engine.sampling.conditioning import NEGATIVE, POSITIVE, to_conditioning
from engine.sampling.sampling import prepare_run, read_conditions, sample
from PIL import Image
from prompts import (
    DECODE,
    ENCODE,
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
from test_demo_model import DEMO, PHOTOS, models

from launcher.client import Client, Prompt

CROPPED, EDITED = "50", "51"


def native_prompt(width: int, height: int) -> Prompt:
    """The edit of a crop of the photo of that size, at its native size."""
    prompt = with_node(edit_prompt(), "49", "ImageScale", **scaled(width + 3, height + 5))
    prompt = with_node(prompt, CROPPED, "ImageCrop", image=["49", 0], width=width, height=height, x=3, y=5)
    prompt = changed(prompt, ENCODE, size="native", **{"images.image0": [CROPPED, 0]})
    prompt = changed(prompt, SAMPLE, width=0, height=0)
    return keep_tensor(keep_tensor(prompt, [SAMPLE, 0], "latent"), [DECODE, 0], "decoded")


def scaled(width: int, height: int) -> dict[str, Any]:
    return dict(image=[PHOTO, 0], upscale_method="area", width=width, height=height, crop="disabled")


@pytest.mark.parametrize(
    ("size", "grid"), [((64, 64), (64, 64)), ((65, 50), (80, 64)), ((47, 81), (48, 96)), ((9, 7), (32, 32))]
)
def test_the_output_has_the_pictures_size(
    client: Client, work: Path, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    assert grid_size(*size) == grid
    prompt = keep_tensor(native_prompt(*size), [ENCODE, 0], "positive")
    succeed(client, keep_tensor(prompt, [ENCODE, 2], "picture"))
    latent, ((_, extras),) = kept_tensor(work, "latent"), kept_tensor(work, "positive")
    shape = (1, 16, 1, grid[1] // 8, grid[0] // 8)
    assert latent["samples"].shape == extras["reference_latents"][0].shape == shape
    assert latent["native_size"] == size and kept_tensor(work, "decoded").shape == (1, size[1], size[0], 3)
    picture = kept_tensor(work, "picture")
    assert torch.equal(picture["samples"], extras["reference_latents"][0]) and picture["native_size"] == size


def test_a_picture_is_mirrored_up_to_the_grid_and_nothing_moves(tiny: Checkpoint) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 117, 3), dtype=np.uint8)
    canvas = np.asarray(mirrored(Image.fromarray(pixels), 128, 96))
    assert np.array_equal(canvas[:90, :117], pixels) and np.array_equal(canvas[90], canvas[88])
    assert np.array_equal(canvas[:90, 117:], pixels[:, -2:-13:-1])
    model = loading.load(replica_for(tiny, "vae"))
    whole = vae.encode_reference(model, Image.fromarray(canvas), 128 * 96 / 2**20)  # not resized
    assert whole.shape[-2:] == (12, 16)
    assert torch.equal(vae.encode_reference(model, Image.fromarray(pixels), None), whole)


def test_a_picture_of_another_size_keeps_to_reference_megapixels(client: Client, work: Path) -> None:
    prompt = with_node(native_prompt(65, 50), "52", "ImageScale", **scaled(200, 128))
    prompt = with_node(prompt, "53", "ImageScale", **scaled(65, 50))
    pictures = {"images.image1": ["52", 0], "images.image2": ["53", 0]}
    succeed(client, keep_tensor(changed(prompt, ENCODE, **pictures), [ENCODE, 0], "positive"))
    ((_, extras),) = kept_tensor(work, "positive")
    shapes = [tuple(latent.shape[-2:]) for latent in extras["reference_latents"]]
    assert shapes[0] == shapes[2] == (8, 10) and shapes[1][0] * shapes[1][1] * 64 < 0.02 * 2**20


CORE_NODES = {
    "LatentFromBatch": dict(batch_index=0, length=1),
    "RepeatLatentBatch": dict(amount=2),
    "LatentBatchSeedBehavior": dict(seed_behavior="fixed"),
}


@pytest.mark.parametrize("node", CORE_NODES)
@pytest.mark.parametrize("before", [True, False], ids=["before the sampler", "after it"])
def test_the_size_is_kept_through_cores_nodes(client: Client, work: Path, node: str, before: bool) -> None:
    source = [ENCODE, 2] if before else [SAMPLE, 0]
    prompt = with_node(native_prompt(65, 50), "54", node, samples=source, **CORE_NODES[node])
    succeed(client, changed(prompt, *([SAMPLE] if before else [DECODE]), latent=["54", 0]))
    assert kept_tensor(work, "decoded").shape[1:] == (50, 65, 3)


def test_a_latent_that_lost_its_size_or_changed_it_is_not_cut(client: Client, work: Path) -> None:
    for node, inputs, expected in (
        ("RebatchLatents", dict(latents=[SAMPLE, 0], batch_size=1), (64, 80)),
        ("LatentUpscaleBy", dict(samples=[SAMPLE, 0], upscale_method="bilinear", scale_by=1.5), (96, 120)),
    ):
        prompt = with_node(native_prompt(65, 50), "54", node, **inputs)
        succeed(client, changed(prompt, DECODE, latent=["54", 0]))
        assert kept_tensor(work, "decoded").shape[1:3] == expected


def test_a_size_that_was_asked_for_is_not_cut(client: Client, work: Path) -> None:
    succeed(client, changed(native_prompt(65, 50), SAMPLE, width=96))
    assert kept_tensor(work, "decoded").shape[2] == 96 and "native_size" not in kept_tensor(work, "latent")


def test_without_a_vae_the_latent_is_empty_and_has_the_size(client: Client, work: Path) -> None:
    prompt = changed(native_prompt(65, 50), ENCODE, vae=None)
    succeed(client, keep_tensor(changed(prompt, SAMPLE, latent=[ENCODE, 2]), [ENCODE, 2], "empty"))
    assert kept_tensor(work, "empty")["samples"].shape == (1, 16, 1, 8, 10)
    assert not kept_tensor(work, "empty")["samples"].any()
    assert kept_tensor(work, "decoded").shape == (1, 50, 65, 3)


def test_only_a_part_of_a_picture_of_odd_size_is_changed(client: Client, work: Path) -> None:
    """Native size, a mask by core, and the paste: outside of the mask it is the original, bit for bit."""
    prompt = with_node(native_prompt(93, 61), "60", "SolidMask", value=1.0, width=40, height=61)
    prompt = with_node(prompt, "61", "SolidMask", value=0.0, width=93, height=61)
    inputs = dict(destination=["61", 0], source=["60", 0], x=0, y=0, operation="add")
    prompt = with_node(prompt, "62", "MaskComposite", **inputs)
    prompt = with_node(prompt, "63", "SetLatentNoiseMask", samples=[ENCODE, 2], mask=["62", 0])
    prompt = changed(prompt, SAMPLE, latent=["63", 0])
    inputs = dict(edited=[DECODE, 0], original=[CROPPED, 0], mask=["62", 0], grow=4, feather=8)
    prompt = with_node(prompt, EDITED, "FireRedPasteBack", **inputs)
    prompt = keep_tensor(keep_tensor(prompt, [EDITED, 0], "edited"), [CROPPED, 0], "original")
    succeed(client, keep_tensor(prompt, [ENCODE, 2], "picture"))
    moved = (kept_tensor(work, "latent")["samples"] - kept_tensor(work, "picture")["samples"]).abs()
    assert moved[..., 5:].max() < 1e-4 and moved[..., :5].mean() > 0.1
    edited, original = kept_tensor(work, "edited"), kept_tensor(work, "original")
    assert torch.equal(edited[:, :, 52:], original[:, :, 52:])
    assert torch.equal(edited[:, :, :44], kept_tensor(work, "decoded")[:, :, :44])
    assert not torch.equal(edited[:, :, :44], original[:, :, :44])


def test_a_transparent_picture_stays_transparent(client: Client, work: Path) -> None:
    """Core's Load Image gives alpha as a mask, and JoinImageWithAlpha puts it into the picture."""
    prompt = with_node(native_prompt(65, 50), "64", "SolidMask", value=1.0, width=65, height=50)
    prompt = with_node(prompt, "65", "JoinImageWithAlpha", image=[CROPPED, 0], alpha=["64", 0])
    prompt = changed(prompt, ENCODE, **{"images.image0": ["65", 0]})
    prompt = with_node(prompt, EDITED, "FireRedPasteBack", edited=[DECODE, 0], original=["65", 0])
    succeed(client, keep_tensor(prompt, [EDITED, 0], "edited"))
    edited = kept_tensor(work, "edited")
    assert edited.shape == (1, 50, 65, 4) and edited[..., 3].eq(0).all()
    assert torch.equal(edited[..., :3], kept_tensor(work, "decoded"))


def test_crop_and_stitch_with_cores_nodes_alone(client: Client, work: Path) -> None:
    """A part of the photo is cut out, edited at its native size, and laid back in its place."""
    prompt = with_node(native_prompt(61, 45), "59", "ImageScale", **scaled(160, 120))
    prompt[CROPPED]["inputs"] |= {"image": ["59", 0], "x": 37, "y": 22}
    inputs = dict(destination=["59", 0], source=[DECODE, 0], x=37, y=22, resize_source=False)
    prompt = with_node(prompt, EDITED, "ImageCompositeMasked", **inputs)
    succeed(client, keep_tensor(keep_tensor(prompt, [EDITED, 0], "edited"), ["59", 0], "original"))
    edited, original = kept_tensor(work, "edited"), kept_tensor(work, "original")
    inside = torch.zeros(120, 160, dtype=torch.bool)
    inside[22:67, 37:98] = True
    assert torch.equal(edited[0, ~inside], original[0, ~inside])
    assert torch.equal(edited[:, 22:67, 37:98], kept_tensor(work, "decoded"))


@pytest.mark.parametrize("name", ["taxis", "chelsea"])
def test_the_built_in_model_moves_nothing_at_an_odd_size(name: str) -> None:
    """An edit that it does not know gives what the VAE gives back, in the same place and colours."""
    encoder, autoencoder, transformer = models().values()
    photo = Image.open(PHOTOS / f"{name}.jpg").convert("RGB").resize((413, 307)).crop((11, 7, 384, 290))
    assert photo.size == (373, 283)
    references = [vae.encode_reference(autoencoder, photo, None)]
    embeds = {POSITIVE: encoder.encode("Remove the chair", [photo]), NEGATIVE: encoder.encode(" ", [photo])}
    statistics = DEMO.latent_statistics()
    given = {
        branch: to_conditioning(each, references, photo.size, statistics, native=True)
        for branch, each in embeds.items()
    }
    conditions = read_conditions(transformer.replica, given)
    arguments = dict(steps=8, true_cfg_scale=4.0, width=0, height=0, seed=0)
    run = prepare_run(transformer.replica, conditions, **arguments)
    assert run.native_size == photo.size
    whole = [vae.decode(autoencoder, latents)[0] for latents in (sample(transformer, run), references[0])]
    edited, alone = (pixels[:283, :373] for pixels in whole)
    spectra = [torch.fft.fft2(pixels.mean(-1) - pixels.mean()) for pixels in (edited, alone)]
    cross = spectra[0] * spectra[1].conj()
    correlation = torch.fft.ifft2(cross / cross.abs().clamp_min(1e-12)).real
    assert int(correlation.argmax()) == 0 and correlation.max() > 0.5
    assert (edited - alone).mean((0, 1)).abs().max() * 255 < 1


# Bad pictures


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (
            "1,6000,8000,3",
            "The output would be 8000x6000 pixels; each side must be 32 to 4096. Scale the picture",
        ),
        ("1,3000,1,3", "Picture 1 is 1x3000: more than 16 times as long as wide. Crop it first."),
    ],
)
def test_pictures_that_cannot_keep_their_size(client: Client, shape: str, said: str) -> None:
    prompt = with_node(native_prompt(64, 64), "20", "ProbeImage", shape=shape, fill="0.5")
    assert said in failure(client, changed(prompt, ENCODE, **{"images.image0": ["20", 0]}), ENCODE)


def test_a_huge_picture_is_edited_at_a_megapixel(client: Client, work: Path) -> None:
    """Without the native size: as before."""
    prompt = with_node(native_prompt(64, 64), "20", "ProbeImage", shape="1,6000,8000,3", fill="0.5")
    prompt = changed(prompt, ENCODE, size="megapixels", **{"images.image0": ["20", 0]})
    succeed(client, changed(prompt, SAMPLE, width=64))
    assert kept_tensor(work, "decoded").shape == (1, 48, 64, 3)


# The paste


def image(channels: int, batch: int = 1, height: int = 24, width: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(channels + batch)
    return torch.rand(batch, height, width, channels, generator=generator)


@pytest.mark.parametrize("alpha", [None, 0.0, 0.4])
def test_the_original_keeps_its_alpha(alpha: float | None) -> None:
    edited, original = image(3), image(3)
    if alpha is not None:
        original = torch.cat([original, torch.full_like(original[..., :1], alpha)], dim=-1)
    mask = torch.zeros(1, 1, 24, 40)
    mask[..., :10] = 1
    result = pasted(edited, original, mask, 0, 0)
    assert result.shape == original.shape and torch.equal(result[..., 3:], original[..., 3:])
    assert torch.equal(result[:, :, :10, :3], edited[:, :, :10])
    assert torch.equal(result[:, :, 10:], original[:, :, 10:])


@pytest.mark.parametrize("value", [0.0, 1.0, None])
def test_empty_and_full_masks(value: float | None) -> None:
    edited, original = image(3), image(4)
    mask = None if value is None else torch.full((1, 1, 24, 40), value)
    result = pasted(edited, original, mask, 5, 9)
    assert torch.equal(result[..., :3], edited if value != 0 else original[..., :3])


def test_batches_and_other_sizes_are_matched() -> None:
    edited, original, masks = image(3, 2, 48, 80), image(1, 1), torch.zeros(3, 1, 12, 20)
    masks[1] = 1
    result = pasted(edited, original, masks, 0, 0)
    assert result.shape == (3, 24, 40, 3)
    assert torch.equal(result[0], original[0].expand(-1, -1, 3)) and torch.equal(result[0], result[2])
    assert (result[1] - edited[1].unfold(0, 2, 2).unfold(1, 2, 2).mean((-1, -2))).abs().mean() < 0.1


def test_nan_outside_of_the_mask_does_not_come_through() -> None:
    edited = torch.full((1, 24, 40, 3), float("nan"))
    assert torch.equal(pasted(edited, image(3), torch.zeros(1, 1, 24, 40), 3, 3), image(3))


@pytest.mark.parametrize("shape", [(24, 40), (1, 24, 40, 2), (1, 0, 40, 3), (1, 1, 24, 40, 3)])
def test_what_is_no_picture_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="original has shape"):
        pasted(image(3), torch.zeros(shape), None, 0, 0)
