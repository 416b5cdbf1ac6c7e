"""The precisions: how weights are stored, and in which arithmetic they are used.

A new precision is a row of the table here. If it stores matrices in a new way, add a class in formats/.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..cards.card import Card
from ..errors import FireRedError, InputError
from ..files.encodings import Encoding, Plain
from .formats import Int8BnbLinear, Int8FastLinear, Int8Linear, Nf4Linear, QuantizedLinear


@dataclass(frozen=True)
class Precision:
    """How a component's weights are stored and in which dtype it computes.

    storage: dtype of the matrices in memory; None keeps the form that the files have.
    compute: dtype of activations, products and small parameters (norms, biases); None is BF16 on a card that
    has it, else FP32.
    layer: the class that stores the big matrices in a format of its own.
    loss: a rank of how much this storage changes the picture; 0 is lossless.
    automatic: whether `auto` may choose it.
    remedy: whether errors recommend it when another precision overflows. It then has to run on every card and
    to keep FP32's range.
    """

    name: str
    storage: torch.dtype | None
    compute: torch.dtype | None
    layer: type[QuantizedLinear] | None = None
    loss: int = 0
    automatic: bool = False
    remedy: bool = False

    @property
    def math(self) -> torch.dtype:
        """The dtype of its arithmetic. Only for a precision that is resolved for a card."""
        assert self.compute is not None
        return self.compute

    def keeps(self, encoding: Encoding) -> bool:
        """Whether codes stay in memory as their file stores them, and are decoded at each use.

        That is for linear layers without a format of their own. Of others only the numbers are kept.
        """
        codes = not isinstance(encoding, Plain)
        return codes and self.storage is None and encoding.quick

    @property
    def fp16_inside(self) -> bool:
        """Whether its products are computed in FP16, whatever `compute` says."""
        return self.layer is not None and self.layer.fp16_inside

    @property
    def integer_products(self) -> bool:
        """Whether matrices are multiplied as INT8 x INT8."""
        return self.layer is not None and self.layer.integer_products

    @property
    def is_fp16(self) -> bool:
        """Whether it stores or computes in FP16. Such a precision is never recommended."""
        return torch.float16 in (self.storage, self.compute)

    @property
    def identity(self) -> tuple[object, ...]:
        """The fields that a result depends on."""
        return self.name, self.storage, self.compute


PRECISIONS = {
    row.name: row
    for row in (
        Precision("bf16", torch.bfloat16, torch.bfloat16, automatic=True),
        Precision("fp32", None, torch.float32, automatic=True, remedy=True),
        Precision("int8", None, None, Int8Linear, loss=1, automatic=True, remedy=True),
        Precision("int8-fast", None, None, Int8FastLinear, loss=2),
        Precision("nf4", None, None, Nf4Linear, loss=4, automatic=True),
        Precision("int8-bnb", None, None, Int8BnbLinear, loss=2),
        Precision("fp16", torch.float16, torch.float16),
    )
}
# FP16 arithmetic overflows in Qwen2.5-VL's vision tower, so FP16 is only how the weights are stored.
_TEXT_ENCODER_FP16 = Precision("fp16", torch.float16, None)

ROLE_PRECISIONS: dict[str, dict[str, Precision]] = {
    "transformer": PRECISIONS,
    "text_encoder": {name: PRECISIONS[name] for name in ("bf16", "fp32", "int8", "nf4")}
    | {"fp16": _TEXT_ENCODER_FP16},
    "vae": {name: PRECISIONS[name] for name in ("bf16", "fp32", "fp16")},
}
MATH = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve(precision: Precision, card: Card, math: str = "auto") -> Precision:
    """The precision with its arithmetic decided for this card.

    math: `auto`, or `fp32` or `bf16` to force the arithmetic. The storage stays as it is. Raises InputError
    for another value.
    """
    if math != "auto":
        if math not in MATH:
            raise InputError(f"math is {math!r}; choose auto, {' or '.join(MATH)}.")
        return replace(precision, compute=MATH[math])
    native = torch.bfloat16 if card.native_bf16 else torch.float32
    emulated = precision.compute is torch.bfloat16 and card.is_gpu and not card.native_bf16
    return replace(precision, compute=native) if precision.compute is None or emulated else precision


def require_library(precision: Precision, card: Card) -> None:
    """Raise FireRedError when a library of the precision is missing or does not work on the card.

    precision: resolved for the card.
    """
    if precision.layer is not None:
        precision.layer.require_usable(card, precision.math, precision.name)


def runs_on(precision: Precision, card: Card) -> bool:
    """Whether require_library finds nothing."""
    try:
        require_library(precision, card)
    except FireRedError:
        return False
    return True


def preferences(role: str, card: Card) -> tuple[str, ...]:
    """The precisions that `auto` tries on a card, in order. It takes the first that fits."""
    native = torch.bfloat16 if card.native_bf16 else torch.float32
    rows = ROLE_PRECISIONS[role].values()
    return tuple(row.name for row in rows if row.automatic and row.compute in (None, native))
