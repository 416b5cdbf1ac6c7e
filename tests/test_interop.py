"""Core's nodes and ours feed each other, on a real server."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfyui import Client
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from prompts import (
    DECODE,
    PHOTO,
    SAMPLE,
    changed,
    edit_prompt,
    keep_tensor,
    kept_tensor,
    succeed,
    with_node,
)
from safetensors.torch import load_file, save_file

CORE_VAE = "qwen_image_vae.safetensors"


@pytest.fixture(scope="module")
def core_vae(work: Path) -> str:
    """The tiny VAE's weights in a single file with the names core knows."""
    tensors = load_file(work / "models/diffusers/tiny/vae/diffusion_pytorch_model.safetensors")
    folder = work / "models" / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({core_name(name): tensor.float() for name, tensor in tensors.items()}, folder / CORE_VAE)
    return CORE_VAE


def core_name(name: str) -> str:
    return CORE_NAMES[name]


def _core_names() -> dict[str, str]:
    """Core's name for every tensor of the VAE: diffusers' own conversion of every name core can have."""
    residual = [
        f"residual.{part}" for part in ("0.gamma", "2.weight", "2.bias", "3.gamma", "6.weight", "6.bias")
    ]
    others = [
        f"{part}.{kind}" for part in ("shortcut", "resample.1", "time_conv") for kind in ("weight", "bias")
    ]
    attention = ["norm.gamma", "to_qkv.weight", "to_qkv.bias", "proj.weight", "proj.bias"]
    candidates = [f"{part}.{kind}" for part in ("conv1", "conv2") for kind in ("weight", "bias")]
    for half, blocks in (("encoder", "downsamples"), ("decoder", "upsamples")):
        candidates += [f"{half}.conv1.{kind}" for kind in ("weight", "bias")]
        candidates += [f"{half}.head.{part}" for part in ("0.gamma", "2.weight", "2.bias")]
        candidates += [f"{half}.middle.{block}.{part}" for block in (0, 2) for part in residual]
        candidates += [f"{half}.middle.1.{part}" for part in attention]
        candidates += [
            f"{half}.{blocks}.{block}.{part}" for block in range(15) for part in (*residual, *others)
        ]
    return {new: old for old in candidates for new in convert_wan_vae_to_diffusers({old: None})}


CORE_NAMES = _core_names()


def with_core_vae(core_vae: str) -> dict:
    return with_node(edit_prompt(), "30", "VAELoader", vae_name=core_vae)


def with_photo_of(prompt: dict, node: str, width: int, height: int) -> dict:
    """The photo at that size."""
    inputs = dict(image=[PHOTO, 0], upscale_method="area", width=width, height=height, crop="disabled")
    return with_node(prompt, node, "ImageScale", **inputs)


def test_cores_vae_decodes_our_latent(client: Client, work: Path, core_vae: str) -> None:
    prompt = with_node(with_core_vae(core_vae), "31", "VAEDecode", samples=[SAMPLE, 0], vae=["30", 0])
    prompt = keep_tensor(keep_tensor(prompt, ["31", 0], "by_core"), [DECODE, 0], "by_us")
    succeed(client, prompt)
    by_core, by_us = kept_tensor(work, "by_core"), kept_tensor(work, "by_us")
    assert by_core.shape == by_us.shape == (1, 64, 64, 3)
    assert torch.allclose(by_core, by_us, atol=1e-4)


def test_we_decode_cores_latent(client: Client, work: Path, core_vae: str) -> None:
    prompt = with_node(with_core_vae(core_vae), "31", "VAEEncode", pixels=["32", 0], vae=["30", 0])
    prompt = with_photo_of(prompt, "32", 96, 64)
    prompt = with_node(prompt, "33", "VAEDecode", samples=["31", 0], vae=["30", 0])
    prompt = changed(prompt, DECODE, latent=["31", 0])
    succeed(client, keep_tensor(keep_tensor(prompt, ["33", 0], "by_core"), [DECODE, 0], "by_us"))
    by_us = kept_tensor(work, "by_us")
    assert by_us.shape == (1, 64, 96, 3)
    assert torch.allclose(kept_tensor(work, "by_core"), by_us, atol=1e-4)


def test_a_core_latent_gives_our_sampler_its_size(client: Client, work: Path, core_vae: str) -> None:
    prompt = with_node(with_core_vae(core_vae), "31", "VAEEncode", pixels=["32", 0], vae=["30", 0])
    prompt = with_photo_of(prompt, "32", 72, 104)
    succeed(client, keep_tensor(changed(prompt, SAMPLE, latent=["31", 0]), [SAMPLE, 0], "latent"))
    assert kept_tensor(work, "latent")["samples"].shape == (1, 16, 1, 13, 9)


@pytest.mark.parametrize("empty", ["EmptyLatentImage", "EmptySD3LatentImage"])
def test_cores_empty_latents_give_size_and_batch(client: Client, work: Path, empty: str) -> None:
    prompt = with_node(edit_prompt(), "31", empty, width=64, height=96, batch_size=2)
    succeed(client, keep_tensor(changed(prompt, SAMPLE, latent=["31", 0]), [SAMPLE, 0], "latent"))
    assert kept_tensor(work, "latent")["samples"].shape == (2, 16, 1, 12, 8)


def test_cores_text_encode_feeds_our_sampler(client: Client, work: Path, core_vae: str) -> None:
    """Core's own encoder classes at their real width, its node for this model, and its VAE."""
    prompt = with_node(edit_prompt("wide"), "30", "VAELoader", vae_name=core_vae)
    prompt = with_node(prompt, "34", "ProbeCLIP")
    prompt = with_photo_of(prompt, "35", 65, 40)
    for node, text in (("36", "Add a red hat on the cat"), ("37", "")):
        inputs = dict(clip=["34", 0], prompt=text, vae=["30", 0], image1=["35", 0])
        prompt = with_node(prompt, node, "TextEncodeQwenImageEditPlus", **inputs)
    prompt = changed(prompt, SAMPLE, positive=["36", 0], negative=["37", 0])
    run = succeed(client, keep_tensor(keep_tensor(prompt, ["36", 0], "core_positive"), [SAMPLE, 0], "latent"))
    assert "4" not in run.executed  # our own encoder had nothing to do
    ((embeds, extras),) = kept_tensor(work, "core_positive")
    assert embeds.shape[2] == 3584 and len(extras["reference_latents"]) == 1
    assert kept_tensor(work, "latent")["samples"].isfinite().all()


def test_our_conditioning_is_shaped_like_cores(client: Client, work: Path) -> None:
    succeed(client, keep_tensor(edit_prompt(), ["4", 1], "our_negative"))
    ((embeds, extras),) = kept_tensor(work, "our_negative")
    assert embeds.ndim == 3 and embeds.device.type == "cpu"
    (reference,) = extras["reference_latents"]
    assert reference.ndim == 5 and reference.shape[:3] == (1, 16, 1)
