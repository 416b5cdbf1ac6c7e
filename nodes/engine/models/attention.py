"""Which attention a transformer computes with: torch's, or the one that rounds to INT8."""

from __future__ import annotations

import torch

from ..cuda.attention import int8_attention
from ..limits import INT8
from .transformer import Attend, attend


def attention_on(device: torch.device, kind: str) -> Attend:
    """Attention of that kind. INT8 is exact where its kernels do not run or do not know the query's form."""
    kernels = int8_attention(device) if kind == INT8 else None
    if kernels is None:
        return attend

    def attend_int8(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return (kernels if kernels.takes(query) else attend)(query, key, value, mask)

    return attend_int8
