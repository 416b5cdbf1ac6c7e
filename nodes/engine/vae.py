"""Pictures to reference latents and latents to pictures, one frame at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from .components import ComponentSpec
from .guard import require_finite, require_finite_input
from .images import from_pixels
from .latents import MEGAPIXEL, MIN_SIZE, TOKEN_PIXELS, VAE_SCALE, dimensions_for_area, require_latents
from .transfer import cross

log = logging.getLogger(__name__)

TILE = 64  # latents a side: 512 pixels
TILE_OVERLAP = 16  # latents over which neighbouring tiles fade into each other


@torch.inference_mode()
def encode_reference(
    vae: diffusers.AutoencoderKLQwenImage, spec: ComponentSpec, picture: Image.Image, megapixels: float
) -> torch.Tensor:
    """The picture's raw latents (1, 16, 1, h, w), FP32 on the VAE's device, in multiples of 32 pixels."""
    width, height = dimensions_for_area(megapixels * MEGAPIXEL, picture.width / picture.height)
    width, height = max(width, MIN_SIZE), max(height, MIN_SIZE)
    pixels = VaeImageProcessor(vae_scale_factor=TOKEN_PIXELS).preprocess(picture, height, width).unsqueeze(2)
    moments = vae.quant_conv(vae.encoder(pixels.to(spec.device, spec.math)))
    latents = moments.chunk(2, dim=1)[0].float()  # the distribution's mode is its mean
    return require_finite(latents, f"The reference latent of a {width}x{height} picture", spec)


@torch.inference_mode()
def decode(
    vae: diffusers.AutoencoderKLQwenImage, spec: ComponentSpec, samples: torch.Tensor, tiling: str = "auto"
) -> torch.Tensor:
    """Decode raw latents (B, 16, 1, h, w) or (B, 16, h, w) into an IMAGE (B, 8h, 8w, 3), 0 to 1, FP32 on the
    CPU.

    tiling: `whole`, `tiled`, or `auto`: whole, and tiled should the device's memory run out.
    Raises InputError for latents of another shape and NonFiniteError for NaN in or out.
    """
    latents = require_latents(samples, "The latent to decode")
    require_finite_input(latents, "The latent to decode")

    def decode_part(raw: torch.Tensor) -> torch.Tensor:
        part = cross(raw, spec.device).to(spec.math)
        pixels = vae.decoder(vae.post_quant_conv(part)).float()
        return require_finite(pixels, "The decoded picture", spec).clamp(-1, 1)

    return torch.cat([from_pixels(_decode_one(decode_part, raw, tiling, spec)) for raw in latents.split(1)])


def _decode_one(
    decode_part: Callable[[torch.Tensor], torch.Tensor], raw: torch.Tensor, tiling: str, spec: ComponentSpec
) -> torch.Tensor:
    if tiling != "tiled":
        try:
            return decode_part(raw)
        except torch.OutOfMemoryError:
            if tiling == "whole":
                raise
        log.warning("FireRed: decoding whole does not fit on %s, decoding in tiles.", spec.card)
    return decode_tiled(decode_part, raw)


def decode_tiled(decode_part: Callable[[torch.Tensor], torch.Tensor], raw: torch.Tensor) -> torch.Tensor:
    """Decode raw latents (1, 16, 1, h, w) in tiles that fade into each other: (1, 3, 1, 8h, 8w), CPU."""
    *_, height, width = raw.shape
    pixels = torch.zeros(1, 3, 1, height * VAE_SCALE, width * VAE_SCALE)
    weights = torch.zeros(height * VAE_SCALE, width * VAE_SCALE)
    for top in _tile_starts(height):
        for left in _tile_starts(width):
            tile = decode_part(raw[..., top : top + TILE, left : left + TILE]).cpu()
            rows = slice(top * VAE_SCALE, top * VAE_SCALE + tile.shape[-2])
            columns = slice(left * VAE_SCALE, left * VAE_SCALE + tile.shape[-1])
            weight = _fade(tile.shape[-2])[:, None] * _fade(tile.shape[-1])
            pixels[..., rows, columns] += tile * weight
            weights[rows, columns] += weight
    return pixels / weights


def _tile_starts(length: int) -> Iterator[int]:
    """Where tiles of TILE latents start along a side, the last one flush with the end."""
    yield from range(0, max(length - TILE, 0), TILE - TILE_OVERLAP)
    yield max(length - TILE, 0)


def _fade(length: int) -> torch.Tensor:
    """Weights of a tile's pixels along a side: rising from its edges over the overlap, 1 in the middle."""
    distance = torch.minimum(torch.arange(1, length + 1), torch.arange(length, 0, -1))
    return (distance / (TILE_OVERLAP * VAE_SCALE)).clamp(max=1.0)
