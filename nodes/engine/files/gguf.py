"""Read the header of a GGUF file, with the names and shapes of a safetensors header.

The gguf package makes an object of every word of a tokenizer, which took 8.6 seconds for a text encoder. Here
they are skipped. See https://github.com/ggml-org/ggml/blob/master/docs/gguf.md for the format.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from ..cards.libraries import require_libraries
from ..errors import CheckpointError, FireRedError

SUFFIX = ".gguf"
MAGIC, VERSIONS = b"GGUF", (2, 3)
PLAIN = {"F32": "F32", "F16": "F16", "F64": "F64", "I8": "I8", "I32": "I32", "I64": "I64", "BF16": "BF16"}
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # a field of ComfyUI's converter, for tensors of another shape
ARCHITECTURE, ALIGNMENT = "general.architecture", "general.alignment"
DEFAULT_ALIGNMENT = 32  # bytes, of the tensors
# Types of fields by their numbers, as struct spells them.
NUMBERS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING, ARRAY = 8, 9
FIELD_BYTES, TENSOR_BYTES = 13, 24  # that each takes at least
MAX_NAME_BYTES, MAX_SIDES = 65_535, 4  # the format's limits for keys, and for the shapes of tensors
U32, U64 = "<I", "<Q"


def read_gguf_header(path: Path) -> tuple[dict[str, dict[str, Any]], int, dict[str, str]]:
    """Its tensors by name, as entries of a safetensors header; where its data start; its architecture.

    The entry of a quantised one has dtype U8, the shape of its bytes, and `ggml`: the name of its type and
    the shape that it encodes. Raises CheckpointError.
    """
    try:
        require_libraries("gguf")
    except FireRedError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        with path.open("rb") as file:
            size = os.stat(file.fileno()).st_size
            header, start, fields = _Reader(file, size).header()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. Download this file again; the others can stay.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a GGUF file that these nodes read ({error}). Download this file again."
        ) from error
    except struct.error:
        raise CheckpointError(
            f"{path} is truncated: its header does not end in its {size:,} bytes. Download this file again."
        ) from None
    expected = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < expected:
        raise CheckpointError(
            f"{path} is truncated: {size:,} of {expected:,} bytes. Download this file again; the others can "
            "stay."
        )
    return header, start, {ARCHITECTURE: str(fields[ARCHITECTURE])} if ARCHITECTURE in fields else {}


class _Reader:
    """Reads a header from an open file of that size, from its start on.

    Its methods raise ValueError for what no GGUF file says, and struct.error where the file ends too early.
    """

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size

    def header(self) -> tuple[dict[str, dict[str, Any]], int, dict[str, Any]]:
        """The tensors' entries, where the data start, and the fields that are of use here."""
        if self._file.read(len(MAGIC)) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number(U32)
        if version not in VERSIONS:
            big_endian = version & 0xFFFF == 0
            raise ValueError("it is big-endian" if big_endian else f"it has version {version} of the format")
        tensors, fields = self._count(TENSOR_BYTES), self._count(FIELD_BYTES)
        kept: dict[str, Any] = {}
        for _ in range(fields):
            name, kind = self._name(), self._number(U32)
            if name in (ARCHITECTURE, ALIGNMENT) or name.startswith(ORIGINAL_SHAPE):
                kept[name] = self._value(kind)
            else:
                self._skip(kind, 1)
        entries = dict(self._tensor(kept) for _ in range(tensors))
        alignment = kept.get(ALIGNMENT, DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its tensors are aligned to {alignment!r} bytes")
        return entries, -(-self._file.tell() // alignment) * alignment, kept

    def _tensor(self, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The name and entry of the next tensor."""
        import gguf

        name, sides = self._name(), self._number(U32)
        if sides > MAX_SIDES:
            raise ValueError(f"{name} is said to have {sides} sides")
        shape = [self._number(U64) for _ in range(sides)][::-1]  # the last side comes first
        kind = gguf.GGMLQuantizationType(self._number(U32))
        start, numel = self._number(U64), math.prod(shape)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        original = fields.get(f"{ORIGINAL_SHAPE}{name}", shape)
        if numel % block or not isinstance(original, list) or math.prod(original) != numel:
            raise ValueError(f"{name} is said to have the shapes {shape} and {original}")
        size = numel // block * block_bytes
        entry: dict[str, Any] = {"data_offsets": [start, start + size]}
        if kind.name in PLAIN:
            return name, entry | {"dtype": PLAIN[kind.name], "shape": original}
        return name, entry | {"dtype": "U8", "shape": [size], "ggml": (kind.name, tuple(original))}

    def _number(self, kind: str) -> Any:
        return struct.unpack(kind, self._file.read(struct.calcsize(kind)))[0]

    def _count(self, fewest_bytes: int) -> int:
        """How many parts follow, each of at least so many bytes."""
        count: int = self._number(U64)
        if count * fewest_bytes > self._size:
            raise ValueError(f"it says that {count:,} parts follow, which is more than it can hold")
        return count

    def _name(self) -> str:
        length = self._number(U64)
        if length > MAX_NAME_BYTES:
            raise ValueError(f"it has a name of {length:,} bytes")
        name = self._file.read(length)
        if len(name) < length:
            raise struct.error
        return name.decode()

    def _value(self, kind: int) -> Any:
        """The next value of that type."""
        if kind == STRING:
            return self._name()
        if kind == ARRAY:
            kind = self._number(U32)
            return [self._value(kind) for _ in range(self._count(1))]
        if kind not in NUMBERS:
            raise ValueError(f"it has a field of the unknown type {kind}")
        return self._number(NUMBERS[kind])

    def _skip(self, kind: int, count: int) -> None:
        """Pass over so many values of that type."""
        if kind in NUMBERS:
            self._file.seek(count * struct.calcsize(NUMBERS[kind]), os.SEEK_CUR)
        elif kind == STRING:
            for _ in range(count):
                self._file.seek(self._count(1), os.SEEK_CUR)
        elif kind == ARRAY:
            for _ in range(count):
                self._skip(self._number(U32), self._count(1))
        else:
            raise ValueError(f"it has a field of the unknown type {kind}")
