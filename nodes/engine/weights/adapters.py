"""LoRAs on a transformer: low-rank products beside those of its layers, whatever form their weights have.

A layer gives x W^T + strength * scale * (x D^T) U^T (https://huggingface.co/papers/2106.09685). The stored
weights are neither read nor changed, so that another strength or another LoRA loads nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from ..cuda import rows
from ..errors import AGAIN, CheckpointError
from ..files.checkpoint import Checkpoint
from ..files.lora import LoRA
from ..files.tensors import read_tensors
from .names import FOLDED, is_held

TIME_EMBEDDING = "time_text_embed."
# Layers of an attention that take the same input as another one.
SAME_INPUT = {"to_k": "to_q", "to_v": "to_q", "add_k_proj": "add_q_proj", "add_v_proj": "add_q_proj"}


@dataclass(frozen=True)
class Adapter:
    """A LoRA at a strength."""

    lora: LoRA
    strength: float


def adaptable_layers(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """The transformer's linear layers that a LoRA may change, by name: their outputs and inputs.

    The timestep embedding is none of them: every result in the folded table depends on it.
    """
    stored = checkpoint.component("transformer").stored().items()
    matrices = {name.removesuffix(".weight"): each.shape for name, each in stored if name.endswith(".weight")}
    return {
        name: (shape[0], shape[1])
        for name, shape in matrices.items()
        if len(shape) == 2 and not name.startswith(TIME_EMBEDDING)
    }


class Product(NamedTuple):
    """What is added to a layer: x (scale * down)^T up^T.

    down (rank, in), up (out, rank): as stored. scale: (rank) FP32. All on the transformer's device. Several
    LoRAs of a layer are one product of the sum of their ranks.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: torch.Tensor

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The inner factor of x (tokens, in), see inner_factor."""
        return inner_factor(x, self.down, self.scale)


def inner_factor(x: torch.Tensor, down: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (tokens, in) times the transpose of scale * down (rank, in): (tokens, rank), in x's dtype.

    The factor is scaled, not the product, which is larger. It is scaled in FP32 and rounded once.
    """
    scaled = torch.empty_like(down, dtype=x.dtype)
    return F.linear(x, torch.mul(down, scale.unsqueeze(1), out=scaled))


class SharedInput:
    """The products of layers that take the same input. The first layer computes the inner factors of all.

    ups: (rank, out) by the names of the model's modules.
    """

    def __init__(self, products: Mapping[str, Product]):
        downs, ups, scales = zip(*products.values(), strict=True)
        # Contiguous: an FP32 product then takes 127 us on an H100, and with a transposed view 150 us.
        self.ups = {layer: up.t().contiguous() for layer, up in zip(products, ups, strict=True)}
        self._down, self._scale = torch.cat(downs), torch.cat(scales)
        self._ranks = [len(scale) for scale in scales]
        # By input, as threads may compute several. An entry goes when its input is freed.
        self._inner = WeakTensorKeyDictionary()

    def inner(self, x: torch.Tensor, layer: str) -> torch.Tensor:
        """The layer's inner factor of its input x (..., in): (tokens, rank)."""
        inner = self._inner.get(x)
        if inner is None:
            parts = inner_factor(x.flatten(0, -2), self._down, self._scale).split(self._ranks, dim=1)
            inner = self._inner[x] = dict(zip(self.ups, parts, strict=True))
        return inner[layer]


@dataclass(frozen=True)
class LayerAddition:
    """A forward hook that adds a layer's product: in place, or to a result that is finished later."""

    shared: SharedInput
    layer: str

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        x: Any = args[0].plain if isinstance(args[0], rows.Rows) else args[0]
        inner, up = self.shared.inner(x, self.layer), self.shared.ups[self.layer].to(x.dtype)
        if isinstance(output, rows.Product):
            output.added = inner @ up
        else:
            output.view(-1, output.shape[-1]).addmm_(inner, up)


class Adapters:
    """The products of a run's LoRAs on the transformer's device.

    folded: of the layers that only the timestep decides, whose results are folded into a table. shared: of
    all others.
    """

    def __init__(self, adapters: Sequence[Adapter], device: torch.device, held: Sequence[int] | None = None):
        """Read the factors. Raises CheckpointError for a file that changed since it was opened.

        held: of a part of the transformer, its blocks.
        """
        parts: dict[str, list[Product]] = {}
        for adapter in adapters:
            if adapter.strength:
                for layer, product in _read(adapter, device, held):
                    parts.setdefault(layer, []).append(product)
        self.folded: dict[str, Product] = {}
        by_input: dict[str, dict[str, Product]] = {}
        for layer in list(parts):
            product = _joined(parts.pop(layer))
            if FOLDED.match(f"{layer}."):
                self.folded[layer] = product
            else:
                by_input.setdefault(_input(layer), {})[layer] = product
        self.shared = [SharedInput(by_input.pop(name)) for name in list(by_input)]

    @contextmanager
    def attached(self, model: torch.nn.Module) -> Iterator[None]:
        """Inside this context the layers of the model give the sums."""
        # all at once, as get_submodule for each layer takes longer
        modules = dict(model.named_modules()) if self.shared else {}
        with ExitStack() as hooks:
            for shared in self.shared:
                for layer in shared.ups:
                    hook = LayerAddition(shared, layer)
                    hooks.callback(modules[layer].register_forward_hook(hook).remove)
            yield


def _read(
    adapter: Adapter, device: torch.device, held: Sequence[int] | None
) -> Iterator[tuple[str, Product]]:
    lora = adapter.lora
    lora.require_unchanged()
    layers = {layer: factors for layer, factors in lora.layers.items() if is_held(f"{layer}.", held)}
    wanted = {name for factors in layers.values() for name in (factors.down, factors.up)}
    stored = read_tensors(lora.path, lambda name: name in wanted, reuse_buffers_for=device)
    tensors: Mapping[str, torch.Tensor] = {name: tensor.to(device, copy=True) for name, tensor in stored}
    lora.require_unchanged()
    for name, tensor in tensors.items():  # attention may turn NaN into 0, which no guard sees
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{lora.path}: {name} holds NaN or infinity. {AGAIN}")
    for layer, factors in layers.items():
        scale = torch.full((factors.rank,), factors.scale * adapter.strength, device=device)
        yield layer, Product(tensors[factors.down], tensors[factors.up], scale)


def _joined(parts: Sequence[Product]) -> Product:
    """Several products as one."""
    if len(parts) == 1:
        return parts[0]
    down, up, scale = zip(*parts, strict=True)
    return Product(torch.cat(down), torch.cat(up, dim=1), torch.cat(scale))


def _input(layer: str) -> str:
    """The name of the first layer that takes the same input as this one."""
    parent, dot, name = layer.rpartition(".")
    return parent + dot + SAME_INPUT.get(name, name)
