"""How fast our own kernels are on a card."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from ..arithmetic import exact_fp32
from ..cards.kernels import as_current
from ..cards.preflight import HEAD_SIZE, HEADS, ROWS, TOKENS, WIDTH, Rate, random_on, rate_or_reason
from ..cards.speeds import Speeds
from ..cards.timing import Work
from .attention import int8_attention
from .compiler import KernelError
from .driver import are_for
from .products import multiply_int8
from .rows import row_kernels

PRODUCT, ATTENTION, ROW = "matmul int8 dp4a", "attention int8", "rows to int8"
ROW_BYTES = 5  # of a number: read as FP32, written as INT8


@functools.cache
def kernel_rates(device: torch.device) -> tuple[Rate, ...]:
    """Of our kernels, in TOPS, TFLOPS and TB/s. Empty where they are not for the device."""
    if not are_for(device):
        return ()
    kinds = (
        (PRODUCT, _product, lambda rows: 2.0 * rows * WIDTH**2, ROWS),
        (ATTENTION, _attention, lambda tokens: 4.0 * tokens**2 * HEADS * HEAD_SIZE, TOKENS),
        (ROW, _rows, lambda rows: float(ROW_BYTES * rows * WIDTH), ROWS),
    )
    with as_current(device), exact_fp32(), torch.inference_mode():
        return tuple(
            rate_or_reason(name, functools.partial(prepare, device), operations, sizes, device)
            for name, prepare, operations, sizes in kinds
        )


def with_kernels(speeds: Speeds, rates: tuple[Rate, ...]) -> Speeds:
    """The speeds of a card whose layers may also use our kernels. rates: from kernel_rates."""
    found = {rate.name: rate.tflops for rate in rates}
    product = max(speeds.int8 or 0.0, found.get(PRODUCT) or 0.0) or None
    attention, rows = found.get(ATTENTION), bool(found.get(ROW))
    return replace(speeds, int8=product, int8_attention=attention, row_kernels=rows)


def _product(device: torch.device, rows: int) -> Work:
    tokens, weight = (random_on((side, WIDTH), torch.int8, device) for side in (rows, WIDTH))
    return lambda: multiply_int8(tokens, weight)


def _attention(device: torch.device, tokens: int) -> Work:
    attend = int8_attention(device)
    if attend is None:
        raise KernelError("see the log")
    query, key, value = (random_on((1, HEADS, tokens, HEAD_SIZE), torch.float32, device) for _ in range(3))
    return lambda: attend(query, key, value, None)


def _rows(device: torch.device, rows: int) -> Work:
    kernels, x = row_kernels(device, torch.float32), random_on((rows, WIDTH), torch.float32, device)
    if kernels is None:
        raise KernelError("see the log")
    return lambda: kernels.quantize(x)
