"""The checkpoints in ComfyUI's model folders."""

from __future__ import annotations

import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import folder_paths

from ..engine.errors import CheckpointError, FireRedError
from ..engine.files.checkpoint import Checkpoint, download_hint, open_checkpoint
from ..engine.files.search import find_checkpoints
from ..engine.limits import shown
from ..engine.weights.components import fingerprint

NO_CHECKPOINT = "put a FireRed folder into models/diffusers"
SEARCHING_SHARE = 0.1  # of the time that may go into searching the disk for checkpoints


def checkpoint_names() -> list[str]:
    """The edit-pipeline folders below ComfyUI's diffusers folders, or one line saying where to put them."""
    return list(_found_checkpoints()) or [NO_CHECKPOINT]


def _found_checkpoints() -> dict[str, Path]:
    """ComfyUI asks a dozen times a prompt; where the search is slow, its answer is remembered for longer."""
    global _search
    roots = tuple(_checkpoint_roots())
    started = time.monotonic()
    if roots != _search.roots or started >= _search.valid_until:
        found = find_checkpoints(roots)
        ended = time.monotonic()
        _search = _Search(roots, found, ended + (ended - started) / SEARCHING_SHARE)
    return _search.found


class _Search(NamedTuple):
    roots: tuple[str, ...]
    found: dict[str, Path]
    valid_until: float  # on the monotonic clock


_search = _Search((), {}, 0.0)


def _checkpoint_roots() -> list[str]:
    return folder_paths.get_folder_paths("diffusers")


def get_checkpoint(name: object) -> Checkpoint:
    """The checkpoint of that name, as checkpoint_names spells it. Raises CheckpointError saying what is there
    instead.
    """
    problem = None
    for root in _checkpoint_roots():
        folder = _folder_below(root, name)
        if folder is not None:
            try:
                return open_checkpoint(folder)
            except CheckpointError as error:
                problem = problem or error
    if problem is not None:
        raise problem
    found = _found_checkpoints()
    choices = (
        f"Choose one of {', '.join(found)}"
        if found
        else f"None is in {' or '.join(_checkpoint_roots())}. {download_hint()}"
    )
    raise CheckpointError(f"There is no checkpoint {shown(name)}. {choices}")


def _folder_below(root: str, name: object) -> Path | None:
    """The folder of that name below root, if there is one; a name never leads out of it, but links may."""
    if not isinstance(name, str) or not name:
        return None
    relative = Path(name)
    if relative.anchor or ".." in relative.parts:
        return None
    try:
        folder = Path(root, relative)
        return folder if stat.S_ISDIR(folder.stat().st_mode) else None
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"The checkpoint name {name!a} cannot be a path here: this system's encoding for file "
            f"names ({error.encoding}) lacks some of its letters. Rename the folder, or start Python with "
            "PYTHONUTF8=1."
        ) from None
    except (OSError, ValueError):  # not there, too long, or with a NUL
        return None


def validate_checkpoint(name: object) -> bool | str:
    """For a node's validate_inputs: True, or what is wrong. Never raises.

    name: None where a link gives it, which is not known before the run.
    """
    if name is None:
        return True
    try:
        get_checkpoint(name)
    except FireRedError as error:
        return str(error)
    return True


def checkpoint_fingerprint(name: object, roles: Sequence[str]) -> str:
    """For a node's fingerprint_inputs: changes when these components' results may. Never raises.

    name: None where a link gives it: it may be any.
    """
    if name is None:
        return " ".join(checkpoint_fingerprint(each, roles) for each in checkpoint_names())
    try:
        checkpoint = get_checkpoint(name)
    except FireRedError as error:
        return str(error)
    return " ".join(fingerprint(role, checkpoint) for role in roles)
