"""ComfyUI's images: check them, and convert them to PIL pictures and back."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .errors import InputError
from .limits import MAX_PICTURES, shown
from .masks import for_batch, resized, softened
from .notices import first_time

log = logging.getLogger("FireRed")

TRAINED_PICTURES = 3  # the model was trained on up to this many
MAX_ASPECT_RATIO = 16  # above it, the shorter side at 1 MP has fewer than 256 pixels


def to_pil(images: Iterable[torch.Tensor]) -> list[Image.Image]:
    """Every picture of the given IMAGE tensors, in order, as 8-bit RGB.

    images: each (B, H, W, C) or (H, W, C) with values 0 to 1. C is 1 (grey), 3, or 4: alpha is dropped, as in
    core. A batch counts as B pictures. Raises InputError with the number of the bad picture (from 1) and what
    is wrong with it, and for more than MAX_PICTURES.
    """
    images = list(images)
    require_picture_count(sum(len(image) if image.ndim == 4 else 1 for image in images), "pictures")
    pictures = [picture for image in images for picture in (image.unbind(0) if image.ndim == 4 else [image])]
    return [_picture(picture, number) for number, picture in enumerate(pictures, start=1)]


def require_picture_count(count: int, what: str) -> None:
    """Raise InputError for more than MAX_PICTURES. what: the counted things, for the message."""
    if count > MAX_PICTURES:
        raise InputError(
            f"There are {count} {what}; one edit takes up to {MAX_PICTURES}. A batch counts as several, and "
            "so do the frames of an animated file: take some of them with ImageFromBatch."
        )


def warn_of_many_pictures(count: int) -> None:
    """Log a warning when an edit starts from more pictures than the model was trained on."""
    if count > TRAINED_PICTURES and first_time("pictures", count):
        log.warning(
            "the edit starts from %d pictures; the model was trained on up to %d and may mix up more",
            count,
            TRAINED_PICTURES,
        )


def require_image(value: Any, name: str) -> torch.Tensor:
    """The IMAGE unchanged. name: the input's. Raises InputError for anything but a tensor."""
    if not isinstance(value, torch.Tensor):
        raise InputError(
            f"{name} is {shown(value)}, which is no picture. Connect the output of a node that makes "
            "pictures, such as Load Image."
        )
    return value


def _picture(image: torch.Tensor, number: int) -> Image.Image:
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4) or 0 in image.shape:
        raise InputError(
            f"Picture {number} has shape {tuple(image.shape)}; an image is (height, width, 1, 3 or 4 "
            f"channels)."
        )
    if not bool(image.isfinite().all()):
        raise InputError(f"Picture {number} holds NaN or infinite values. Check the node that made it.")
    height, width = image.shape[:2]
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise InputError(
            f"Picture {number} is {width}x{height}: more than {MAX_ASPECT_RATIO} times as long as wide. "
            f"Crop it first."
        )
    rgb = image[..., :3] if image.shape[-1] >= 3 else image.expand(height, width, 3)
    pixels = rgb.float().clamp(0, 1).mul(255).round().to(device="cpu", dtype=torch.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.numpy()))


def mirrored(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The picture on a larger canvas, in the upper left corner. The rest is its mirror image."""
    right, below = width - picture.width, height - picture.height
    return Image.fromarray(np.pad(np.asarray(picture), ((0, below), (0, right), (0, 0)), mode="reflect"))


def pasted(
    edited: torch.Tensor, original: torch.Tensor, masks: torch.Tensor | None, grow: int, feather: int
) -> torch.Tensor:
    """The edit laid over the original inside of a mask: an IMAGE of the original's size, with its alpha.

    edited, original: IMAGEs (B, H, W, 1, 3 or 4 channels). masks: (B, 1, H, W), 1 for the edit; None for
    everywhere. grow, feather: as in masks.softened. Of edited, original and masks, what there are fewer of is
    repeated. Where the mask is 0, the pixels are exactly the original's. Raises InputError for other shapes.
    """
    edited, below = _channels_first(edited, "edited"), _channels_first(original, "original")
    height, width = below.shape[-2:]
    batch = max(len(edited), len(below), 1 if masks is None else len(masks))
    if edited.shape[-2:] != below.shape[-2:]:
        edited = F.interpolate(edited, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    edited, below = for_batch(edited[:, :3], batch), for_batch(below, batch)
    color = below[:, :3].expand_as(edited)
    if masks is not None:
        weights = for_batch(softened(resized(masks, height, width), grow, feather), batch)
        edited = torch.where(weights > 0, torch.lerp(color, edited, weights), color)
    return torch.cat([edited, below[:, 3:]], dim=1).movedim(1, -1).contiguous()


def _channels_first(image: torch.Tensor, name: str) -> torch.Tensor:
    """An IMAGE as (B, 3 or 4, H, W) FP32 on the CPU. Raises InputError for anything else."""
    image = image if image.ndim != 3 else image[None]
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4) or 0 in image.shape:
        raise InputError(
            f"{name} has shape {tuple(image.shape)}; an image is (batch, height, width, 1, 3 or 4 channels)."
        )
    channels = image.to("cpu", torch.float32).movedim(-1, 1)
    return channels if channels.shape[1] > 1 else channels.expand(-1, 3, -1, -1)


def from_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Decoded pixels (B, 3, 1, H, W) in -1..1 as an IMAGE (B, H, W, 3) in 0..1, FP32 on the CPU."""
    return pixels[:, :, 0].movedim(1, -1).float().add(1).div(2).clamp(0, 1).cpu().contiguous()


def to_image(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """RGB pictures of one size as an IMAGE (B, H, W, 3), 0 to 1, FP32 on the CPU."""
    return torch.stack([torch.from_numpy(np.asarray(p, dtype=np.float32) / 255) for p in pictures])
