"""Storage and arithmetic pairs, and which of them a device should get when nobody chose one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .errors import InputError


@dataclass(frozen=True)
class Precision:
    """How a component's weights are stored and in which dtype it computes.

    storage: dtype of the matrices while resident; None keeps the checkpoint's own.
    compute: dtype of activations, of every product, and of small parameters (norms, biases).
    """

    name: str
    storage: torch.dtype | None
    compute: torch.dtype


PRECISIONS = {
    "bf16": Precision("bf16", torch.bfloat16, torch.bfloat16),
    "fp32": Precision("fp32", None, torch.float32),
    "fp16": Precision("fp16", torch.float16, torch.float16),
}
MATH = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Card:
    """What one device can do, as far as choosing a precision needs to know."""

    label: str
    name: str
    native_bf16: bool

    def __str__(self) -> str:
        return self.label if self.label == self.name else f"{self.label} ({self.name})"


def automatic_precision(card: Card) -> tuple[str, str]:
    """The precision for a device nobody chose one for, with the reason for the log line."""
    if card.native_bf16:
        return "bf16", "native bf16"
    return "fp32", "no native bf16, and fp16 overflows in this model"


def with_math(precision: Precision, math: str) -> Precision:
    """Force the arithmetic, leaving the storage as it is. `auto` changes nothing."""
    if math == "auto":
        return precision
    if math not in MATH:
        raise InputError(f"math is {math!r}; choose auto, {' or '.join(MATH)}.")
    return replace(precision, compute=MATH[math])
