"""Layers that store a matrix in a format of their own, such as INT8 rows with scales.

Each format is a QuantizedLinear. Casting a plain tensor to another dtype needs no class here.
"""

from __future__ import annotations

from .bitsandbytes import Int8BnbLinear, Nf4Linear
from .int8 import Int8FastLinear, Int8Linear, weights_only
from .linear import QuantizedLinear

__all__ = ["Int8BnbLinear", "Int8FastLinear", "Int8Linear", "Nf4Linear", "QuantizedLinear", "weights_only"]
