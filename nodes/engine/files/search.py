"""The checkpoints below ComfyUI's model folders."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import CheckpointError
from .checkpoint import open_checkpoint

MAX_DEPTH = 5  # of a checkpoint below its root: a Hugging Face cache has it in models--NAME/snapshots/HASH
NEVER_SEARCHED = "blobs"  # of a Hugging Face cache; and what is hidden


def find_checkpoints(roots: Iterable[str | Path]) -> dict[str, Path]:
    """Every edit-pipeline folder below the given roots, by its path relative to its root (with `/`).

    Each real folder is looked at once, whatever links lead to it, and where it is before where a link leads.
    Nothing is looked for below a folder with a model_index.json, in caches and hidden folders, or deeper than
    MAX_DEPTH.
    """
    found: dict[str, Path] = {}
    for root, folder in _pipeline_folders([Path(root) for root in roots]):
        with contextlib.suppress(CheckpointError):
            found.setdefault(folder.relative_to(root).as_posix(), open_checkpoint(folder).folder)
    return dict(sorted(found.items()))


def _pipeline_folders(roots: list[Path]) -> Iterator[tuple[Path, Path]]:
    """Each folder that has a model_index.json, after the root that it is below."""
    folders = [(root, root, 0) for root in reversed(roots)]
    links: list[tuple[Path, Path, int]] = []
    seen: set[tuple[int, object]] = set()
    while folders or links:
        root, folder, depth = folders.pop() if folders else links.pop()
        try:
            there = os.stat(folder)
            real = there.st_dev, there.st_ino or os.path.realpath(folder)  # some drives number nothing
            if real in seen:
                continue
            seen.add(real)
            with os.scandir(folder) as listed:
                entries = sorted(listed, key=lambda entry: entry.name, reverse=True)
            below = [entry for entry in entries if _is_searched(entry)]
        except (OSError, ValueError):  # not there, not ours to read, or a name this system cannot hold
            continue
        if any(entry.name == "model_index.json" for entry in entries):
            yield root, folder
        elif depth < MAX_DEPTH:
            for entry in below:
                (links if entry.is_symlink() else folders).append((root, folder / entry.name, depth + 1))


def _is_searched(entry: os.DirEntry[str]) -> bool:
    try:
        return not entry.name.startswith(".") and entry.name != NEVER_SEARCHED and entry.is_dir()
    except OSError:  # a link to itself, or into what is not ours to read
        return False
