"""The VAE: its loader, pictures to reference latents, and latents to pictures, whole or in tiles."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from PIL import Image

from ..arithmetic import exact_fp32
from ..cards.kernels import is_out_of_memory
from ..cards.transfer import copy_to
from ..files.cache import DiskCache
from ..images import from_pixels, mirrored
from ..latents import (
    MEGAPIXEL,
    MIN_SIZE,
    TOKEN_PIXELS,
    VAE_SCALE,
    dimensions_for_area,
    grid_size,
    require_latents,
)
from ..limits import REFERENCE_MEGAPIXELS, TILING
from ..progress import OnProgress
from ..weights.components import Replica
from ..weights.estimates import SMALLEST_TILE, decode_bytes
from ..weights.filling import fill
from ..weights.room import require_room
from .config import config_errors
from .guard import STOP, Guard, require_finite_input

log = logging.getLogger("FireRed")

# Latents around a tile on which its pixels depend. The decoder's tiled part reaches 12.25 latents: six 3x3
# convolutions at each of the scales 1, 2, 4 and 8, one after each of three upsamplings, and a last one.
HALO = 13
TILES = (96, 64, SMALLEST_TILE)  # latents on a side, with the halo


@dataclass(frozen=True)
class VAE:
    """A loaded VAE. model: reduced to single frames, see keep_single_frames."""

    replica: Replica
    model: diffusers.AutoencoderKLQwenImage


def load_vae(replica: Replica, on_progress: OnProgress, cache: DiskCache | None) -> VAE:
    component = replica.spec.checkpoint.component("vae")
    config = component.config()
    with config_errors(component), init_empty_weights():
        model = diffusers.AutoencoderKLQwenImage.from_config(config)
    fill(model, replica, on_progress)
    keep_single_frames(model)
    return VAE(replica, model.eval())


class FrameConv(torch.nn.Module):
    """A causal 3-D convolution for a single frame. Past frames are zeros, so only its last time tap counts.

    Equal to the 3-D one on (B, C, 1, H, W), with a third of its weights and arithmetic.
    """

    def __init__(self, conv: QwenImageCausalConv3d):
        super().__init__()
        self.weight = torch.nn.Parameter(conv.weight[:, :, -1].clone(), requires_grad=False)
        self.bias = conv.bias
        self.padding = tuple(size // 2 for size in conv.kernel_size[1:])  # all of this model keep the size
        self.stride = conv.stride[1:]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x[:, :, 0], self.weight, self.bias, self.stride, self.padding).unsqueeze(2)


def keep_single_frames(vae: diffusers.AutoencoderKLQwenImage) -> None:
    """Reduce a loaded AutoencoderKLQwenImage to single frames: 2-D convolutions and none over time."""
    for module in list(vae.modules()):
        if hasattr(module, "time_conv"):
            del module.time_conv
        for name, child in list(module.named_children()):
            if isinstance(child, QwenImageCausalConv3d):
                setattr(module, name, FrameConv(child))


@torch.inference_mode()
@exact_fp32()
def encode_reference(
    vae: VAE,
    picture: Image.Image,
    megapixels: float | None,
    guard: str = STOP,
) -> torch.Tensor:
    """The picture's raw latents (1, 16, 1, h, w), FP32 on the VAE's device.

    megapixels: the picture is resized to about that many of 1024x1024, in multiples of 32 pixels. None: it
    keeps its size, and its edges are mirrored up to grid_size. guard: as in decode. Raises InputError for
    `megapixels` out of bounds, and NonFiniteError.
    """
    if megapixels is None:
        width, height = grid_size(*picture.size)
        picture = mirrored(picture, width, height)
    else:
        area = REFERENCE_MEGAPIXELS.require(megapixels) * MEGAPIXEL
        width, height = dimensions_for_area(area, picture.width / picture.height)
        width, height = max(width, MIN_SIZE), max(height, MIN_SIZE)
    pixels = VaeImageProcessor(vae_scale_factor=TOKEN_PIXELS).preprocess(picture, height, width).unsqueeze(2)

    def encode() -> torch.Tensor:
        inputs = pixels.to(vae.replica.device, vae.replica.spec.math)
        moments = vae.model.quant_conv(vae.model.encoder(inputs))
        return moments.chunk(2, dim=1)[0].float()  # the distribution's mode is its mean

    what = f"The reference latent of a {width}x{height} picture"
    return Guard(vae.replica, guard).run(encode, what, vae.model)


@torch.inference_mode()
@exact_fp32()
def decode(
    vae: VAE,
    samples: torch.Tensor,
    tiling: str = "auto",
    free: float = math.inf,
    guard: str = STOP,
) -> torch.Tensor:
    """Raw latents (B, 16, 1, h, w) or (B, 16, h, w) to an IMAGE (B, 8h, 8w, 3), 0 to 1, FP32 on the CPU.

    tiling: `whole`, `tiled`, or `auto`: whole if that fits into `free` bytes, else tiled. When memory runs
    out, smaller tiles are tried (not for `whole`). Tiles change the pixels only by float rounding.
    guard: what to do about NaN and infinity, one of guard.GUARDS. Raises InputError for latents of another
    shape, and NonFiniteError.
    """
    latents = require_latents(samples, "The latent to decode")
    if guard == STOP:
        require_finite_input(latents, "The latent to decode")
    *_, height, width = latents.shape
    tiles = _tile_sizes(vae.replica, height, width, tiling, free)
    one_guard = Guard(vae.replica, guard)  # so that `warn` logs once, not for each picture
    return torch.cat([from_pixels(_decode_one(vae, one_guard, raw, tiles)) for raw in latents.split(1)])


def decoding_bytes(replica: Replica, height: int, width: int, tiling: str) -> int:
    """The bytes that decoding needs at least beside the weights. height, width: of the latents."""
    return _decode_bytes(replica, height, width, _tile_sizes(replica, height, width, tiling, 0)[-1])


def _decode_bytes(replica: Replica, height: int, width: int, tile: int) -> int:
    spec = replica.spec
    return decode_bytes(spec.checkpoint, spec.math, height, width, tile, replica.fused)


def require_room_to_decode(replica: Replica, height: int, width: int, tiling: str, room: float) -> None:
    """Raise DoesNotFitError when weights and decoding do not fit into `room` bytes.

    height, width: of the latents.
    """
    how = "whole" if tiling == "whole" else "even in tiles"
    advice = "Set tiling to auto" if tiling == "whole" else "Choose another device for the VAE"
    require_room(
        replica,
        decoding_bytes(replica, height, width, tiling),
        room,
        f"Decoding {width * VAE_SCALE}x{height * VAE_SCALE} {how}",
        f"{advice}, or sample a smaller picture. What was sampled is kept.",
    )


def _tile_sizes(replica: Replica, height: int, width: int, tiling: str, free: float) -> list[int]:
    """The tile sizes to try, in latents, the largest first."""
    whole = max(height, width)
    if TILING.require(tiling) == "whole":
        return [whole]
    smaller = [tile for tile in TILES if tile < whole] or [whole]
    if tiling == "tiled":
        return smaller
    sizes = [whole, *smaller]
    costs = [_decode_bytes(replica, height, width, size) for size in sizes]
    fitting = [size for size, cost in zip(sizes, costs, strict=True) if cost <= free]
    return fitting or sizes[-1:]


def _decode_one(vae: VAE, guard: Guard, raw: torch.Tensor, tiles: list[int]) -> torch.Tensor:
    """One picture's pixels (1, 3, 1, 8h, 8w). Removes sizes that run out of memory from `tiles`."""
    model, replica = vae.model, vae.replica

    def run_attention() -> torch.Tensor:
        part = model.post_quant_conv(copy_to(raw, replica.device).to(replica.spec.math))
        return model.decoder.mid_block(model.decoder.conv_in(part))

    features = guard.run(run_attention, "The picture being decoded", model)
    while len(tiles) > 1:
        try:
            return _decode_features(model, guard, features, tiles[0])
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            tile, smaller, *_ = (size * VAE_SCALE for size in tiles)
            log.warning(
                "%s is out of memory for tiles of %d pixels: decoding in tiles of %d",
                replica.card,
                tile,
                smaller,
            )
        del tiles[0]
    return _decode_features(model, guard, features, tiles[0])


