"""INT8 rows with FP32 scales: `int8` quantises only weights, `int8-fast` quantises activations too.

FP16 is not used, so no FP32 activation overflows. Rows are rotated before rounding, see int8_math.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...cuda.rows import Product, Rows
from ...files.encodings import MATRIX, Encoded, Encoding, Int8
from ...files.rotations import OURS, Rotation
from ...files.tensors import TensorTypes
from .int8_math import multiply_upcast, quantize_rows
from .int8_paths import IntegerPath, choose_path
from .linear import QuantizedLinear

MIN_INT_MM_ROWS = 17  # torch._int_mm needs more than 16


class Int8Linear(QuantizedLinear):
    """An INT8 matrix. Each use turns it back into the activation's dtype.

    rotation: ours, or that of a file whose rows are used as they lie.
    """

    rotation: Rotation | None = OURS
    weight_bytes = 1 + 4 / 3072  # a byte, and an FP32 scale per row of 3072
    cached_as = f"int8-rot{OURS.block}"

    def __init__(self, layer: torch.nn.Linear, compute: torch.dtype):
        super().__init__(layer, compute)
        for name, (dtype, shape) in self.layout().items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))

    def layout(self) -> TensorTypes:
        return {
            "weight": (torch.int8, (self.out_features, self.in_features)),
            "weight_scale": (torch.float32, (self.out_features, 1)),
        }

    def set_weight(self, weight: torch.Tensor) -> None:
        self.weight, self.weight_scale = quantize_rows(OURS.of(weight.float()))

    @classmethod
    def takes(cls, encoding: Encoding) -> bool:
        return isinstance(encoding, Int8)

    def take(self, encoded: Encoded) -> None:
        encoding = encoded.encoding
        assert isinstance(encoding, Int8)
        self.weight, self.rotation = encoded.parts[MATRIX], encoding.rotation
        self.weight_scale = encoding.scales(encoded.parts, self.out_features).contiguous()

    def copy_from(self, other: Int8Linear, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().copy_from(other, move)
        self.rotation = other.rotation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return multiply_upcast(x, self.weight, self.weight_scale, self.bias, self.rotation)


@contextmanager
def weights_only(model: torch.nn.Module) -> Iterator[None]:
    """Inside, layers at `int8-fast` compute as those at `int8`: no activation is rounded."""
    layers = [layer for layer in model.modules() if isinstance(layer, Int8FastLinear)]
    paths = [layer.path for layer in layers]
    for layer in layers:
        layer.path = None
    try:
        yield
    finally:
        for layer, path in zip(layers, paths, strict=True):
            layer.path = path


class Int8FastLinear(Int8Linear):
    """Int8Linear with activations quantised token by token, and products INT8 x INT8 -> INT32."""

    # The INT32 sums of the MLP, which is four times as wide as the model, and tensors that exist with them.
    # Measured in BF16 on an H100: 0.74 GiB for 8442 tokens of 3072 channels.
    product_bytes = 30.6
    # With our kernels, what the LoRA adds to the MLP's first product is kept until that is finished, and the
    # result is also kept unrounded, for the LoRA of the second. 0.85 GiB in FP32 on an H200, for such tokens.
    added_numbers = 8.75
    integer_products = True
    path: IntegerPath | None = None

    def prepare(self) -> str:
        """Choose the path for this layer's shape on its device by a test."""
        shape = self.out_features, self.in_features
        self.path, report = choose_path(self.weight.device, self.compute, *shape, self.rotation)
        return report

    def takes_rows(self, tokens: int) -> bool:
        """Whether forward takes so many tokens as Rows."""
        return self.path is not None and self.path.kernels is not None and tokens >= MIN_INT_MM_ROWS

    def forward(self, x: Any) -> Any:
        """x (..., in) to (..., out); or Rows to the Product of them, which is not finished."""
        if isinstance(x, Rows):
            path = self.path
            assert path is not None and path.kernels is not None
            sums = path.product(x.tokens, self.weight)
            return Product(sums, x.scales, self.weight_scale, self.bias, path.kernels)
        rows = x.numel() // x.shape[-1]
        if self.path is None or rows < MIN_INT_MM_ROWS:
            return super().forward(x)
        y = self.path.multiply(x.reshape(rows, -1), self.weight, self.weight_scale, self.bias, self.rotation)
        return y.reshape(*x.shape[:-1], -1)
