"""The forms in which files store a tensor: plain numbers, or codes with scales. All decode in plain torch.

Several stored tensors can make one: a matrix in FP8 or INT8 and its scales, a bitsandbytes matrix and its
tables. GGUF stores blocks of codes with their scales inside.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..errors import CheckpointError
from .rotations import Rotation, rotated

MATRIX = ""  # the part that holds the numbers or codes themselves
SCALE = "scale"
Parts = Mapping[str, torch.Tensor]


class Encoding:
    """How a tensor is stored. `decode` gives FP32, wherever the parts are."""

    @property
    def quick(self) -> bool:
        """Whether decoding is quick enough to be done at each use of the tensor."""
        return True

    def decode(self, parts: Parts, shape: tuple[int, ...]) -> torch.Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Plain(Encoding):
    """Numbers of a dtype, FP8 without scales included. Decoding changes nothing."""

    dtype: torch.dtype

    def decode(self, parts: Parts, shape: tuple[int, ...]) -> torch.Tensor:
        return parts[MATRIX]


@dataclass(frozen=True)
class Unknown(Encoding):
    """Of a dtype that is not read here. It matters only where the tensor is needed."""

    dtype_name: str


@dataclass(frozen=True)
class Fp8(Encoding):
    """FP8 numbers times one scale, or a scale for each row."""

    def decode(self, parts: Parts, shape: tuple[int, ...]) -> torch.Tensor:
        return parts[MATRIX].float().mul_(row_scales(parts[SCALE], shape))


@dataclass(frozen=True)
class Int8(Encoding):
    """INT8 times one scale, or a scale for each row.

    rotation: of the input channels. divisor: of the scales.
    """

    rotation: Rotation | None = None
    divisor: float = 1.0

    def scales(self, parts: Parts, rows: int) -> torch.Tensor:
        """(rows, 1) FP32."""
        return row_scales(parts[SCALE], (rows, 1)) / self.divisor

    def decode(self, parts: Parts, shape: tuple[int, ...]) -> torch.Tensor:
        scales = row_scales(parts[SCALE], shape) / self.divisor
        return rotated(parts[MATRIX].float().mul_(scales), self.rotation)


@dataclass(frozen=True)
class Bnb4(Encoding):
    """4-bit codes of bitsandbytes, NF4 or FP4. Its other parts are those that the library saves."""

    def state(self, parts: Parts) -> Any:
        """The library's QuantState. Raises CheckpointError for tables that it cannot read."""
        tables = {name: tensor for name, tensor in parts.items() if name != MATRIX}
        device = parts[MATRIX].device
        try:
            functional = importlib.import_module("bitsandbytes.functional")
            return functional.QuantState.from_dict({f"weight.{n}": t for n, t in tables.items()}, device)
        except ImportError as error:
            raise CheckpointError(f"These weights need bitsandbytes ({error}). Install it.") from error
        except Exception as error:  # the library raises many types
            raise CheckpointError(
                f"The tables of a 4-bit matrix cannot be read ({error}). Download the file again."
            ) from error

    def decode(self, parts: Parts, shape: tuple[int, ...]) -> torch.Tensor:
        state = self.state(parts)
        state.dtype = torch.float32
        functional = importlib.import_module("bitsandbytes.functional")
        return functional.dequantize_4bit(parts[MATRIX], state).reshape(shape)


@dataclass(frozen=True)
class Ggml(Encoding):
    """Blocks of codes with their scales, as GGUF stores them. type_name: such as "Q4_K"."""

    type_name: str

    @property
    def quick(self) -> bool:
        return self._in_torch is not None

    @functools.cached_property
    def _in_torch(self) -> Any:
        """diffusers' function for the type, which runs on every device; None where it has none."""
        import gguf
        from diffusers.quantizers.gguf.utils import dequantize_functions

        return dequantize_functions.get(gguf.GGMLQuantizationType[self.type_name])

    def decode(self, parts: Parts, shape: tuple[int, ...]) -> torch.Tensor:
        import gguf

        kind, codes = gguf.GGMLQuantizationType[self.type_name], parts[MATRIX]
        block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
        if self._in_torch is None:
            numbers = gguf.dequantize(codes.cpu().numpy().reshape(-1, type_size), kind)
            return torch.from_numpy(numbers).reshape(shape).to(codes.device)
        blocks = codes.reshape(-1, type_size)
        return self._in_torch(blocks, block_size, type_size, dtype=torch.float32).reshape(shape)


class Stored(NamedTuple):
    """A tensor in files. parts: the names of what makes it, in the files. nbytes: of all of them."""

    encoding: Encoding
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    nbytes: int

    @property
    def decoded_dtype(self) -> torch.dtype:
        return self.encoding.dtype if isinstance(self.encoding, Plain) else torch.float32


class Encoded(NamedTuple):
    """A tensor that was read, in its stored form."""

    encoding: Encoding
    shape: tuple[int, ...]
    parts: Parts

    def to(self, device: torch.device, copy: bool = True) -> Encoded:
        """On the device. copy: also where it is there already."""
        parts = {name: tensor.to(device, copy=copy) for name, tensor in self.parts.items()}
        return self._replace(parts=parts)

    def decode(self) -> torch.Tensor:
        """FP32 on the device of its parts; plain numbers as they are."""
        return self.encoding.decode(self.parts, self.shape)


def row_scales(scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A scale for all or for each row of a tensor of that shape: (rows, 1, ...) FP32."""
    sides = [1] * (len(shape) - 1)
    return scale.float().reshape(-1, *sides).expand(shape[0], *sides)
