"""The arithmetic of INT8 matrices in plain torch: rotation, rounding, and products in floating point.

Each block of 64 input channels is rotated by a normalised Hadamard matrix before rounding, on both sides of
the product, which leaves it unchanged: (x H) (W H)^T = x W^T. Heavy channels then share their weight with 63
others instead of setting everyone's scale (https://huggingface.co/papers/2404.00456).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

ROTATION = 64  # channels a block
LEVELS = 127  # symmetric: -127..127


@functools.cache
def hadamard(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The normalised Hadamard matrix (64, 64): symmetric, and its own inverse. Sylvester's construction."""
    matrix = torch.ones(1, 1)
    while len(matrix) < ROTATION:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / ROTATION**0.5).to(device, dtype)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotate blocks of 64 along the last dimension; twice gives x back. Other sizes are left as they are."""
    if x.shape[-1] % ROTATION:
        return x
    return (x.reshape(-1, ROTATION) @ hadamard(x.device, x.dtype)).reshape(x.shape)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (n, k) FP32 to INT8 (n, k) and FP32 scales (n, 1). NaN or infinity in a row makes its scale so."""
    scale = x.abs().amax(dim=1, keepdim=True) / LEVELS
    return (x / scale).nan_to_num(0.0).round().to(torch.int8), scale


def dequantize(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """INT8 (n, k) times FP32 scales (n, 1), rounded once to `dtype`, in one pass."""
    return torch.mul(weight, scale, out=torch.empty(weight.shape, dtype=dtype, device=weight.device))


def multiply_upcast(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x (..., k) times the transpose of a rotated INT8 weight (n, k), in x's dtype: weight-only."""
    upcast = dequantize(weight, scale, x.dtype)
    if x.numel() // x.shape[-1] < len(weight):  # rotate the smaller side
        return F.linear(rotate(x), upcast, bias)
    return F.linear(x, rotate(upcast), bias)


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate and quantise activations (m, k) to INT8 with FP32 scales (m, 1), in few passes of plain torch.

    Adding 1.5 * 2**23 rounds an FP32 number of this size to an integer and leaves it in the low bits.
    """
    rotated = rotate(x.float())
    lowest, highest = rotated.aminmax(dim=1, keepdim=True)  # one read, and NaN comes through
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
