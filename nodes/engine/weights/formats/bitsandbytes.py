"""bitsandbytes' NF4 and LLM.int8(), as diffusers sets them up."""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType
from typing import Any

import torch

from ...cards.libraries import require_libraries
from ...errors import FireRedError, first_line
from ..precision import Card, Precision
from .linear import QuantizedLinear

# Columns with a value of 6 or more leave INT8 for a product of their own
# (https://huggingface.co/papers/2208.07339). At 0 nothing does, and whatever passes 65504 becomes NaN in
# bitsandbytes' FP16.
OUTLIER_THRESHOLD = 6.0
ALTERNATIVES = "choose int8, int8-fast or fp32, which run anywhere."
TEST_ROWS, TEST_SIDE = 32, 256  # of the product that is tried
# The relative error a right product may have against FP64: rounding makes 1.0 % (int8-bnb) and 9.2 % (nf4).
MAX_ERROR = {"int8-bnb": 0.03, "nf4": 0.15}


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
    """Raise FireRedError where bitsandbytes cannot multiply on the card's device: tried, not assumed."""
    import_bitsandbytes()
    if not card.is_gpu:
        raise FireRedError(
            f"{precision.name} needs a GPU that bitsandbytes supports, and this is {card}: {ALTERNATIVES}"
        )
    assert precision.format is not None and precision.compute is not None
    try:
        fault = product_fault(precision.format, precision.compute, device)
    except torch.OutOfMemoryError as error:
        raise FireRedError(f"{card} is full. Close other programs that use it.") from error
    if fault:
        raise FireRedError(f"{precision.name} does not run on {card} ({fault}): {ALTERNATIVES}")


@functools.cache
def product_fault(format: str, compute: torch.dtype, device: torch.device) -> str | None:
    """What is wrong with a small product of such a layer on the device, tried once; None if nothing is.

    format: "nf4" or "int8-bnb". compute: the dtype of the activations.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(TEST_SIDE, TEST_SIDE, generator=generator)
    tokens = torch.randn(TEST_ROWS, TEST_SIDE, generator=generator)
    tokens[:, ::64] *= 10  # past the threshold
    expected = tokens.double() @ weight.double().T
    try:
        layer = LAYERS[format](
            torch.nn.utils.skip_init(torch.nn.Linear, TEST_SIDE, TEST_SIDE, bias=False), compute
        )
        layer.set_weight(weight.to(device, compute))
        product = layer(tokens.to(device, compute)).double().cpu()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an absent native library raises a RuntimeError of its own
        return first_line(error)
    wrong = float((product - expected).norm() / expected.norm())
    return None if wrong < MAX_ERROR[format] else f"a product is wrong by {wrong:.0%}"


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


LAYERS: dict[str, type[QuantizedLinear]] = {"nf4": Nf4Linear, "int8-bnb": Int8BnbLinear}
