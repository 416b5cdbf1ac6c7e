"""How torch is set to compute FP32. This imports nothing but torch, so that a process for it starts fast."""

from __future__ import annotations

from typing import Any

import torch


def settings() -> tuple[Any, ...]:
    """How products and convolutions are computed, on cards and on the CPU."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    if not hasattr(products, "fp32_precision"):
        return torch.get_float32_matmul_precision(), cudnn.allow_tf32, products.allow_tf32
    onednn: Any = torch.backends.mkldnn
    return tuple(part.fp32_precision for part in (products, cudnn.conv, onednn.matmul, onednn.conv))


def are_exact(found: tuple[Any, ...]) -> bool:
    """Whether none of these settings lets FP32 be computed as TF32 or BF16."""
    return not {"tf32", "bf16", "high", "medium", True} & set(found)
