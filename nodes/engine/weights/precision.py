"""Storage and arithmetic pairs, and which of them a device should get when nobody chose one.

A row here and, for a new way to store a matrix, a class in formats/ are all a new precision takes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..errors import InputError


@dataclass(frozen=True)
class Precision:
    """How a component's weights are stored and in which dtype it computes.

    storage: dtype of the matrices while resident; None keeps the checkpoint's own. compute: dtype of
    activations, of every product, and of small parameters (norms, biases); None is BF16 where the card has
    it, else FP32.
    format: the class in formats/ that stores the big matrices another way, and weight_bytes what that takes a
    weight. product_bytes: what its products take at least for each token and channel of the model's width.
    integer_products: whether matrices are multiplied as INT8 x INT8.
    loss: what the rounding costs the picture, as an order: 0 is lossless.
    """

    name: str
    storage: torch.dtype | None
    compute: torch.dtype | None
    format: str | None = None
    weight_bytes: float = 0.0
    product_bytes: float = 0.0
    needs_bitsandbytes: bool = False
    fp16_inside: bool = False  # whatever `compute` says
    integer_products: bool = False
    loss: int = 0

    @property
    def math(self) -> torch.dtype:
        """The dtype of its arithmetic, once it is resolved for a card."""
        assert self.compute is not None
        return self.compute


_INT8_BYTES = 1 + 4 / 3072  # a byte each and an FP32 scale a row
# INT32 sums of the MLP, four times as wide as the model, and what lives beside them: 0.74 GiB in BF16 at 8442
# tokens of 3072 on an H100.
_INT32_BYTES = 30.6
_NF4_BYTES = 0.5 + (1 + 4 / 256) / 64  # half a byte each, and double-quantised scales of blocks of 64

PRECISIONS = {
    row.name: row
    for row in (
        Precision("bf16", torch.bfloat16, torch.bfloat16),
        Precision("fp32", None, torch.float32),
        Precision("int8", None, None, "int8", _INT8_BYTES, loss=1),
        Precision(
            "int8-fast", None, None, "int8-fast", _INT8_BYTES, _INT32_BYTES, integer_products=True, loss=2
        ),
        Precision("nf4", None, None, "nf4", _NF4_BYTES, needs_bitsandbytes=True, loss=4),
        Precision(
            "int8-bnb",
            None,
            None,
            "int8-bnb",
            _INT8_BYTES,
            needs_bitsandbytes=True,
            fp16_inside=True,
            integer_products=True,
            loss=2,
        ),
        Precision("fp16", torch.float16, torch.float16),
    )
}
# FP16 as arithmetic overflows in Qwen2.5-VL's vision tower; as storage it is as good as any 16 bits.
_TEXT_ENCODER_FP16 = Precision("fp16", torch.float16, None)

ROLE_PRECISIONS: dict[str, dict[str, Precision]] = {
    "transformer": PRECISIONS,
    "text_encoder": {name: PRECISIONS[name] for name in ("bf16", "fp32", "int8", "nf4")}
    | {"fp16": _TEXT_ENCODER_FP16},
    "vae": {name: PRECISIONS[name] for name in ("bf16", "fp32", "fp16")},
}
MATH = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Card:
    """What one device can do, as far as choosing a precision needs to know.

    memory: bytes in all. is_gpu: an accelerator rather than the CPU. unfused: (role, dtype of its arithmetic)
    in which no kernel there does attention without holding all its scores.
    """

    label: str
    name: str
    native_bf16: bool
    memory: int
    is_gpu: bool = True
    unfused: frozenset[tuple[str, torch.dtype]] = frozenset()

    def __str__(self) -> str:
        return self.label if self.label == self.name else f"{self.label} ({self.name})"


def resolve(precision: Precision, card: Card, math: str = "auto") -> Precision:
    """The precision with its arithmetic decided for this card.

    math: `auto`, or `fp32` or `bf16` to force the arithmetic and leave the storage as it is.
    """
    if math != "auto":
        if math not in MATH:
            raise InputError(f"math is {math!r}; choose auto, {' or '.join(MATH)}.")
        return replace(precision, compute=MATH[math])
    if precision.compute is None or (
        precision.compute is torch.bfloat16 and card.is_gpu and not card.native_bf16
    ):
        return replace(precision, compute=torch.bfloat16 if card.native_bf16 else torch.float32)
    return precision


def preferences(role: str, card: Card) -> tuple[str, ...]:
    """What a card nobody chose a precision for should try, lossless first: the first that fits is the one."""
    native = "bf16" if card.native_bf16 else "fp32"
    return (native, *(name for name in ("int8", "nf4") if name in ROLE_PRECISIONS[role]))
