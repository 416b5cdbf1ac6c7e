"""INT8 rows with FP32 scales: weight-only (`int8`), and with activations quantised too (`int8-fast`).

No FP16 anywhere, so every FP32 activation is in range. Rows are rotated before rounding, see int8_math.
"""

from __future__ import annotations

import torch

from ...files.tensors import Layout
from .int8_math import ROTATION, multiply_upcast, quantize_rows, rotate
from .int8_paths import IntegerPath, choose_path
from .linear import QuantizedLinear

MIN_INT_MM_ROWS = 17  # torch._int_mm takes more than 16


class Int8Linear(QuantizedLinear):
    """INT8 matrix, every weight turned back into the activation's dtype as it is used."""

    weight_bytes = 1 + 4 / 3072  # a byte each and an FP32 scale a row
    cached_as = f"int8-rot{ROTATION}"

    def __init__(self, layer: torch.nn.Linear, compute: torch.dtype):
        super().__init__(layer, compute)
        for name, (dtype, shape) in self.layout().items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))

    def layout(self) -> Layout:
        return {
            "weight": (torch.int8, (self.out_features, self.in_features)),
            "weight_scale": (torch.float32, (self.out_features, 1)),
        }

    def set_weight(self, weight: torch.Tensor) -> None:
        self.weight, self.weight_scale = quantize_rows(rotate(weight.float()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return multiply_upcast(x, self.weight, self.weight_scale, self.bias)


class Int8FastLinear(Int8Linear):
    """The same storage, with activations quantised token by token and multiplied as INT8 x INT8 -> INT32."""

    # INT32 sums of the MLP, four times as wide as the model, and what lives beside them: 0.74 GiB in BF16 at
    # 8442 tokens of 3072 on an H100.
    product_bytes = 30.6
    integer_products = True
    path: IntegerPath | None = None

    def prepare(self) -> str:
        """Choose by a self-test how this layer's shape is computed on its device."""
        self.path, report = choose_path(self.weight.device, self.compute, self.out_features, self.in_features)
        return report

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        if self.path is None or rows < MIN_INT_MM_ROWS:
            return super().forward(x)
        y = self.path.multiply(x.reshape(rows, -1), self.weight, self.weight_scale, self.bias)
        return y.reshape(*x.shape[:-1], -1)
