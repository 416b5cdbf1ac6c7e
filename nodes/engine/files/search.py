"""Find the checkpoints below ComfyUI's model folders, and the single files of a component."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import CheckpointError
from .checkpoint import open_checkpoint
from .single import is_weight_file, role_of

MAX_DEPTH = 5  # folders below a root; a Hugging Face cache has models--NAME/snapshots/HASH
NEVER_SEARCHED = "blobs"  # the files of a Hugging Face cache


def find_checkpoints(roots: Iterable[str | Path]) -> dict[str, Path]:
    """Every edit-pipeline folder below the given roots, by its path relative to its root (with `/`).

    Each folder is searched once; its own path is preferred to a link's. Hidden folders, blobs of a Hugging
    Face cache, folders below a model_index.json and folders deeper than MAX_DEPTH are not searched.
    """
    found: dict[str, Path] = {}
    for root, folder in _pipeline_folders([Path(root) for root in roots]):
        with contextlib.suppress(CheckpointError):
            found.setdefault(folder.relative_to(root).as_posix(), open_checkpoint(folder).folder)
    return dict(sorted(found.items()))


def find_files(roots: Iterable[str | Path], role: str) -> dict[str, Path]:
    """Every file below the roots that holds that component, by its path relative to its root (with `/`)."""
    found: dict[str, Path] = {}
    for root in map(Path, roots):
        for folder, below, names in os.walk(root, followlinks=True):
            deep = len(Path(folder).relative_to(root).parts) >= MAX_DEPTH
            below[:] = [] if deep else sorted(name for name in below if not name.startswith("."))
            for name in filter(is_weight_file, names):
                path = Path(folder, name)
                if not name.startswith(".") and role_of(path) == role:
                    found.setdefault(path.relative_to(root).as_posix(), path)
    return dict(sorted(found.items()))


def _pipeline_folders(roots: list[Path]) -> Iterator[tuple[Path, Path]]:
    """Each folder that has a model_index.json, as (root, folder)."""
    folders = [(root, root, 0) for root in reversed(roots)]
    links: list[tuple[Path, Path, int]] = []
    seen: set[tuple[int, object]] = set()
    while folders or links:
        root, folder, depth = folders.pop() if folders else links.pop()
        try:
            stat = os.stat(folder)
            real = stat.st_dev, stat.st_ino or os.path.realpath(folder)  # some drives have no inode numbers
            if real in seen:
                continue
            seen.add(real)
            with os.scandir(folder) as listed:
                entries = sorted(listed, key=lambda entry: entry.name, reverse=True)
            below = [entry for entry in entries if _is_searched(entry)]
        except (OSError, ValueError):  # missing, not readable, or a name that this system does not allow
            continue
        if any(entry.name == "model_index.json" for entry in entries):
            yield root, folder
        elif depth < MAX_DEPTH:
            for entry in below:
                (links if entry.is_symlink() else folders).append((root, folder / entry.name, depth + 1))


def _is_searched(entry: os.DirEntry[str]) -> bool:
    try:
        return not entry.name.startswith(".") and entry.name != NEVER_SEARCHED and entry.is_dir()
    except OSError:  # a link to itself, or to a folder that is not readable
        return False
