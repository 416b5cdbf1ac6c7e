"""Find the checkpoints below ComfyUI's model folders, and the single files of a component."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import CheckpointError
from .checkpoint import INDEX, open_checkpoint
from .single import is_weight_file, role_of

MAX_DEPTH = 5  # folders below a root; a Hugging Face cache has models--NAME/snapshots/HASH
NEVER_SEARCHED = "blobs"  # the files of a Hugging Face cache


def find_checkpoints(roots: Iterable[str | Path]) -> dict[str, Path]:
    """Every edit-pipeline folder below the given roots, by its path relative to its root (with `/`).

    Each folder is searched once; its own path is preferred to a link's. Hidden folders, blobs of a Hugging
    Face cache, folders below a model_index.json and folders deeper than MAX_DEPTH are not searched.
    """
    found: dict[str, Path] = {}
    for root, folder, names in folders_below(roots, last=INDEX):
        with contextlib.suppress(CheckpointError):
            if INDEX in names:
                found.setdefault(folder.relative_to(root).as_posix(), open_checkpoint(folder).folder)
    return dict(sorted(found.items()))


def find_files(roots: Iterable[str | Path], role: str) -> dict[str, Path]:
    """Every file below the roots that holds that component, by its path relative to its root (with `/`).

    The same folders are searched as for checkpoints, and those below a model_index.json.
    """
    found: dict[str, Path] = {}
    for root, folder, names in folders_below(roots):
        for name in filter(is_weight_file, names):
            if not name.startswith(".") and role_of(folder / name) == role:
                found.setdefault((folder / name).relative_to(root).as_posix(), folder / name)
    return dict(sorted(found.items()))


def folders_below(roots: Iterable[str | Path], last: str = "") -> Iterator[tuple[Path, Path, list[str]]]:
    """Each folder once, as (root, folder, names in it).

    last: the name of a file. Folders below one that has it are not searched.
    """
    folders = [(root, root, 0) for root in reversed(list(map(Path, roots)))]
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
        names = [entry.name for entry in entries]
        yield root, folder, names
        if depth < MAX_DEPTH and last not in names:
            for entry in below:
                (links if entry.is_symlink() else folders).append((root, folder / entry.name, depth + 1))


def _is_searched(entry: os.DirEntry[str]) -> bool:
    try:
        return not entry.name.startswith(".") and entry.name != NEVER_SEARCHED and entry.is_dir()
    except OSError:  # a link to itself, or to a folder that is not readable
        return False
