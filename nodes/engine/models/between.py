"""What a block computes between its products: by our own kernels where its layers take rows, else in torch.

A layer takes rows if it multiplies INT8 matrices, our kernels run on its card, and no hook sees what goes in
and out, such as that of a LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import Module

from ..cuda import rows
from ..cuda.rows import Modulation, Product, RowKernels, Rows
from ..weights.formats import Int8FastLinear

Activations = torch.Tensor | Rows  # of a layer: (1, tokens, width), or its rows
Result = torch.Tensor | Product  # of a layer: (1, tokens, width), or the product that is not finished


def token_count(x: Activations) -> int:
    return len(x.tokens) if isinstance(x, Rows) else x.shape[-2]


def _kernels(layers: Sequence[Module], x: torch.Tensor) -> RowKernels | None:
    """The kernels that make rows for these layers; None if one of them does not take rows."""
    found = None
    for layer in layers:
        if not isinstance(layer, Int8FastLinear) or layer._forward_hooks or layer._forward_pre_hooks:
            return None
        found = layer.row_kernels(x.shape[-2])
        if found is None:
            return None
    return found


def normed_for(layers: Sequence[Module], x: torch.Tensor, modulation: Modulation, first: int) -> Activations:
    """The input of these layers: x (1, tokens, width), normed and modulated as rows.normed does."""
    kernels = _kernels(layers, x)
    if kernels is None:
        return rows.normed(x, modulation, first)
    return kernels.quantize(x[0].contiguous(), modulation, first)


def prepared(x: torch.Tensor, layer: Module) -> Activations:
    """x (1, tokens, width) as the layer takes it."""
    kernels = _kernels([layer], x)
    return x if kernels is None else kernels.quantize(x[0].contiguous())


def activated(y: Product, layer: Module) -> Activations:
    """The layer's input: gelu of the result of another one."""
    kernels, watched = y.kernels, _kernels([layer], y.sums) is None
    return kernels.gelu(y).unsqueeze(0) if watched else kernels.quantize(y, activate=True)


def add_gated(x: torch.Tensor, change: Result, modulation: Modulation, gate: int) -> torch.Tensor:
    """As rows.add_gated: (1, tokens, width)."""
    if isinstance(change, Product):
        return change.kernels.add_gated(x[0].contiguous(), change, modulation, gate).unsqueeze(0)
    return rows.add_gated(x, change, modulation, gate)


class HeadsOf(NamedTuple):
    """A stream's queries, keys or values, before they are normed by `norm` and rotated, if they are."""

    result: Result
    norm: Module | None = None
    rotations: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        return len(self.result.sums) if isinstance(self.result, Product) else self.result.shape[1]

    def plain(self, size: int) -> torch.Tensor:
        """(1, tokens, heads, size)."""
        y = self.result
        finished = y.kernels.finished(y).unsqueeze(0) if isinstance(y, Product) else y
        heads = finished.unflatten(-1, (-1, size))
        if self.norm is not None:
            heads = self.norm(heads)
        return heads if self.rotations is None else rows.rotate_pairs(heads, self.rotations)

    def write(self, out: torch.Tensor) -> None:
        """The same into out (tokens, heads, size)."""
        y = self.result
        watched = self.norm is not None and self.norm._forward_hooks
        if isinstance(y, Product) and out.shape[-1] == rows.HEAD_SIZE and not watched:
            weight: Any = None if self.norm is None else self.norm.weight
            y.kernels.heads(y, weight, self.rotations, out.flatten(1))
        else:
            out.copy_(self.plain(out.shape[-1])[0])


def joined_heads(text: HeadsOf, image: HeadsOf, size: int) -> torch.Tensor:
    """Both streams' heads as those of one sequence, in the attention's order: (1, T + I, heads, size)."""
    streams = text, image
    if not any(isinstance(stream.result, Product) for stream in streams):
        return torch.cat([stream.plain(size) for stream in streams], dim=1)
    product = next(stream.result for stream in streams if isinstance(stream.result, Product))
    counts, width = [stream.tokens for stream in streams], product.sums.shape[1]
    dtype, device = product.kernels.dtype, product.sums.device
    out = torch.empty((sum(counts), width // size, size), dtype=dtype, device=device)
    for stream, part in zip(streams, out.split(counts), strict=True):
        stream.write(part)
    return out.unsqueeze(0)
