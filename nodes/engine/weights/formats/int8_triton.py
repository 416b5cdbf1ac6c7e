"""The steps before and after an INT8 product as Triton kernels. For compute capability 7.0 and later."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from ...files.rotations import OURS, Rotation
from .int8_math import LEVELS
from .int8_math import quantize_tokens as quantize_tokens_in_torch

ROWS = 16  # tokens per program
COLUMNS = 256  # channels per loop turn
RESCALE_ROWS, RESCALE_COLUMNS = 8, 512


@triton.jit
def _quantize_kernel(
    x, hadamard, tokens, scales, rows, width, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    column = tl.arange(0, COLUMNS)
    start = row.to(tl.int64)[:, None] * width
    side = tl.arange(0, BLOCK)
    rotation = tl.load(hadamard + side[:, None] * BLOCK + side[None, :])
    limit = tl.zeros([ROWS], dtype=tl.float32)
    poison = tl.zeros([ROWS], dtype=tl.float32)
    for first in range(0, width, COLUMNS):
        part = tl.load(x + start + first + column[None, :], mask=inside, other=0.0).to(tl.float32)
        part = tl.dot(tl.reshape(part, [ROWS * COLUMNS // BLOCK, BLOCK]), rotation)
        part = tl.reshape(part, [ROWS, COLUMNS])
        limit = tl.maximum(limit, tl.max(tl.abs(part), axis=1))
        poison += tl.sum(part * 0.0, axis=1)  # NaN if the row holds NaN or infinity, as max may skip them
    tl.store(scales + row, limit / LEVELS + poison, mask=row < rows)
    inverse = tl.where(limit > 0.0, LEVELS / limit, 0.0)
    for first in range(0, width, COLUMNS):
        part = tl.load(x + start + first + column[None, :], mask=inside, other=0.0).to(tl.float32)
        part = tl.dot(tl.reshape(part, [ROWS * COLUMNS // BLOCK, BLOCK]), rotation)
        part = tl.reshape(part, [ROWS, COLUMNS]) * inverse[:, None]
        tl.store(tokens + start + first + column[None, :], libdevice.rint(part).to(tl.int8), mask=inside)


@triton.jit
def _rescale_kernel(
    product, scales, weight_scales, bias, out, rows, width, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    scale = tl.load(scales + row, mask=row < rows, other=0.0)[:, None]
    weight_scale = tl.load(weight_scales + column, mask=column < width, other=0.0)[None, :]
    y = tl.load(product + place, mask=inside, other=0).to(tl.float32) * scale * weight_scale
    if HAS_BIAS:
        y += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


def quantize_tokens(x: torch.Tensor, rotation: Rotation | None = OURS) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate and quantise activations (m, k) to INT8 with FP32 scales (m, 1). k must be a multiple of 256.

    Cards with tensor cores rotate in TF32. Its error is an eighth of the error of rounding to INT8. The
    kernel knows our rotation; others run in torch.
    """
    if rotation != OURS:
        return quantize_tokens_in_torch(x, rotation)
    x = x.contiguous()
    rows, width = x.shape
    if width % COLUMNS:
        raise ValueError(f"{width} channels are no multiple of {COLUMNS}")
    tokens = torch.empty((rows, width), dtype=torch.int8, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    matrix = OURS.matrix(x.device, torch.float32)
    _quantize_kernel[(triton.cdiv(rows, ROWS),)](
        x, matrix, tokens, scales, rows, width, OURS.block, ROWS, COLUMNS, LEVELS
    )
    return tokens, scales


def rescale(
    product: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """INT32 products (m, n) times the tokens' (m, 1) and the rows' (n, 1) scales, plus the bias."""
    rows, width = product.shape
    out = torch.empty((rows, width), dtype=dtype, device=product.device)
    grid = (triton.cdiv(rows, RESCALE_ROWS), triton.cdiv(width, RESCALE_COLUMNS))
    _rescale_kernel[grid](
        product, scale, weight_scale, product if bias is None else bias, out, rows, width, bias is not None,
        RESCALE_ROWS, RESCALE_COLUMNS,
    )  # fmt: skip
    return out