def _decode_features(
    vae: diffusers.AutoencoderKLQwenImage, guard: Guard, features: torch.Tensor, tile: int
) -> torch.Tensor:
    """Features (1, C, 1, h, w) to pixels (1, 3, 1, 8h, 8w) on the CPU, tile by tile.

    After the attention there are only convolutions and norms of single pixels, so a tile with its halo gives
    the same pixels as the whole.
    """
    *_, height, width = features.shape
    pixels = torch.empty(1, 3, 1, height * VAE_SCALE, width * VAE_SCALE)
    for rows, needed_rows in _spans(height, tile):
        for columns, needed_columns in _spans(width, tile):
            upsample = functools.partial(_upsample, vae.decoder, features[..., needed_rows, needed_columns])
            part = guard.run(upsample, "The decoded picture", vae)
            inner = part[..., _inside(rows, needed_rows), _inside(columns, needed_columns)]
            pixels[..., _in_pixels(rows), _in_pixels(columns)] = inner.clamp(-1, 1).cpu()
    return pixels


def _upsample(decoder: Any, features: torch.Tensor) -> torch.Tensor:
    """The decoder's layers after its attention: (1, C, 1, h, w) to pixels (1, 3, 1, 8h, 8w) in FP32."""
    for block in decoder.up_blocks:
        features = block(features)
    return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(features))).float()


def _spans(length: int, tile: int) -> Iterator[tuple[slice, slice]]:
    """Cut a side of `length` latents into spans. Yields each, and the same with its halo: about `tile`."""
    count = 1 if length <= tile else math.ceil((length - 2 * HALO) / (tile - 2 * HALO))
    edges = [HALO + round(number * (length - 2 * HALO) / count) for number in range(1, count)]
    for start, end in itertools.pairwise([0, *edges, length]):
        yield slice(start, end), slice(max(start - HALO, 0), min(end + HALO, length))


def _inside(span: slice, needed: slice) -> slice:
    return _in_pixels(slice(span.start - needed.start, span.stop - needed.start))


def _in_pixels(latents: slice) -> slice:
    return slice(latents.start * VAE_SCALE, latents.stop * VAE_SCALE)
