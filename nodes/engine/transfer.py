"""The one way a tensor crosses from one component's device to another's.

There are three crossings: text embeddings and reference latents into the sampler, final latents out of it.
They are always FP32: FP16 would overflow, BF16 would round what the next component computes in FP32.
"""

from __future__ import annotations

import torch


def cross(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor in FP32 on `device`."""
    return tensor.to(device=device, dtype=torch.float32)
