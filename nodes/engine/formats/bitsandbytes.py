"""bitsandbytes' NF4 and LLM.int8(), as diffusers sets them up."""

from __future__ import annotations

import importlib
import logging
from types import ModuleType
from typing import Any

import torch

from ..errors import FireRedError
from ..libraries import require_libraries
from ..precision import Card, Precision
from .linear import QuantizedLinear

# Columns with a value of 6 or more leave INT8 for a product of their own
# (https://huggingface.co/papers/2208.07339). At 0 nothing does, and whatever passes 65504 becomes NaN in
# bitsandbytes' FP16.
OUTLIER_THRESHOLD = 6.0
ALTERNATIVES = "choose int8, int8-fast or fp32, which run anywhere."


def import_bitsandbytes() -> ModuleType:
    """The library, or a FireRedError naming the alternatives."""
    try:
        require_libraries("bitsandbytes")
    except FireRedError as error:
        raise FireRedError(f"{error} Or {ALTERNATIVES}") from error
    library = importlib.import_module("bitsandbytes")
    # It would warn at every product of every step that LLM.int8() casts to FP16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return library


def require_bitsandbytes(precision: Precision, card: Card, device: torch.device) -> None:
    """Raise FireRedError where bitsandbytes cannot quantise on the card's device: tried, not assumed."""
    library = import_bitsandbytes()
    if not card.is_gpu:
        raise FireRedError(
            f"{precision.name} needs a GPU that bitsandbytes supports, and this is {card}: {ALTERNATIVES}"
        )
    try:
        library.functional.quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4")
    except Exception as error:  # an absent native library raises a RuntimeError of its own
        raise FireRedError(
            f"bitsandbytes does not run on {card} ({str(error).strip().partition(chr(10))[0]}): "
            f"{ALTERNATIVES}"
        ) from error


class Nf4Linear(QuantizedLinear):
    """4-bit NormalFloat with double-quantised scales (https://huggingface.co/papers/2305.14314)."""

    weight: torch.Tensor
    quant_state: Any = None

    def __init__(self, layer: torch.nn.Linear, compute: torch.dtype):
        super().__init__(layer, compute)
        self._library = import_bitsandbytes()

    def set_weight(self, weight: torch.Tensor) -> None:
        packed, self.quant_state = self._library.functional.quantize_4bit(
            weight.to(self.compute).contiguous(), quant_type="nf4", compress_statistics=True
        )
        self.register_buffer("weight", packed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._library.matmul_4bit(x, self.weight.t(), quant_state=self.quant_state, bias=self.bias)


class Int8BnbLinear(QuantizedLinear):
    """LLM.int8(): the reference recipe, FP16 inside, kept to compare with."""

    weight: torch.Tensor

    def __init__(self, layer: torch.nn.Linear, compute: torch.dtype):
        super().__init__(layer, compute)
        self._library = import_bitsandbytes()
        self._state = self._library.MatmulLtState()
        self._state.threshold = OUTLIER_THRESHOLD
        self._state.has_fp16_weights = False
        self._state.is_training = False

    def set_weight(self, weight: torch.Tensor) -> None:
        codes, scales, _ = self._library.functional.int8_vectorwise_quant(weight.to(torch.float16))
        self._state.CB, self._state.SCB = codes, scales
        self.register_buffer("weight", codes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._library.matmul(x, self.weight, bias=self.bias, state=self._state)
