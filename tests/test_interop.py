"""Core's nodes and ours feed each other, on a real server."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from core_vae import CORE_VAE
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

from launcher.client import Client


def with_core_vae() -> dict:
    return with_node(edit_prompt(), "30", "VAELoader", vae_name=CORE_VAE)


def with_photo_of(prompt: dict, node: str, width: int, height: int) -> dict:
    """The photo at that size."""
    inputs = dict(image=[PHOTO, 0], upscale_method="area", width=width, height=height, crop="disabled")
    return with_node(prompt, node, "ImageScale", **inputs)


def test_cores_vae_decodes_our_latent(client: Client, work: Path) -> None:
    prompt = with_node(with_core_vae(), "31", "VAEDecode", samples=[SAMPLE, 0], vae=["30", 0])
    prompt = keep_tensor(keep_tensor(prompt, ["31", 0], "by_core"), [DECODE, 0], "by_us")
    succeed(client, prompt)
    by_core, by_us = kept_tensor(work, "by_core"), kept_tensor(work, "by_us")
    assert by_core.shape == by_us.shape == (1, 64, 64, 3)
    assert torch.allclose(by_core, by_us, atol=1e-4)


def test_we_decode_cores_latent(client: Client, work: Path) -> None:
    prompt = with_node(with_core_vae(), "31", "VAEEncode", pixels=["32", 0], vae=["30", 0])
    prompt = with_photo_of(prompt, "32", 96, 64)
    prompt = with_node(prompt, "33", "VAEDecode", samples=["31", 0], vae=["30", 0])
    prompt = changed(prompt, DECODE, latent=["31", 0])
    succeed(client, keep_tensor(keep_tensor(prompt, ["33", 0], "by_core"), [DECODE, 0], "by_us"))
    by_us = kept_tensor(work, "by_us")
    assert by_us.shape == (1, 64, 96, 3)
    assert torch.allclose(kept_tensor(work, "by_core"), by_us, atol=1e-4)


def test_a_core_latent_gives_our_sampler_its_size(client: Client, work: Path) -> None:
    prompt = with_node(with_core_vae(), "31", "VAEEncode", pixels=["32", 0], vae=["30", 0])
    prompt = with_photo_of(prompt, "32", 72, 104)
    succeed(client, keep_tensor(changed(prompt, SAMPLE, latent=["31", 0]), [SAMPLE, 0], "latent"))
    assert kept_tensor(work, "latent")["samples"].shape == (1, 16, 1, 13, 9)


@pytest.mark.parametrize("empty", ["EmptyLatentImage", "EmptySD3LatentImage"])
def test_cores_empty_latents_give_size_and_batch(client: Client, work: Path, empty: str) -> None:
    prompt = with_node(edit_prompt(), "31", empty, width=64, height=96, batch_size=2)
    succeed(client, keep_tensor(changed(prompt, SAMPLE, latent=["31", 0]), [SAMPLE, 0], "latent"))
    assert kept_tensor(work, "latent")["samples"].shape == (2, 16, 1, 12, 8)


def test_cores_text_encode_feeds_our_sampler(client: Client, work: Path) -> None:
    """Core's own encoder classes at their real width, its node for this model, and its VAE.

    Only the positive conditioning has a reference latent: core makes it 1 megapixel, which takes seconds.
    """
    prompt = with_node(edit_prompt("wide"), "30", "VAELoader", vae_name=CORE_VAE)
    prompt = with_node(prompt, "34", "ProbeCLIP")
    prompt = with_photo_of(prompt, "35", 65, 40)
    inputs = dict(clip=["34", 0], prompt="Add a red hat on the cat", vae=["30", 0], image1=["35", 0])
    prompt = with_node(prompt, "36", "TextEncodeQwenImageEditPlus", **inputs)
    inputs = dict(clip=["34", 0], prompt="", image1=["35", 0])
    prompt = with_node(prompt, "37", "TextEncodeQwenImageEditPlus", **inputs)
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
