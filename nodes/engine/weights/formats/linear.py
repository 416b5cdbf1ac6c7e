"""What every format's layer can do."""

from __future__ import annotations

import torch

from ...files.checkpoint import Layout


class QuantizedLinear(torch.nn.Module):
    """A linear layer that stores its matrix its own way. Built on meta, given its weight on the device."""

    cached_as: str | None = None  # the name of the form kept on disk, shared by formats that can read it

    def __init__(self, layer: torch.nn.Linear, compute: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.compute = compute
        self.bias = layer.bias

    def layout(self) -> Layout:
        """What it keeps of its matrix, by attribute; empty where it cannot be kept on disk."""
        return {}

    def set_weight(self, weight: torch.Tensor) -> None:
        """Take the unquantised matrix (out, in), already on the device."""
        raise NotImplementedError

    def restore(self, name: str, tensor: torch.Tensor) -> None:
        """Take one of layout()'s tensors back, already on the device."""
        setattr(self, name, tensor)

    def prepare(self) -> str | None:
        """Called once its weight is there; may test what the device can do. Returns what to log, or None."""
        return None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, compute={self.compute}"
