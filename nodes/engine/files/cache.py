"""Derived files on disk, such as quantised weights and embeddings. Users may delete them at any time.

A file gets its final name only when it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import struct
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..errors import CheckpointError, FireRedError
from ..notices import first_time
from .tensors import DTYPE_NAMES, TensorTypes, read_header, read_tensors

log = logging.getLogger("FireRed")

FOLDER_VARIABLE, SIZE_VARIABLE = "FIRERED_CACHE_DIR", "FIRERED_CACHE_GB"
DEFAULT_GB = 100
SUFFIX = ".firered.safetensors"  # only files with it are deleted
ABANDONED_SECONDS = 86_400  # a partial file this old is deleted
WRITING_SECONDS = 20  # a partial file that changed in these is being written
PROCESS = uuid.uuid4().hex[:12]  # process ids can repeat in containers that share a folder


def cache_limit() -> int:
    """How many bytes of derived files the user allows. Raises FireRedError for what is no number."""
    gigabytes = os.environ.get(SIZE_VARIABLE, DEFAULT_GB)
    try:
        return int(float(gigabytes) * 1e9)
    except (ValueError, OverflowError):
        raise FireRedError(f"{SIZE_VARIABLE} is {gigabytes!r}; set it to a number of gigabytes.") from None


@dataclass(frozen=True)
class DiskCache:
    """A folder of derived files, `limit` bytes in all. The least recently used are deleted first."""

    folder: Path
    limit: int

    def find(self, name: str) -> Path | None:
        """The file of that name, marked as just used, or None if there is none."""
        path = self.path(name)
        with contextlib.suppress(OSError):  # a folder that is read-only works too
            os.utime(path)
        return path if os.path.isfile(path) else None

    def create(self, name: str, layout: TensorTypes) -> CacheWriter | None:
        """Make room and return a writer for a new file of that name; None, logged, where that fails.

        Also None while another process writes that file, as several do that load the same weights at once.
        """
        if self._is_being_written(name):
            return None
        size = sum(_nbytes(dtype, shape) for dtype, shape in layout.values())
        try:
            self._make_room(size)
            return CacheWriter(self.path(name), layout)
        except OSError as error:
            warn_not_kept(self.path(name), error)
            return None

    def read(self, name: str) -> dict[str, torch.Tensor] | None:
        """The tensors of a small file, on the CPU; None if it is missing or damaged."""
        path = self.find(name)
        try:
            return dict(read_tensors(path)) if path else None
        except (OSError, CheckpointError):
            return None

    def map(self, name: str) -> dict[str, torch.Tensor] | None:
        """The tensors of a large file, mapped into memory; None if it is missing or damaged.

        They stay valid when any process deletes or replaces the file. These nodes never shorten a file.
        """
        path = self.find(name)
        try:
            if path is None:
                return None
            read_header(path)  # checks the size: reading a map past the file's end kills the process
            return load_file(path)
        except (OSError, SafetensorError, CheckpointError):
            return None

    def write(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a few small tensors, all or none. Raises OSError when the disk does not take them."""
        content = save({key: tensor.contiguous().cpu() for key, tensor in tensors.items()})
        self._make_room(len(content))
        partial = _partial(self.path(name))
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path(name))
        finally:
            _delete(partial)

    def names(self) -> Iterator[str]:
        """Of all files."""
        yield from (path.name.removesuffix(SUFFIX) for path, _ in self._files(f"*{SUFFIX}"))

    def remove(self, name: str) -> None:
        """Delete the file of that name, if there is one and the system allows it."""
        _delete(self.path(name))

    def path(self, name: str) -> Path:
        """The path of that name's file, which need not exist."""
        return self.folder / f"{name}{SUFFIX}"

    def _make_room(self, size: int) -> None:
        """Delete the least recently used files until `size` more bytes stay under the limit."""
        if size > self.limit:
            raise OSError(f"the cache's limit is {self.limit / 2**30:.1f} GiB")
        self.folder.mkdir(parents=True, exist_ok=True)
        for left_over, stat in self._files(f"*{SUFFIX}.*.partial"):
            if time.time() - stat.st_mtime > ABANDONED_SECONDS:
                _delete(left_over)
        used = 0
        for path, stat in sorted(self._files(f"*{SUFFIX}"), key=lambda file: -file[1].st_mtime):
            used += stat.st_size
            if used > self.limit - size:
                _delete(path)

    def _is_being_written(self, name: str) -> bool:
        written = (stat.st_mtime for _, stat in self._files(f"{name}{SUFFIX}.*.partial"))
        return any(time.time() - when < WRITING_SECONDS for when in written)

    def _files(self, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
        """The files that match, with their stat. Skips those that another process just deleted."""
        for path in self.folder.glob(pattern):
            with contextlib.suppress(OSError):
                yield path, path.lstat()


class CacheWriter:
    """Writes one safetensors file tensor by tensor, so that it is never whole in memory.

    The file gets its final name when every tensor is written. A full disk ends the writing, not the run.
    """

    def __init__(self, path: Path, layout: TensorTypes):
        self._path, self._partial = path, _partial(path)
        self._missing = set(layout)
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in layout.items():
            end = offset + _nbytes(dtype, shape)
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            self._offsets[name] = offset
            offset = end
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._start = 8 + len(encoded)
        self._file = self._partial.open("wb")
        try:
            self._file.write(struct.pack("<Q", len(encoded)) + encoded)
        except OSError:
            self.abandon()
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one of the layout's tensors, from any device. Does nothing after a failure."""
        if self._file.closed:
            return
        try:
            self._file.seek(self._start + self._offsets[name])
            self._file.write(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
            self._missing.discard(name)
        except OSError as error:
            self._give_up(error)

    def finish(self) -> None:
        """Give the file its final name if it is complete, else delete it."""
        if self._file.closed:
            return
        if self._missing:
            self.abandon()
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._partial, self._path)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        warn_not_kept(self._path, error)
        self.abandon()

    def abandon(self) -> None:
        """Close and delete the partial file, if there is one."""
        with contextlib.suppress(OSError):
            self._file.close()
        _delete(self._partial)


def warn_not_kept(path: Path, error: OSError) -> None:
    """Log that a file is not kept: once per folder and reason, as there may be hundreds of files."""
    reason = error.strerror or str(error)
    if first_time("not kept", path.parent, reason):
        log.warning(
            "not caching %s: %s. Nothing is lost: the next start computes it again. This is logged once, but "
            "other files of this folder may not be cached either.",
            path, reason,
        )  # fmt: skip


def digest(*parts: object) -> str:
    """A name of 32 hex digits for all these parts. Tensors and bytes count by content, others by repr."""
    hashed = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            hashed.update(repr((part.dtype, part.shape)).encode())
            part = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        content = part if isinstance(part, bytes) else repr(part).encode()
        hashed.update(len(content).to_bytes(8, "little") + content)
    return hashed.hexdigest()[:32]


def _partial(path: Path) -> Path:
    """The path a file is written to before it gets its name. No other process uses it."""
    return path.with_name(f"{path.name}.{PROCESS}.partial")


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
