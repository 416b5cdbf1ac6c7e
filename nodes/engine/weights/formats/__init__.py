"""Ways to store a linear layer's matrix other than as one dtype: one file a library or kind of code."""

from __future__ import annotations

from .bitsandbytes import Int8BnbLinear, Nf4Linear
from .int8 import Int8FastLinear, Int8Linear
from .linear import QuantizedLinear

__all__ = ["Int8BnbLinear", "Int8FastLinear", "Int8Linear", "Nf4Linear", "QuantizedLinear"]
