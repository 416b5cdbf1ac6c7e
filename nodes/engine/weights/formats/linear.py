"""What every format's layer can do."""

from __future__ import annotations

from typing import ClassVar

import torch

from ...cards.card import Card
from ...files.tensors import Layout


class QuantizedLinear(torch.nn.Module):
    """A linear layer that stores its matrix its own way. Built on meta, given its weight on the device."""

    # Bytes that storing one weight takes.
    weight_bytes: ClassVar[float]
    # Bytes that products take at least for each token and channel of the model's width.
    product_bytes: ClassVar[float] = 0.0
    # Whether activations are multiplied as integers, at the card's rate for those.
    integer_products: ClassVar[bool] = False
    # Whether products are computed in FP16, whatever the activations are.
    fp16_inside: ClassVar[bool] = False
    # The name of the stored form that is kept on disk, shared by formats that can read it; None for none.
    cached_as: ClassVar[str | None] = None

    def __init__(self, layer: torch.nn.Linear, compute: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.compute = compute
        self.bias = layer.bias

    @classmethod
    def require_usable(cls, card: Card, compute: torch.dtype, name: str) -> None:
        """Raise FireRedError where such layers cannot multiply on the card. name: the precision's."""

    def layout(self) -> Layout:
        """Its stored form: what it keeps of its matrix, by attribute. Empty where disks keep none of it."""
        return {}

    def set_weight(self, weight: torch.Tensor) -> None:
        """Turn the unquantised matrix (out, in), already on the device, into the stored form."""
        raise NotImplementedError

    def restore(self, name: str, tensor: torch.Tensor) -> None:
        """Take one of layout()'s tensors back, already on the device."""
        setattr(self, name, tensor)

    def prepare(self) -> str | None:
        """Called once its weight is there; may test what the device can do. Returns what to log, or None."""
        return None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, compute={self.compute}"
