"""Read safetensors and GGUF files: the header, then one tensor at a time.

The safetensors library maps a file into memory. For 2.3 GB that added 2.3 GB to the process, and was up to
three times slower from a cold disk; these reads added 0.3 GB. See
https://github.com/huggingface/safetensors#format for the format.
"""

from __future__ import annotations

import contextlib
import functools
import json
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from ..errors import CheckpointError
from . import gguf

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
TensorTypes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of tensors, by name
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_PINNED_BYTES = 2**28  # larger buffers stay pageable
# Of a transformer's tensors in files that may hold other components beside it.
TRANSFORMER_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
READERS = 4  # threads that read one file
PIECE_BYTES = 2**24  # that one thread reads at a time
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit


class Header(NamedTuple):
    """Dtype, shape and offsets of a file's tensors by name, the byte that offsets count from, and metadata.

    Of a GGUF file, see gguf.read_gguf_header.
    """

    tensors: Mapping[str, dict[str, Any]]
    start: int
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors or GGUF file. Each version of a file is read once in a process.

    Raises CheckpointError for a file that is missing, truncated or of another format.
    """
    return _read_header(path, *file_version(path))


def file_version(path: Path) -> tuple[int, int, int, int]:
    """Another one for each change of a file; its size comes first. Raises CheckpointError."""
    try:
        stat = path.stat()
    except (OSError, ValueError) as error:
        raise _missing_or(error, path) from None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def without_prefix(names: Collection[str]) -> dict[str, str]:
    """The names of a component's tensors in its files, by the same names without TRANSFORMER_PREFIXES.

    Where some names have such a prefix, the others belong to other components and are left out.
    """
    prefixed = {
        name.removeprefix(prefix): name
        for prefix in TRANSFORMER_PREFIXES
        for name in names
        if name.startswith(prefix)
    }
    return prefixed or {name: name for name in names}


def _missing_or(error: Exception, path: Path) -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path} is missing. Download this file again; the others can stay.")
    return CheckpointError(f"{path} is not a safetensors file ({error}). Download this file again.")


@functools.lru_cache(maxsize=64)
def _read_header(path: Path, size: int, *version: int) -> Header:
    """version: makes the cache read a changed file again."""
    if path.name.lower().endswith(gguf.SUFFIX):
        return Header(*gguf.read_gguf_header(path))
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, MAX_HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        for name, info in header.items():
            start, end = info["data_offsets"]
            dtype = DTYPES.get(info["dtype"])
            if dtype is not None and torch.Size(info["shape"]).numel() * dtype.itemsize != end - start:
                raise ValueError(f"the size of {name} does not match its shape")
        start_of_data = 8 + length
        expected = start_of_data + max((info["data_offsets"][1] for info in header.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise _missing_or(error, path) from error
    if size < expected:
        raise CheckpointError(
            f"{path} is truncated: {size:,} of {expected:,} bytes. Download this file again; the others can "
            f"stay."
        )
    return Header(header, start_of_data, metadata)


def read_tensors(
    path: Path,
    wanted: Callable[[str], bool] = lambda name: True,
    reuse_buffers_for: torch.device | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The `wanted` tensors of a file by name, on the CPU, in the order of the file.

    A thread reads the next tensor while the caller works on this one, so two are in host memory at most.
    reuse_buffers_for: the device to which the caller copies each tensor before it takes the next. All
    tensors then share two buffers. Raises CheckpointError.
    """
    header = read_header(path)
    entries = header.tensors
    names = sorted(filter(wanted, entries), key=lambda name: entries[name]["data_offsets"][0])
    buffers: list[torch.Tensor] = []
    if reuse_buffers_for is not None:
        largest = max((stored_bytes(entries[name]) for name in names), default=0)
        buffers = [_host_buffer(largest, reuse_buffers_for) for _ in range(2)]

    def read(index: int) -> torch.Tensor:
        return read_tensor(file, header, names[index], buffers[index % 2] if buffers else None)

    with ParallelFile(path) as file, ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, 0) if names else None
        for index, name in enumerate(names):
            assert ahead is not None
            tensor = ahead.result()
            ahead = reader.submit(read, index + 1) if index + 1 < len(names) else None
            yield name, tensor
            del tensor


def read_tensor(
    file: ParallelFile, header: Header, name: str, buffer: torch.Tensor | None = None
) -> torch.Tensor:
    """The tensor of that name, on the CPU. header: of the file. buffer: bytes that it may use.

    Raises CheckpointError.
    """
    entry = header.tensors[name]
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{file.path}: {name} is stored as {entry['dtype']}, which these nodes do not read."
        )
    size, start = stored_bytes(entry), header.start + entry["data_offsets"][0]
    data = torch.empty(size, dtype=torch.uint8) if buffer is None else buffer[:size]
    try:
        complete = file.read_into(data.numpy().data, start)
    except OSError as error:
        raise CheckpointError(
            f"{file.path} cannot be read ({error}). Check the disk, or download it again."
        ) from error
    if not complete:
        raise CheckpointError(f"{file.path} became shorter while it was read. Download this file again.")
    return data.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


class ParallelFile:
    """A file that several threads read: one thread is slower than a fast disk or the page cache."""

    def __init__(self, path: Path):
        self.path = path
        self._files: SimpleQueue[Any] = SimpleQueue()
        with contextlib.ExitStack() as opened:
            for _ in range(READERS):
                self._files.put(opened.enter_context(path.open("rb", buffering=0)))
            self._opened = opened.pop_all()
        self._pool = ThreadPoolExecutor(READERS)

    def __enter__(self) -> ParallelFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._opened.close()

    def read_into(self, data: memoryview, offset: int) -> bool:
        """Fill `data` from `offset` on. Returns False if the file ends too early. Raises OSError."""
        starts = range(0, len(data), PIECE_BYTES)
        pieces = [data[start : start + PIECE_BYTES] for start in starts]
        if len(pieces) < 2:  # not worth a thread
            return all(self._read_piece(piece, offset) for piece in pieces)
        return all(self._pool.map(self._read_piece, pieces, [offset + start for start in starts]))

    def _read_piece(self, piece: memoryview, offset: int) -> bool:
        file = self._files.get()
        try:
            file.seek(offset)
            while piece and (count := file.readinto(piece)):
                piece = piece[count:]
            return not piece
        finally:
            self._files.put(file)


def stored_bytes(info: dict[str, Any]) -> int:
    """The bytes a tensor takes in its file. info: its entry in the header."""
    start, end = info["data_offsets"]
    return end - start


def _host_buffer(size: int, device: torch.device) -> torch.Tensor:
    """Uninitialised bytes, pinned for a GPU if they are few: torch does not give pinned memory back."""
    pinned = device.type == "cuda" and size <= MAX_PINNED_BYTES
    return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
