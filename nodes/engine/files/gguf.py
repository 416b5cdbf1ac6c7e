"""Read the header of a GGUF file, with the names and shapes of a safetensors header."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..cards.libraries import require_libraries
from ..errors import CheckpointError, FireRedError

SUFFIX = ".gguf"
PLAIN = {"F32": "F32", "F16": "F16", "F64": "F64", "I8": "I8", "I32": "I32", "I64": "I64", "BF16": "BF16"}
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # a field of ComfyUI's converter, for tensors of another shape
ARCHITECTURE = "general.architecture"


def read_gguf_header(path: Path) -> tuple[dict[str, dict[str, Any]], int, dict[str, str]]:
    """Its tensors by name, as entries of a safetensors header; where its data start; its architecture.

    The entry of a quantised one has dtype U8, the shape of its bytes, and `ggml`: the name of its type and
    the shape that it encodes. Raises CheckpointError.
    """
    try:
        require_libraries("gguf")
    except FireRedError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if name == ARCHITECTURE}
        header = {tensor.name: _entry(reader, tensor) for tensor in reader.tensors}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. Download this file again; the others can stay.") from None
    except Exception as error:  # the library raises many types for damaged files
        raise CheckpointError(
            f"{path} is not a GGUF file that these nodes read, or it is truncated ({error}). Download this "
            "file again."
        ) from error
    return header, int(reader.data_offset), {name: str(value) for name, value in fields.items()}


def _entry(reader: Any, tensor: Any) -> dict[str, Any]:
    shape, kind = [int(side) for side in reversed(tensor.shape)], tensor.tensor_type.name
    original = reader.get_field(f"{ORIGINAL_SHAPE}{tensor.name}")
    if original is not None:
        shape = [int(side) for side in original.contents()]
    start, size = int(tensor.data_offset - reader.data_offset), int(tensor.n_bytes)
    entry: dict[str, Any] = {"data_offsets": [start, start + size]}
    if kind in PLAIN:
        return entry | {"dtype": PLAIN[kind], "shape": shape}
    return entry | {"dtype": "U8", "shape": [size], "ggml": (kind, tuple(shape))}
