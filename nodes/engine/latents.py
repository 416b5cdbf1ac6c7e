"""Sizes, noise, packing and normalising of latents.

Raw latents are the VAE's output and what a ComfyUI LATENT holds: (B, 16, 1, h, w), with h and w an eighth of
the pixels. The transformer takes normalised latents, packed into tokens of 2x2 patches:
(B, h/2 * w/2, 64).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .errors import InputError
from .limits import Real, Whole, as_number, shown
from .masks import for_batch, is_all_ones, read_mask, resized

VAE_SCALE = 8  # pixels per latent
PATCH = 2  # latents on each side of a token
TOKEN_PIXELS = VAE_SCALE * PATCH
LATENT_CHANNELS = 16
MEGAPIXEL = 1024 * 1024  # as core and diffusers count
SIZE_MULTIPLE = 32  # pixels; diffusers' rule for sizes that the user did not set
MIN_SIZE, MAX_SIZE = 32, 4096  # pixels a side
WIDTH, HEIGHT = (Whole(side, 0, MAX_SIZE) for side in ("width", "height"))  # 0 follows the first image
# The values of a latent's batch_index that core's LatentFromBatch can set. Each costs a draw.
DRAW = Whole("A number in the latent's batch_index", 0, 16_383)
DOWNSCALE = Real("The latent's downscale_ratio_spacial", 1.0, 128.0)
EMPTY_LATENT_CHANNELS = 4
MAX_SIDE = 1e6  # pixels of a picture; what is beyond is no size
# The key of a LATENT and of a CONDITIONING for the first picture's width and height in pixels, where the
# output shall have exactly that size. The latents are grid_size of it; the decode cuts off what is too much.
NATIVE_SIZE = "native_size"
# Keys that describe a given LATENT, but not the latents that are sampled from it.
REPORT = "firered_report"  # what happened in the run that made it
NOT_KEPT = ("samples", "downscale_ratio_spacial", "downscale_ratio_temporal", REPORT)


def dimensions_for_area(area: float, ratio: float) -> tuple[int, int]:
    """Width and height of about `area` pixels at that width/height, in multiples of 32 (diffusers' rule)."""
    width = math.sqrt(area * ratio)
    height = width / ratio
    return round(width / SIZE_MULTIPLE) * SIZE_MULTIPLE, round(height / SIZE_MULTIPLE) * SIZE_MULTIPLE


def output_size(width: int, height: int, first_image: tuple[int, int] | None) -> tuple[int, int]:
    """The size in pixels to sample at. A side of 0 follows the first image's shape.

    width, height: pixels; both 0 give about 1 MP. first_image: its width and height; None means square.
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


def grid_size(width: int, height: int) -> tuple[int, int]:
    """The width and height in pixels of the smallest grid of whole tokens that a picture fits into."""
    columns, rows = (max(MIN_SIZE, -(-side // TOKEN_PIXELS) * TOKEN_PIXELS) for side in (width, height))
    return columns, rows


def empty_latents(first_image: tuple[int, int], native: bool) -> torch.Tensor:
    """Zeros (1, 16, 1, h, w) of the size that an edit of this picture (width, height in pixels) has."""
    width, height = grid_size(*first_image) if native else output_size(0, 0, first_image)
    return torch.zeros(1, LATENT_CHANNELS, 1, height // VAE_SCALE, width // VAE_SCALE)


def read_size(size: Any) -> tuple[int, int] | None:
    """A width and height in pixels, or None if another pack uses this key differently."""
    if isinstance(size, list | tuple) and len(size) == 2:
        sides = [as_number(side) for side in size]
        if all(side is not None and 1 <= side <= MAX_SIDE for side in sides):
            return int(size[0]), int(size[1])
    return None


def native_size(latent: Mapping[str, Any], height: int, width: int) -> tuple[int, int] | None:
    """The native size of a LATENT with latents of that size, or None if there is none.

    Also None for latents that were resized or cut since: their native size is not known.
    """
    size = read_size(latent.get(NATIVE_SIZE))
    return size if size and grid_size(*size) == (width * VAE_SCALE, height * VAE_SCALE) else None


def require_size(width: int, height: int, remedy: str) -> None:
    """Raise InputError for a size in pixels outside MIN_SIZE..MAX_SIZE a side."""
    if min(width, height) < MIN_SIZE or max(width, height) > MAX_SIZE:
        raise InputError(
            f"The output would be {width}x{height} pixels; each side must be {MIN_SIZE} to {MAX_SIZE}. "
            f"{remedy}"
        )


@dataclass(frozen=True)
class LatentInput:
    """What sampling uses of a LATENT.

    samples: raw latents (B, 16, 1, h, w) or (B, 16, h, w); they set the size and the batch.
    draws: for each picture, the number of the seed's draw that is its noise, from 0.
    mask: (B, 1, 1, h, w) FP32, 1 where the pictures may change; None for everywhere.
    """

    samples: torch.Tensor
    draws: tuple[int, ...]
    mask: torch.Tensor | None = None

    def is_kept(self, denoise: float) -> bool:
        """Whether sampling would give back the pictures as they are."""
        changes = denoise > 0 and (self.mask is None or bool(self.mask.any()))
        return not changes and bool(self.samples.any())


def read_latent(latent: Any) -> LatentInput:
    """Read a LATENT as core's KSampler does.

    It obeys batch_index and noise_mask, and takes the size of an empty latent of another model. Raises
    InputError for what it cannot obey.
    """
    given = latent_samples(latent, "The latent")
    samples = empty_as_qwen(given, latent.get("downscale_ratio_spacial"))
    mask = latent.get("noise_mask")
    if mask is not None and not is_all_ones(mask):
        mask = _noise_mask(latent, require_latents(samples, "The latent").shape)
    return LatentInput(samples, _draws(latent, given), mask if not is_all_ones(mask) else None)


def _noise_mask(latent: Mapping[str, Any], shape: Sequence[int]) -> torch.Tensor:
    """The LATENT's noise_mask for latents of that shape, one mask a picture: (B, 1, 1, h, w).

    Core stretches a mask over the latents. Where those are larger than the picture (its native size), the
    mask is first made larger by as much, so that it stays in its place.
    """
    batch, _, _, height, width = shape
    mask = read_mask(latent["noise_mask"], "The latent's noise_mask")
    if size := native_size(latent, height, width):
        right, below = width * VAE_SCALE - size[0], height * VAE_SCALE - size[1]
        mask = F.pad(resized(mask, size[1], size[0]), (0, right, 0, below), mode="replicate")
    return for_batch(resized(mask, height, width), batch).unsqueeze(2)


def latent_samples(latent: Any, what: str) -> torch.Tensor:
    """The tensor in a LATENT. Raises InputError for anything but a LATENT with one plain tensor."""
    if not isinstance(latent, Mapping):
        raise InputError(f"{what} is {shown(latent)}. Connect the output of a node that makes latents.")
    return require_tensor(latent.get("samples"), what)


def require_tensor(value: Any, what: str) -> torch.Tensor:
    """The value, a plain tensor of real numbers. Raises InputError for anything else."""
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{what} holds {shown(value)} where its numbers should be (a tensor).")
    if value.is_nested or value.layout is not torch.strided or value.is_complex():
        raise InputError(f"{what} is a nested, sparse or complex tensor; these nodes take plain ones.")
    return value


def kept_keys(latent: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a LATENT that also hold for the latents sampled from it. Core's KSampler keeps them too."""
    return {key: value for key, value in latent.items() if key not in NOT_KEPT}


def empty_as_qwen(samples: torch.Tensor, downscale: object = None) -> torch.Tensor:
    """Core's empty latents (zeros that only set a size) as zeros with this model's channels and scale.

    downscale: pixels per latent, if the latent says so. Without it, 4-channel latents (Empty Latent Image)
    have 8, and others are returned unchanged. Latents that are not empty are returned unchanged.
    """
    if samples.ndim not in (4, 5) or bool(samples.any()):
        return samples
    if downscale is None and samples.shape[1] != EMPTY_LATENT_CHANNELS:
        return samples
    scale = 1.0 if downscale is None else DOWNSCALE.require(downscale) / VAE_SCALE
    size = (round(side * scale) for side in samples.shape[-2:])
    return samples.new_zeros((samples.shape[0], LATENT_CHANNELS, *samples.shape[2:-2], *size))


def _draws(latent: Mapping[str, Any], samples: torch.Tensor) -> tuple[int, ...]:
    """The draw of each picture's noise, from the latent's batch_index (comfy.sample.prepare_noise's rule)."""
    batch = samples.shape[0] if samples.ndim else 0
    index = latent.get("batch_index")
    if index is None:
        return tuple(range(batch))
    listed = index.tolist() if hasattr(index, "tolist") else index
    if not isinstance(listed, Sequence) or isinstance(listed, str) or len(listed) != batch:
        raise InputError(
            f"The latent's batch_index is {shown(listed)}; it must list one number for each of its {batch} "
            "pictures. Check the node that made the latent."
        )
    return tuple(DRAW.require(number) for number in listed)


def draw_noise(size: tuple[int, int], seed: int, draws: Iterable[int]) -> Iterator[torch.Tensor]:
    """The noise of each draw, one after the other: (1, 16, 1, h, w) FP32 on the CPU.

    Draw k is the noise that diffusers' generator gives to picture k of a batch with that seed. size: height
    and width of the latents. draws: from 0, in any order; a step back starts over from the seed. Only one
    draw is in memory.
    """
    noise, drawn = torch.empty(0), 0
    generator = torch.Generator("cpu").manual_seed(seed)
    for number in draws:
        if number < drawn - 1:
            generator, drawn = generator.manual_seed(seed), 0
        while drawn <= number:
            noise = torch.randn((1, 1, LATENT_CHANNELS, *size), generator=generator)
            drawn += 1
        yield noise.transpose(1, 2)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, 1, h, w) to tokens (B, h/2 * w/2, 4 * C); h and w must be even."""
    batch, channels, _, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Tokens (B, h/2 * w/2, 4 * C) to latents (B, C, 1, h, w). height, width: of the latents, both even."""
    batch, _, channels = tokens.shape
    channels //= PATCH * PATCH
    patches = tokens.reshape(batch, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, 1, height, width)


