"""Ways to store a linear layer's matrix other than as one dtype: one file a way, one line in the table."""

from __future__ import annotations

from .bitsandbytes import Int8BnbLinear, Nf4Linear
from .int8 import Int8FastLinear, Int8Linear
from .linear import QuantizedLinear

FORMATS: dict[str, type[QuantizedLinear]] = {
    "int8": Int8Linear,
    "int8-fast": Int8FastLinear,
    "nf4": Nf4Linear,
    "int8-bnb": Int8BnbLinear,
}

__all__ = ["FORMATS", "QuantizedLinear"]
