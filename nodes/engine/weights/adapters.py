"""LoRAs on a transformer: low-rank products beside those of its layers, whatever form their weights have.

A layer gives x W^T + strength * scale * (x D^T) U^T (https://huggingface.co/papers/2106.09685). The stored
weights are neither read nor changed, so that another strength or another LoRA loads nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..errors import AGAIN, CheckpointError
from ..files.checkpoint import Checkpoint
from ..files.lora import LoRA
from ..files.tensors import read_tensors
from .names import FOLDED

TIME_EMBEDDING = "time_text_embed."


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
    """What is added to a layer: (x down^T * scale) up^T.

    down (rank, in), up (out, rank): as stored. scale: (rank) FP32. All on the transformer's device. Several
    LoRAs of a layer are one product of the sum of their ranks.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: torch.Tensor

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The inner factor of x (tokens, in): (tokens, rank) in x's dtype, scaled in FP32."""
        inner = F.linear(x, self.down.to(x.dtype))
        return torch.mul(inner, self.scale, out=inner)


class Adapters:
    """The products of a run's LoRAs on the transformer's device.

    layers: by the names of the model's modules. folded: of the layers that only the timestep decides, whose
    results are folded into a table.
    """

    def __init__(self, adapters: Sequence[Adapter], device: torch.device):
        """Read the factors. Raises CheckpointError for a file that changed since it was opened."""
        parts: dict[str, list[Product]] = {}
        for adapter in adapters:
            if adapter.strength:
                for layer, product in _read(adapter, device):
                    parts.setdefault(layer, []).append(product)
        products = {layer: _joined(found) for layer, found in parts.items()}
        self.folded = {layer: found for layer, found in products.items() if FOLDED.match(f"{layer}.")}
        self.layers = {layer: found for layer, found in products.items() if layer not in self.folded}

    @contextmanager
    def attached(self, model: torch.nn.Module) -> Iterator[None]:
        """Inside this context the layers of the model give the sums."""
        with ExitStack() as hooks:
            for name, product in self.layers.items():
                hook = functools.partial(_add, product)
                hooks.callback(model.get_submodule(name).register_forward_hook(hook).remove)
            yield


def _read(adapter: Adapter, device: torch.device) -> Iterator[tuple[str, Product]]:
    lora = adapter.lora
    lora.require_unchanged()
    wanted = {name for factors in lora.layers.values() for name in (factors.down, factors.up)}
    stored = read_tensors(lora.path, lambda name: name in wanted, reuse_buffers_for=device)
    tensors: Mapping[str, torch.Tensor] = {name: tensor.to(device, copy=True) for name, tensor in stored}
    lora.require_unchanged()
    for name, tensor in tensors.items():  # attention may turn NaN into 0, which no guard sees
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{lora.path}: {name} holds NaN or infinity. {AGAIN}")
    for layer, factors in lora.layers.items():
        scale = torch.full((factors.rank,), factors.scale * adapter.strength, device=device)
        yield layer, Product(tensors[factors.down], tensors[factors.up], scale)


def _joined(parts: Sequence[Product]) -> Product:
    """Several products as one."""
    if len(parts) == 1:
        return parts[0]
    down, up, scale = zip(*parts, strict=True)
    return Product(torch.cat(down), torch.cat(up, dim=1), torch.cat(scale))


def _add(product: Product, layer: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
    """A forward hook of a linear layer: add the product to its output, in place."""
    x = args[0].flatten(0, -2)
    output.view(-1, output.shape[-1]).addmm_(product.of(x), product.up.to(x.dtype).t())
