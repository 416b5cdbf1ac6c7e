"""The arithmetic of INT8 matrices in plain torch: rotation, rounding, and products in floating point.

Before rounding, a normalised Hadamard matrix H rotates each block of 64 input channels on both sides of the
product. The product stays the same: (x H) (W H)^T = x W^T. The rotation spreads a heavy channel over 64
channels, so it no longer sets the scale of all (https://huggingface.co/papers/2404.00456).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

ROTATION = 64  # channels per block
LEVELS = 127  # symmetric: -127..127


@functools.cache
def hadamard(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The normalised Hadamard matrix (64, 64) by Sylvester's construction. It is its own inverse."""
    matrix = torch.ones(1, 1)
    while len(matrix) < ROTATION:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / ROTATION**0.5).to(device, dtype)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotate blocks of 64 along the last dimension; a second rotation undoes it. Other sizes stay as is."""
    if x.shape[-1] % ROTATION:
        return x
    return (x.reshape(-1, ROTATION) @ hadamard(x.device, x.dtype)).reshape(x.shape)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (n, k) FP32 to INT8 (n, k) and FP32 scales (n, 1). NaN or infinity goes into the row's scale."""
    scale = x.abs().amax(dim=1, keepdim=True) / LEVELS
    return (x / scale).nan_to_num(0.0).round().to(torch.int8), scale


def dequantize(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """INT8 (n, k) times FP32 scales (n, 1), rounded once, to `dtype`."""
    return torch.mul(weight, scale, out=torch.empty(weight.shape, dtype=dtype, device=weight.device))


def multiply_upcast(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x (..., k) times the transpose of a rotated INT8 weight (n, k), computed in x's dtype: (..., n)."""
    upcast = dequantize(weight, scale, x.dtype)
    if x.numel() // x.shape[-1] < len(weight):  # rotate the smaller side
        return F.linear(rotate(x), upcast, bias)
    return F.linear(x, rotate(upcast), bias)


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate and quantise activations (m, k) to INT8 with FP32 scales (m, 1), in few passes.

    The sum of such a small FP32 number and 1.5 * 2**23 has the number, rounded, in its low bits.
    """
    rotated = rotate(x.float())
    lowest, highest = rotated.aminmax(dim=1, keepdim=True)  # one read; keeps NaN
    limit = torch.maximum(-lowest, highest)
    magic = torch.full((), 12582912.0, device=x.device)
    bits = torch.addcmul(magic, rotated, LEVELS / limit).view(torch.int32)
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
