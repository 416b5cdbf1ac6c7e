"""What a block computes between its products: by our own kernels where they run, else in plain torch.

A layer that multiplies INT8 matrices takes rows and leaves its result unfinished, unless a hook wants to see
plain tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import Module

from ..cuda import rows
from ..cuda.rows import Modulation, Product, RowKernels, Rows, Source, row_kernels
from ..weights.adapters import LayerAddition
from ..weights.formats import Int8FastLinear

Activations = torch.Tensor | Rows  # of a layer: (1, tokens, width), or its rows
Result = torch.Tensor | Product  # of a layer: (1, tokens, width), or the product that is not finished


def token_count(x: Activations) -> int:
    return len(x.tokens) if isinstance(x, Rows) else x.shape[-2]


def _kernels(x: torch.Tensor) -> RowKernels | None:
    """What computes on rows of this width and arithmetic on this card; None is plain torch."""
    kernels = row_kernels(x.device, x.dtype)
    return kernels if kernels is not None and kernels.take(x.shape[-1]) else None


def _take_rows(layers: Sequence[Module], tokens: int) -> bool:
    return all(
        isinstance(layer, Int8FastLinear) and layer.takes_rows(tokens) and not _is_watched(layer)
        for layer in layers
    )


def _is_watched(module: Module | None) -> bool:
    """Whether a hook wants plain tensors."""
    if module is None or not (module._forward_hooks or module._forward_pre_hooks):
        return False
    adds = all(isinstance(hook, LayerAddition) for hook in module._forward_hooks.values())
    return not adds or bool(module._forward_pre_hooks)


def _has_lora(layers: Sequence[Module]) -> bool:
    return any(layer._forward_hooks for layer in layers)


def normed_for(layers: Sequence[Module], x: torch.Tensor, modulation: Modulation, first: int) -> Activations:
    """The input of these layers: x (1, tokens, width), normed and modulated as rows.normed does."""
    kernels = _kernels(x)
    if kernels is None:
        return rows.normed(x, modulation, first)
    if _take_rows(layers, x.shape[1]):
        return kernels.quantize(x.contiguous(), modulation, first, keep=_has_lora(layers))
    return kernels.normed(x.contiguous(), modulation, first)


def prepared(x: torch.Tensor, layer: Module) -> Activations:
    """x (1, tokens, width) as the layer takes it."""
    kernels = _kernels(x)
    if kernels is None or not _take_rows([layer], x.shape[1]):
        return x
    found = kernels.quantize(x.contiguous())
    found.plain = x
    return found


def activated(y: Product, layer: Module) -> Activations:
    """The layer's input: gelu of the result of another one."""
    if _take_rows([layer], len(y.sums)):
        return y.kernels.quantize(y, activate=True, keep=_has_lora([layer]))
    if y.kernels.take(y.sums.shape[1]):
        return y.kernels.gelu(y).unsqueeze(0)
    return rows.gelu(y.kernels.finished(y)).unsqueeze(0)


def add_gated(x: torch.Tensor, change: Result, modulation: Modulation, gate: int) -> torch.Tensor:
    """As rows.add_gated: (1, tokens, width)."""
    if isinstance(change, Product):
        return change.kernels.add_gated(x.contiguous(), change, modulation, gate)
    return rows.add_gated(x, change, modulation, gate)


class HeadsOf(NamedTuple):
    """A stream's queries, keys or values, before they are normed by `norm` and rotated, if they are."""

    result: Result
    norm: Module | None = None
    rotations: torch.Tensor | None = None

    @property
    def source(self) -> Source:
        """As the kernels take it."""
        return self.result if isinstance(self.result, Product) else self.result.contiguous()

    @property
    def kernels(self) -> RowKernels | None:
        """Those that can do it, for heads of rows.HEAD_SIZE."""
        if _is_watched(self.norm):
            return None
        return self.result.kernels if isinstance(self.result, Product) else _kernels(self.result)

    def plain(self, size: int) -> torch.Tensor:
        """(1, tokens, heads, size), in plain torch."""
        y = self.result
        finished = y.kernels.finished(y).unsqueeze(0) if isinstance(y, Product) else y
        heads = finished.unflatten(-1, (-1, size))
        if self.norm is not None:
            heads = self.norm(heads)
        return heads if self.rotations is None else rows.rotate_pairs(heads, self.rotations)


def joined_heads(text: HeadsOf, image: HeadsOf, size: int) -> torch.Tensor:
    """Both streams' heads as those of one sequence, in the attention's order: (1, T + I, heads, size)."""
    streams, kernels = (text, image), text.kernels
    sources = [each.source for each in streams]
    (text_tokens, width), (image_tokens, _) = map(rows.shape, sources)
    known = size == rows.HEAD_SIZE and width <= rows.WIDEST_HEADS
    if kernels is None or image.kernels is None or not known:
        return torch.cat([each.plain(size) for each in streams], dim=1)
    tokens, device = text_tokens + image_tokens, rows.numbers(sources[0]).device
    out = torch.empty((1, tokens, width // size, size), dtype=kernels.dtype, device=device)
    for each, source, start in zip(streams, sources, (0, text_tokens), strict=True):
        weight: Any = None if each.norm is None else each.norm.weight
        kernels.heads(source, weight, each.rotations, out, start)
    return out
