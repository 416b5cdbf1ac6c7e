"""Sizes, noise, packing and normalising of latents.

Raw latents are what the VAE encodes to and what a ComfyUI LATENT holds: (B, 16, 1, h, w), h and w an eighth
of the pixels. The transformer works on normalised latents packed into tokens of 2x2 patches: (B, h/2 * w/2,
64).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .errors import InputError

VAE_SCALE = 8  # pixels per latent
PATCH = 2  # latents per token and side
TOKEN_PIXELS = VAE_SCALE * PATCH
LATENT_CHANNELS = 16
MEGAPIXEL = 1024 * 1024  # core and diffusers count 1024x1024 as one
SIZE_MULTIPLE = 32  # of sizes we choose ourselves, as diffusers does
MIN_SIZE, MAX_SIZE = 32, 4096  # pixels a side


def dimensions_for_area(area: float, ratio: float) -> tuple[int, int]:
    """Width and height of about `area` pixels at that width/height, in multiples of 32 (diffusers' rule)."""
    width = math.sqrt(area * ratio)
    height = width / ratio
    return round(width / SIZE_MULTIPLE) * SIZE_MULTIPLE, round(height / SIZE_MULTIPLE) * SIZE_MULTIPLE


def output_size(width: int, height: int, first_image: tuple[int, int] | None) -> tuple[int, int]:
    """The pixel size to sample at: what was asked for, the rest following the first image at about 1 MP.

    width, height: pixels, 0 for `follow`. first_image: its width and height, or None (then square).
    Returns multiples of 16, rounded down. Raises InputError for a size outside MIN_SIZE..MAX_SIZE.
    """
    image_width, image_height = first_image or (1, 1)
    ratio = image_width / image_height
    if width and height:
        size = width, height
    elif width:
        size = width, round(width / ratio)
    elif height:
        size = round(height * ratio), height
    else:
        size = dimensions_for_area(MEGAPIXEL, ratio)
    remedy = "Set width and height, or leave both 0 to follow the first image."
    require_size(*size, remedy)
    return size[0] // TOKEN_PIXELS * TOKEN_PIXELS, size[1] // TOKEN_PIXELS * TOKEN_PIXELS


def require_size(width: int, height: int, remedy: str) -> None:
    """Raise InputError for a size in pixels outside MIN_SIZE..MAX_SIZE a side."""
    if min(width, height) < MIN_SIZE or max(width, height) > MAX_SIZE:
        raise InputError(
            f"The output would be {width}x{height} pixels; each side must be {MIN_SIZE} to {MAX_SIZE}. "
            f"{remedy}"
        )


def make_noise(shape: tuple[int, int, int, int], seed: int) -> torch.Tensor:
    """Raw-shaped noise (B, 16, 1, h, w), FP32 on the CPU: what diffusers draws for the same seed, picture by
    picture.

    shape: (B, channels, h, w). Picture k of a batch is the generator's k-th draw.
    """
    batch, channels, height, width = shape
    generator = torch.Generator("cpu").manual_seed(seed)
    draws = [torch.randn((1, 1, channels, height, width), generator=generator) for _ in range(batch)]
    return torch.cat(draws).transpose(1, 2)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, 1, h, w) to tokens (B, h/2 * w/2, 4 * C); h and w must be even."""
    batch, channels, _, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Tokens (B, h/2 * w/2, 4 * C) to (B, C, 1, h, w); `height` and `width` are the latents', both even."""
    batch, _, channels = tokens.shape
    channels //= PATCH * PATCH
    patches = tokens.reshape(batch, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, 1, height, width)


def pad_to_patches(latents: torch.Tensor) -> torch.Tensor:
    """Make odd heights and widths even by repeating the far edge's opposite row or column, as core does."""
    *_, height, width = latents.shape
    if height % PATCH == 0 and width % PATCH == 0:
        return latents
    return F.pad(latents, (0, width % PATCH, 0, height % PATCH, 0, 0), mode="circular")


def normalize(raw: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Raw VAE latents to the transformer's scale; mean and std are (1, 16, 1, 1, 1)."""
    return (raw - mean.to(raw)) / std.to(raw)


def denormalize(latents: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """The transformer's latents to raw VAE latents; mean and std are (1, 16, 1, 1, 1)."""
    return latents * std.to(latents) + mean.to(latents)


def require_latents(samples: torch.Tensor, what: str) -> torch.Tensor:
    """Check raw latents from outside and return them as (B, 16, 1, h, w).

    (B, 16, h, w) is welcome too. Raises InputError naming the shape found and the one expected.
    """
    latents = samples.unsqueeze(2) if samples.ndim == 4 else samples
    if (
        latents.ndim != 5
        or latents.shape[1] != LATENT_CHANNELS
        or latents.shape[2] != 1
        or 0 in latents.shape
    ):
        raise InputError(
            f"{what} has shape {tuple(samples.shape)}; this model takes (batch, {LATENT_CHANNELS}, 1, "
            f"height/8, width/8). "
            "Use a latent of a Qwen-Image VAE."
        )
    return latents
