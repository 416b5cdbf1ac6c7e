"""Products of INT8 matrices by our own DP4A kernel (product.cu): what torch._int_mm computes."""

from __future__ import annotations

import functools

import torch

from .driver import Kernel, Module

TILE = 128
DEPTH = 32  # the width of both matrices is a multiple of it


@functools.cache
def _kernel(device: torch.device) -> Kernel:
    return Module("product.cu", device).kernel("multiply_int8")


def multiply_int8(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (m, k) times the transpose of b (n, k), both INT8 and contiguous: (m, n) INT32.

    k is a multiple of 32 and n of 4. Raises KernelError where the kernel does not compile or load.
    """
    (m, k), n = a.shape, len(b)
    if k % DEPTH or n % 4:
        raise ValueError(f"no product of {m}x{k} and {n}x{k}")
    out = torch.empty((m, n), dtype=torch.int32, device=a.device)
    _kernel(a.device)((-(-n // TILE), -(-m // TILE), 1), 256, a, b, out, m, n, k)
    return out
