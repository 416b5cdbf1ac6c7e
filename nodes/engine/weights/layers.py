"""Layers that replace a model's own: stored in one dtype and used in another."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..files.encodings import Encoded
from .names import is_big_matrix
from .precision import Precision


class UpcastLinear(torch.nn.Module):
    """A linear layer that turns its stored weight into the activation's dtype at each use."""

    def __init__(self, layer: torch.nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self._encoded: Encoded | None = None

    def keep(self, encoded: Encoded) -> None:
        """Hold the weight as its file stores it, and decode it at each use."""
        self.register_parameter("weight", None)
        self._encoded = encoded

    def copy_from(self, other: UpcastLinear, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Hold what an equal layer on another card keeps. move: copies a tensor to this layer's device."""
        if other._encoded is not None:
            parts = {name: move(part) for name, part in other._encoded.parts.items()}
            self.keep(other._encoded._replace(parts=parts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight if self._encoded is None else self._encoded.decode()
        return F.linear(x, weight.to(x.dtype), self.bias)


class UpcastEmbedding(torch.nn.Module):
    """A token embedding that is stored in one dtype and returns rows in another."""

    def __init__(self, layer: torch.nn.Embedding, compute: torch.dtype):
        super().__init__()
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.weight, self.compute = layer.weight, compute

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight).to(self.compute)


def prepare_layers(model: torch.nn.Module, role: str, precision: Precision) -> None:
    """Replace layers of a model on meta by those that `precision` needs, under the same names."""
    assert precision.compute is not None
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            full_name = f"{path}.{name}.weight" if path else f"{name}.weight"
            if type(child) is torch.nn.Linear and precision.layer and is_big_matrix(role, full_name):
                setattr(module, name, precision.layer(child, precision.compute))
            elif precision.storage == precision.compute:
                continue
            elif type(child) is torch.nn.Linear:
                setattr(module, name, UpcastLinear(child))
            elif type(child) is torch.nn.Embedding:
                setattr(module, name, UpcastEmbedding(child, precision.compute))


def has_storage_dtype(module: torch.nn.Module, parameter: str) -> bool:
    """Whether this parameter has the precision's storage dtype (a matrix), not its compute dtype."""
    layers = (UpcastLinear, UpcastEmbedding, torch.nn.Linear, torch.nn.Embedding)
    return parameter == "weight" and isinstance(module, layers)
