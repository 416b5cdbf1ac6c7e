"""The allowed numbers, choices and texts. Widgets show these bounds, and code that uses a value checks it.

ComfyUI checks what the user types into a widget, but not a value that comes over a link.
"""

from __future__ import annotations

import numbers
import reprlib
from dataclasses import dataclass

from .errors import InputError


@dataclass(frozen=True)
class Whole:
    """The bounds of a whole number, both included. name: the input's, for errors."""

    name: str
    low: int
    high: int

    def require(self, value: object) -> int:
        """The value as an int. Raises InputError for anything but a whole number within the bounds."""
        number = as_number(value)
        if number is None or not self.low <= number <= self.high or number != int(number):
            raise InputError(
                f"{self.name} is {shown(value)}; it must be a whole number from {self.low} to {self.high}."
            )
        return int(number)


@dataclass(frozen=True)
class Real:
    """The bounds of a number, both included. name: the input's, for errors."""

    name: str
    low: float
    high: float

    def require(self, value: object) -> float:
        """The value as a float. Raises InputError for anything but a number within the bounds."""
        number = as_number(value)
        if number is None or not self.low <= number <= self.high:
            raise InputError(
                f"{self.name} is {shown(value)}; it must be a number from {self.low} to {self.high}."
            )
        return float(number)


@dataclass(frozen=True)
class Choice:
    """The values of a combo. name: the input's, for errors."""

    name: str
    options: tuple[str, ...]

    def require(self, value: object) -> str:
        """The value unchanged. Raises InputError for anything but an option."""
        if not isinstance(value, str) or value not in self.options:
            raise InputError(f"{self.name} is {shown(value)}; choose one of {', '.join(self.options)}.")
        return value


STEPS = Whole("steps", 1, 1000)
SEED = Whole("seed", 0, 2**64 - 1)
TRUE_CFG_SCALE = Real("cfg", 0.0, 100.0)
REFERENCE_MEGAPIXELS = Real("reference_megapixels", 0.01, 4.0)
MAX_PICTURES = 10  # in one edit
REFERENCES = Whole("references", 0, MAX_PICTURES)
MEGAPIXELS, NATIVE = SIZES = ("megapixels", "native")
SIZE = Choice("size", SIZES)
RESUME = Choice("resume", ("on", "off"))
AUTO, EXACT, INT8 = "auto", "exact", "int8"  # of attention: torch's, or one that rounds to INT8
ATTENTION = Choice("attention", (AUTO, EXACT, INT8))
TILING = Choice("tiling", ("auto", "whole", "tiled"))


def require_text(value: object, what: str) -> str:
    """The text unchanged. what: its name for errors. Raises InputError for anything but valid text."""
    if not isinstance(value, str):
        raise InputError(f"{what} is {shown(value)}; it must be text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} holds half of a character (a lone surrogate) at position {error.start + 1}: the program "
            "that sent it cut an emoji or another sign in two. Remove it or write it again."
        ) from None
    return value


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100  # letters


def shown(value: object) -> str:
    """A value for an error message: shortened if it is long, escaped if it cannot be printed."""
    text = _SHORT.repr(value)
    return text if text.isprintable() else ascii(text)[1:-1]


def as_number(value: object) -> int | float | None:
    """The value if it is a real number, else None. A bool gives None: it is meant for another input."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None
