"""Values as bytes for another machine: JSON and tensors, in the safetensors format. Nothing in it can run."""

from __future__ import annotations

import json
import struct
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

TENSOR = "\0tensor"  # in JSON: a tensor's name
JSON = "json"


class WireError(ValueError):
    """Bytes that `packed` did not make."""


def packed(value: Any) -> bytes:
    """The bytes of numbers, texts, None, tensors, and lists, tuples and dicts with text keys of these."""
    tensors: dict[str, torch.Tensor] = {}

    def plain(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            name = str(len(tensors))
            tensors[name] = part.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {TENSOR: name}
        if isinstance(part, dict):
            return {key: plain(each) for key, each in part.items()}
        return [plain(each) for each in part] if isinstance(part, list | tuple) else part

    return bytes(save(tensors, {JSON: json.dumps(plain(value))}))


def unpacked(content: bytes) -> Any:
    """The value. Its tuples have become lists. Raises WireError."""
    try:
        (length,) = struct.unpack_from("<Q", content)
        described = json.loads(content[8 : 8 + length])["__metadata__"][JSON]
        tensors = load(content)
        return _with_tensors(json.loads(described), tensors)
    except (struct.error, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WireError(f"not a message of these nodes ({error})") from error


def _with_tensors(part: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(part, dict):
        if TENSOR in part:
            return tensors[part[TENSOR]]
        return {key: _with_tensors(each, tensors) for key, each in part.items()}
    return [_with_tensors(each, tensors) for each in part] if isinstance(part, list) else part
