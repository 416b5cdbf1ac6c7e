"""In FP32 on one device our results equal those of QwenImageEditPlusPipeline."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoint
import torch
from conftest import replica_for
from diffusers import AutoencoderKLQwenImage, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as reference
from engine.files.checkpoint import Checkpoint, open_checkpoint
from engine.latents import MEGAPIXEL, unpack
from engine.models import loading, vae
from engine.sampling import sampling
from engine.sampling.conditioning import NEGATIVE, POSITIVE, from_conditioning, to_conditioning
from PIL import Image

TOLERANCE = 1e-5
REFERENCE_MEGAPIXELS = 0.02  # the pipeline's fixed megapixel would take minutes on two cores
WIDE, TALL, SQUARE = (160, 64), (64, 144), (96, 96)
SEED, STEPS, PROMPT = 7, 3, "Add a red hat on the cat"


@dataclass(frozen=True)
class Edit:
    """The results of one edit that both implementations have."""

    embeds: torch.Tensor
    reference_latents: list[torch.Tensor]
    latents: torch.Tensor
    pixels: torch.Tensor


@pytest.fixture(scope="module", params=[False, True], ids=["index", "zero_cond_t"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("parity") / "checkpoint"
    return open_checkpoint(tiny_checkpoint.build(folder, zero_cond_t=request.param))


@pytest.fixture(scope="module")
def pipeline(checkpoint: Checkpoint) -> QwenImageEditPlusPipeline:
    return load_pipeline(checkpoint.folder)


def load_pipeline(folder: Path) -> QwenImageEditPlusPipeline:
    pipe = QwenImageEditPlusPipeline.from_pretrained(folder).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    # With transformers 5 the pipeline forgets mm_token_type_ids, and picture tokens silently get 1-D
    # positions (https://github.com/huggingface/diffusers/issues/14194). Its open fix passes these on.
    pipe.text_encoder.register_forward_pre_hook(add_token_types, with_kwargs=True)
    return pipe


def add_token_types(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    kwargs["mm_token_type_ids"] = (kwargs["input_ids"] == module.config.image_token_id).int()
    return args, kwargs


def pictures(count: int) -> list[Image.Image]:
    """Pictures of different shapes."""
    noise = np.random.default_rng(0)
    sizes = [(96, 160), (120, 80), (100, 100)][:count]
    return [
        Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)) for height, width in sizes
    ]


def run_ours(
    checkpoint: Checkpoint,
    images: list[Image.Image],
    size: tuple[int, int],
    cfg: float,
    megapixels: float,
    vae_checkpoint: Checkpoint | None = None,
) -> Edit:
    vae_checkpoint = vae_checkpoint or checkpoint
    encoder = loading.load(replica_for(checkpoint, "text_encoder"))
    autoencoder = loading.load(replica_for(vae_checkpoint, "vae"))
    transformer = loading.load(replica_for(checkpoint, "transformer"))
    references = [vae.encode_reference(autoencoder, image, megapixels) for image in images]
    embeds = {POSITIVE: encoder.encode(PROMPT, images), NEGATIVE: encoder.encode(" ", images)}
    statistics = vae_checkpoint.latent_statistics()
    conditionings = {
        branch: to_conditioning(encoded, references, images[0].size, statistics)
        for branch, encoded in embeds.items()
    }
    replica = replica_for(checkpoint, "transformer")
    run = sampling.prepare_run(
        replica, sampling.read_conditions(replica, conditionings),
        steps=STEPS, true_cfg_scale=cfg, width=size[0], height=size[1], seed=SEED,
    )  # fmt: skip
    latents = sampling.sample(transformer, run)
    return Edit(embeds[POSITIVE], references, latents, vae.decode(autoencoder, latents, "whole"))


def run_reference(
    pipe: QwenImageEditPlusPipeline,
    checkpoint: Checkpoint,
    images: list[Image.Image],
    size: tuple[int, int],
    cfg: float,
) -> Edit:
    """The results of the pipeline, taken where it computes them."""
    caught: dict[str, list[torch.Tensor]] = {"embeds": [], "references": []}
    statistics = checkpoint.latent_statistics()
    encode_vae_image, encode_prompt = pipe._encode_vae_image, pipe.encode_prompt

    def catch_reference(**kwargs: object) -> torch.Tensor:
        normalised = encode_vae_image(**kwargs)
        caught["references"].append(statistics.denormalize(normalised))
        return normalised

    def catch_embeds(**kwargs: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        encoded = encode_prompt(**kwargs)
        caught["embeds"].append(encoded[0])
        return encoded

    pipe._encode_vae_image, pipe.encode_prompt = catch_reference, catch_embeds
    width, height = size
    arguments = dict(
        image=images, prompt=PROMPT, negative_prompt=" ", true_cfg_scale=cfg, width=width, height=height,
        num_inference_steps=STEPS,
    )  # fmt: skip
    try:
        packed = pipe(**arguments, generator=torch.Generator().manual_seed(SEED), output_type="latent").images
    finally:
        pipe._encode_vae_image, pipe.encode_prompt = encode_vae_image, encode_prompt
    latents = statistics.denormalize(unpack(packed, height // 8, width // 8))
    with torch.inference_mode():
        pixels = pipe.vae.decode(latents).sample[:, :, 0].movedim(1, -1)
    return Edit(caught["embeds"][0], caught["references"], latents, pixels.add(1).div(2).clamp(0, 1))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("size", [WIDE, TALL, SQUARE], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_an_edit_equals_diffusers(
    pipeline: QwenImageEditPlusPipeline,
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    count: int,
    cfg: float,
) -> None:
    monkeypatch.setattr(reference, "VAE_IMAGE_SIZE", REFERENCE_MEGAPIXELS * MEGAPIXEL)
    ours = run_ours(checkpoint, pictures(count), size, cfg, REFERENCE_MEGAPIXELS)
    theirs = run_reference(pipeline, checkpoint, pictures(count), size, cfg)
    assert relative_error(ours.embeds, theirs.embeds) < TOLERANCE
    assert len(ours.reference_latents) == len(theirs.reference_latents) == count
    for our_latent, their_latent in zip(ours.reference_latents, theirs.reference_latents, strict=True):
        assert relative_error(our_latent, their_latent) < TOLERANCE
    assert relative_error(ours.latents, theirs.latents) < TOLERANCE
    assert float((ours.pixels - theirs.pixels).abs().max()) < TOLERANCE
    assert float(ours.pixels.std()) > 0.01  # a flat picture could be equal by chance


def test_a_vae_of_another_checkpoint_brings_its_own_statistics(
    tiny: Checkpoint, tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a pipeline that was given another VAE: its statistics scale what it encodes and decodes."""
    monkeypatch.setattr(reference, "VAE_IMAGE_SIZE", REFERENCE_MEGAPIXELS * MEGAPIXEL)
    file = tiny_copy / "vae" / "config.json"
    changed = {"latents_mean": [0.1 * n for n in range(16)], "latents_std": [1 + 0.2 * n for n in range(16)]}
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changed), encoding="utf-8")
    other, pipe = Checkpoint(tiny_copy), load_pipeline(tiny.folder)
    pipe.vae = AutoencoderKLQwenImage.from_pretrained(tiny_copy / "vae", torch_dtype=torch.float32)
    ours = run_ours(tiny, pictures(1), SQUARE, 4.0, REFERENCE_MEGAPIXELS, other)
    theirs = run_reference(pipe, other, pictures(1), SQUARE, 4.0)
    assert relative_error(ours.latents, theirs.latents) < TOLERANCE
    assert float((ours.pixels - theirs.pixels).abs().max()) < TOLERANCE
    with_its_own = run_ours(tiny, pictures(1), SQUARE, 4.0, REFERENCE_MEGAPIXELS)
    assert relative_error(with_its_own.latents, theirs.latents) > 0.01


def test_the_default_size_and_reference_equal_diffusers(tiny: Checkpoint) -> None:
    """At full size: the pipeline's reference of one megapixel and its output size for a picture."""
    (image,) = pictures(1)
    autoencoder = loading.load(replica_for(tiny, "vae"))
    latent = vae.encode_reference(autoencoder, image, 1.0)
    width, height = reference.calculate_dimensions(1024 * 1024, image.width / image.height)
    condition = from_conditioning(to_conditioning(torch.ones(1, 3, 128), [latent], image.size), POSITIVE, 128)
    plan = sampling.prepare_run(
        replica_for(tiny, "transformer"),
        {POSITIVE: condition},
        steps=1,
        true_cfg_scale=1.0,
        width=0,
        height=0,
        seed=0,
    )
    assert (
        (plan.width * 8, plan.height * 8) == (width, height) == (latent.shape[-1] * 8, latent.shape[-2] * 8)
    )
