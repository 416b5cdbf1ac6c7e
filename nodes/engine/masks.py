"""Masks: which part of a picture may change. 1 is to change, 0 to keep, as in ComfyUI's MASK."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .errors import InputError
from .limits import Whole, shown

GROW, FEATHER = (Whole(name, 0, 1024) for name in ("grow", "feather"))  # pixels


def read_mask(value: Any, what: str) -> torch.Tensor:
    """A mask of any form that ComfyUI knows, (..., H, W), as (N, 1, H, W) FP32 on the CPU, 0 to 1.

    what: its name for errors. Raises InputError for anything but a mask of finite numbers.
    """
    plain = isinstance(value, torch.Tensor) and not value.is_nested and value.layout is torch.strided
    if not plain or value.is_complex():
        raise InputError(
            f"{what} is {shown(value)}, which is no mask. Connect the output of a node that makes masks."
        )
    if value.ndim < 2 or 0 in value.shape:
        raise InputError(f"{what} has shape {tuple(value.shape)}; a mask is (batch, height, width).")
    mask = value.reshape(-1, 1, *value.shape[-2:]).to("cpu", torch.float32)
    if not bool(mask.isfinite().all()):
        raise InputError(f"{what} holds NaN or infinite values. Check the node that made it.")
    return mask.clamp(0, 1)


def is_all_ones(mask: Any) -> bool:
    """Whether a mask is 1 everywhere. Such a mask changes nothing in core."""
    return isinstance(mask, torch.Tensor) and not mask.is_nested and bool(mask.numel() and (mask == 1).all())


def resized(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The mask (N, 1, H, W) at another size, as core's samplers resize masks."""
    if mask.shape[-2:] == (height, width):
        return mask
    return F.interpolate(mask, (height, width), mode="bilinear")


def for_batch(masks: torch.Tensor, batch: int) -> torch.Tensor:
    """A mask for each of so many pictures. Too few are repeated, too many are cut off, as core does."""
    return masks.repeat(-(-batch // len(masks)), *[1] * (masks.ndim - 1))[:batch]


def softened(mask: torch.Tensor, grow: int, feather: int) -> torch.Tensor:
    """The mask (N, 1, H, W), grown by `grow` pixels, and then falling to 0 within `feather` more.

    Where it was 1 it stays 1. Farther away than both together it is 0.
    """
    inner = feather // 2
    widened = _windowed(F.max_pool2d, mask, grow + feather - inner)
    return _windowed(F.avg_pool2d, widened, inner)


def _windowed(pool: Any, mask: torch.Tensor, reach: int) -> torch.Tensor:
    """The largest or mean value within `reach` pixels on each side, first along rows, then along columns."""
    if not reach:
        return mask
    across = F.pad(mask, (reach, reach, 0, 0), mode="replicate")
    across = pool(across, (1, 2 * reach + 1), 1)
    return pool(F.pad(across, (0, 0, reach, reach), mode="replicate"), (2 * reach + 1, 1), 1)
