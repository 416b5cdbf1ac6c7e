"""The base class of the layers in this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from ...cards.card import Card
from ...files.encodings import Encoded, Encoding
from ...files.tensors import TensorTypes


class QuantizedLinear(torch.nn.Module):
    """A linear layer with its own format of its matrix. It is built on meta, and gets its weight later."""

    # Bytes per stored weight.
    weight_bytes: ClassVar[float]
    # Bytes that a product takes at least per token and channel of the model's width.
    product_bytes: ClassVar[float] = 0.0
    # Numbers of the arithmetic for each token and channel that a LoRA takes beside product_bytes.
    added_numbers: ClassVar[float] = 0.0
    # Whether activations are multiplied as integers, at the card's rate for integers.
    integer_products: ClassVar[bool] = False
    # Whether products are computed in FP16, whatever the activations' dtype.
    fp16_inside: ClassVar[bool] = False
    # The name of the form that is cached on disk. Formats that can read it share the name. None: not cached.
    cached_as: ClassVar[str | None] = None

    def __init__(self, layer: torch.nn.Linear, compute: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.compute = compute
        self.bias = layer.bias

    @classmethod
    def require_usable(cls, card: Card, compute: torch.dtype, name: str) -> None:
        """Raise FireRedError when such layers do not work on the card.

        compute: dtype of the activations. name: of the precision.
        """

    def layout(self) -> TensorTypes:
        """Dtype and shape of the tensors that store its matrix, by attribute. Empty if not cached."""
        return {}

    def set_weight(self, weight: torch.Tensor) -> None:
        """Convert the unquantised matrix (out, in) to the stored form. weight: on the layer's device."""
        raise NotImplementedError

    @classmethod
    def takes(cls, encoding: Encoding) -> bool:
        """Whether a matrix that a file stores so is used as it lies."""
        return False

    def take(self, encoded: Encoded) -> None:
        """Set such a matrix. encoded: on the layer's device."""
        raise NotImplementedError

    def restore(self, name: str, tensor: torch.Tensor) -> None:
        """Set one of layout()'s tensors from the cache. tensor: on the layer's device."""
        setattr(self, name, tensor)

    def copy_from(self, other: Any, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Set the matrix of an equal layer on another card. move: copies a tensor to this layer's device."""
        for name in self.layout():
            self.restore(name, move(getattr(other, name)))

    def prepare(self) -> str | None:
        """Called when the weight is set. It may test kernels on the device. Returns what to log, or None."""
        return None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, compute={self.compute}"
