"""An identity for files that changes when their content changes."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointError
from .tensors import read_header

SAMPLED_BYTES = 2**22  # about how much of a big file is read
MIN_SAMPLE_BYTES = 2**12  # per tensor

Content = tuple[tuple[str, int, str], ...]  # of files: name, size, digest of the samples


def folder_identity(folder: Path) -> str:
    """A short hash of the files below a folder: their names, sizes, times and content.

    Small files are read whole; of big ones the header, a block from the middle of every tensor, and the end.
    So two fine-tunes differ even if all sizes and times are equal. It misses only a change inside big tensors
    that leaves the sampled blocks, the size and the times as they were. Each version of a file is read once
    in a process. Hidden files do not count. Raises CheckpointError when the folder cannot be read.
    """
    parts = [(name, *file_identity(path)) for name, path in _files(folder).items()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def folder_content(folder: Path) -> Content:
    """The files below a folder, as folder_identity counts them, without times: equal for a copy elsewhere.

    Raises CheckpointError when the folder cannot be read.
    """
    return tuple(content for name, path in _files(folder).items() for content in file_content(path, name))


def file_content(path: Path, name: str = "") -> Content:
    """A file, as folder_content gives it."""
    size, _, digest = file_identity(path)
    return ((name, size, digest),)


def _files(folder: Path) -> dict[str, Path]:
    """The files below a folder that are not hidden, by their paths relative to it (with `/`)."""
    try:
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
        shown = (name for name in sorted(files) if not name.startswith(".") and "/." not in name)
        return {name: files[name] for name in shown if files[name].is_file()}
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error}). Check the permissions.") from error


def file_identity(path: Path) -> tuple[int, int, str]:
    """A file's size, its time in nanoseconds and a digest of its content (see folder_identity).

    They are 0, 0 and "" for a file that cannot be read.
    """
    try:
        stat = path.stat()
        version = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
        return stat.st_size, stat.st_mtime_ns, _content(os.fspath(path), *version)
    except (OSError, ValueError):
        return 0, 0, ""


@functools.lru_cache(maxsize=4096)
def _content(path: str, size: int, *version: int) -> str:
    """A digest of a file's samples. version: makes the cache read a changed file again."""
    hashed = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        for start, length in _samples(Path(path), size):
            file.seek(start)
            hashed.update(file.read(length))
    return hashed.hexdigest()


def _samples(path: Path, size: int) -> Iterator[tuple[int, int]]:
    """Start and length of each sample of a file, in ascending order."""
    if size <= SAMPLED_BYTES or path.suffix == ".json":
        yield 0, size
        return
    try:
        header, start_of_data, _ = read_header(path)
    except CheckpointError:
        header, start_of_data = {}, SAMPLED_BYTES
    yield 0, start_of_data
    length = max(MIN_SAMPLE_BYTES, SAMPLED_BYTES // max(len(header), 1))
    for start, end in sorted(info["data_offsets"] for info in header.values()):
        yield start_of_data + max(start, (start + end - length) // 2), min(length, end - start)
    yield size - MIN_SAMPLE_BYTES, MIN_SAMPLE_BYTES