def pad_to_patches(latents: torch.Tensor) -> torch.Tensor:
    """Make odd heights and widths even as core does: repeat the first row or column after the last."""
    *_, height, width = latents.shape
    if height % PATCH == 0 and width % PATCH == 0:
        return latents
    return F.pad(latents, (0, width % PATCH, 0, height % PATCH, 0, 0), mode="circular")


def pack_raw(raw: torch.Tensor, statistics: LatentStatistics) -> torch.Tensor:
    """Raw latents (B, 16, 1, h, w) as the transformer takes them: (B, tokens, 64)."""
    return pack(statistics.normalize(pad_to_patches(raw)))


class LatentStatistics(NamedTuple):
    """Mean and standard deviation of each channel of a VAE's raw latents: 16 numbers each."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalize(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw latents (B, 16, 1, h, w) to the transformer's scale."""
        mean, std = self._like(raw)
        return (raw - mean) / std

    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        """The transformer's latents (B, 16, 1, h, w) to raw ones."""
        mean, std = self._like(latents)
        return latents * std + mean

    def _like(self, latents: torch.Tensor) -> list[torch.Tensor]:
        return [torch.tensor(values).view(1, -1, 1, 1, 1).to(latents) for values in self]


# Source: the defaults of diffusers' AutoencoderKLQwenImage.
QWEN_STATISTICS = LatentStatistics(
    mean=(
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ),
    std=(
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ),
)  # fmt: skip


def require_latents(samples: torch.Tensor, what: str) -> torch.Tensor:
    """Raw latents (B, 16, 1, h, w) or (B, 16, h, w), checked and returned as (B, 16, 1, h, w).

    Raises InputError with the shape found and the shape expected.
    """
    require_tensor(samples, what)
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
