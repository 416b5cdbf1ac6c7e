"""The arithmetic of INT8 matrices in torch: rotation, rounding, and products in floating point.

Before rounding, blocks of input channels are rotated on both sides of the product (see files/rotations.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...cuda.rows import row_kernels
from ...files.rotations import OURS, Rotation, rotated

LEVELS = 127  # symmetric: -127..127


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (n, k) FP32 to INT8 (n, k) and FP32 scales (n, 1). NaN or infinity goes into the row's scale."""
    scale = x.abs().amax(dim=1, keepdim=True) / LEVELS
    return (x / scale).nan_to_num(0.0).round().to(torch.int8), scale


def dequantize(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """INT8 (n, k) times FP32 scales (n, 1), rounded once, to `dtype`."""
    return torch.mul(weight, scale, out=torch.empty(weight.shape, dtype=dtype, device=weight.device))


def multiply_upcast(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    rotation: Rotation | None = OURS,
) -> torch.Tensor:
    """x (..., k) times the transpose of a rotated INT8 weight (n, k), computed in x's dtype: (..., n)."""
    kernels = row_kernels(x.device, x.dtype) if rotation == OURS else None
    if kernels is not None and kernels.take(weight.shape[1]):
        return F.linear(x, kernels.upcast(weight, scale, rotates=True), bias)
    upcast = dequantize(weight, scale, x.dtype)
    if x.numel() // x.shape[-1] < len(weight):  # rotate the smaller side
        return F.linear(rotated(x, rotation), upcast, bias)
    return F.linear(x, rotated(upcast, rotation), bias)


def quantize_tokens(x: torch.Tensor, rotation: Rotation | None = OURS) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate and quantise activations (m, k) to INT8 with FP32 scales (m, 1), in few passes.

    The sum of such a small FP32 number and 1.5 * 2**23 has the number, rounded, in its low bits.
    """
    x = rotated(x.float(), rotation)
    lowest, highest = x.aminmax(dim=1, keepdim=True)  # one read; keeps NaN
    limit = torch.maximum(-lowest, highest)
    magic = torch.full((), 12582912.0, device=x.device)
    bits = torch.addcmul(magic, x, LEVELS / limit).view(torch.int32)
    return bits.to(torch.int8), limit / LEVELS


def rescale(
    product: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """INT32 products (m, n) times the tokens' (m, 1) and the rows' (n, 1) scales, plus the bias."""
    scaled = torch.mul(product, scale)
    if bias is None:
        return scaled.mul_(weight_scale.T).to(dtype)
    return torch.addcmul(bias.float(), scaled, weight_scale.T, out=scaled).to(dtype)
