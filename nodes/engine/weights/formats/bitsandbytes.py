"""NF4 and LLM.int8() by bitsandbytes, with diffusers' settings."""

from __future__ import annotations

import copy
import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import torch

from ...cards.card import Card
from ...cards.libraries import require_libraries
from ...errors import FireRedError, first_line
from ...files.encodings import MATRIX, Bnb4, Encoded, Encoding, Int8
from .int8_math import LEVELS
from .linear import QuantizedLinear

# Columns with a value of 6 or more are multiplied separately, not in INT8
# (https://huggingface.co/papers/2208.07339). With 0 none is, and values above 65504 become NaN in FP16.
OUTLIER_THRESHOLD = 6.0
ALTERNATIVES = "choose int8, int8-fast or fp32, which run anywhere."
TEST_ROWS, TEST_SIDE = 32, 256  # of the test product


def import_bitsandbytes() -> ModuleType:
    """The imported library. Raises FireRedError, naming alternatives, when it is missing or too old."""
    try:
        require_libraries("bitsandbytes")
    except FireRedError as error:
        raise FireRedError(f"{error} Or {ALTERNATIVES}") from error
    library = importlib.import_module("bitsandbytes")
    # Without this, it warns at every product of every step that LLM.int8() casts to FP16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return library


class BitsAndBytesLinear(QuantizedLinear):
    """What both layers share. max_error: the largest relative error against FP64 of a correct product."""

    max_error: ClassVar[float]

    def __init__(self, layer: torch.nn.Linear, compute: torch.dtype):
        super().__init__(layer, compute)
        self._library = import_bitsandbytes()

    @classmethod
    def require_usable(cls, card: Card, compute: torch.dtype, name: str) -> None:
        """Raise FireRedError when a test product fails on the card. See QuantizedLinear.require_usable."""
        import_bitsandbytes()
        if not card.is_gpu:
            raise FireRedError(
                f"{name} needs a GPU that bitsandbytes supports, and this is {card}: {ALTERNATIVES}"
            )
        try:
            fault = product_fault(cls, compute, card.device)  # type: ignore[arg-type]
        except torch.OutOfMemoryError as error:
            raise FireRedError(f"{card} is full. Close other programs that use it.") from error
        if fault:
            raise FireRedError(f"{name} does not run on {card} ({fault}): {ALTERNATIVES}")


@functools.cache
def product_fault(
    layer_class: type[BitsAndBytesLinear], compute: torch.dtype, device: torch.device
) -> str | None:
    """What is wrong with a small product of such a layer on the device; None if nothing is.

    compute: the dtype of the activations. The test runs once per process. Raises OutOfMemoryError.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(TEST_SIDE, TEST_SIDE, generator=generator)
    tokens = torch.randn(TEST_ROWS, TEST_SIDE, generator=generator)
    tokens[:, ::64] *= 10  # above the threshold
    expected = tokens.double() @ weight.double().T
    try:
        empty = torch.nn.utils.skip_init(torch.nn.Linear, TEST_SIDE, TEST_SIDE, bias=False)
        layer = layer_class(empty, compute)
        layer.set_weight(weight.to(device, compute))
        product = layer(tokens.to(device, compute)).double().cpu()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing native library raises its own RuntimeError
        return first_line(error)
    wrong = float((product - expected).norm() / expected.norm())
    return None if wrong < layer_class.max_error else f"a product is wrong by {wrong:.0%}"


class Nf4Linear(BitsAndBytesLinear):
    """4-bit NormalFloat with double-quantised scales (https://huggingface.co/papers/2305.14314)."""

    weight_bytes = 0.5 + (1 + 4 / 256) / 64  # half a byte, and a double-quantised scale per block of 64
    max_error = 0.15  # rounding causes 9.2 %
    weight: torch.Tensor
    quant_state: Any = None

    def set_weight(self, weight: torch.Tensor) -> None:
        packed, self.quant_state = self._library.functional.quantize_4bit(
            weight.to(self.compute).contiguous(), quant_type="nf4", compress_statistics=True
        )
        self.register_buffer("weight", packed)

    @classmethod
    def takes(cls, encoding: Encoding) -> bool:
        return isinstance(encoding, Bnb4)

    def take(self, encoded: Encoded) -> None:
        assert isinstance(encoded.encoding, Bnb4)
        self.quant_state = encoded.encoding.state(encoded.parts)
        self.quant_state.dtype = self.compute
        self.register_buffer("weight", encoded.parts[MATRIX])

    def copy_from(self, other: Nf4Linear, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.register_buffer("weight", move(other.weight))
        self.quant_state = _moved_state(other.quant_state, move)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._library.matmul_4bit(x, self.weight.t(), quant_state=self.quant_state, bias=self.bias)


def _moved_state(state: Any, move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of the library's QuantState, whose tensors, also those of the state in it, are moved."""
    moved = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, torch.Tensor):
            setattr(moved, name, move(value))
        elif isinstance(value, type(state)):
            setattr(moved, name, _moved_state(value, move))
    return moved


class Int8BnbLinear(BitsAndBytesLinear):
    """LLM.int8(), the reference to compare with. It computes in FP16."""

    weight_bytes = 1 + 4 / 3072  # a byte, and an FP32 scale per row of 3072
    integer_products = True
    fp16_inside = True
    max_error = 0.03  # rounding causes 1.0 %
    weight: torch.Tensor

    def __init__(self, layer: torch.nn.Linear, compute: torch.dtype):
        super().__init__(layer, compute)
        self._state = self._library.MatmulLtState()
        self._state.threshold = OUTLIER_THRESHOLD
        self._state.has_fp16_weights = False
        self._state.is_training = False

    def set_weight(self, weight: torch.Tensor) -> None:
        codes, scales, _ = self._library.functional.int8_vectorwise_quant(weight.to(torch.float16))
        self._set(codes, scales)

    @classmethod
    def takes(cls, encoding: Encoding) -> bool:
        return isinstance(encoding, Int8) and encoding.rotation is None

    def take(self, encoded: Encoded) -> None:
        assert isinstance(encoded.encoding, Int8)
        scales = encoded.encoding.scales(encoded.parts, self.out_features).flatten() * LEVELS
        self._set(encoded.parts[MATRIX], scales)

    def _set(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        self._state.CB, self._state.SCB = codes, scales
        self.register_buffer("weight", codes)

    def copy_from(self, other: Int8BnbLinear, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._set(move(other._state.CB), move(other._state.SCB))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._library.matmul(x, self.weight, bias=self.bias, state=self._state)
