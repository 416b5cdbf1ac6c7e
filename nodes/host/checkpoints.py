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

# Ships with the pack, so that it runs without a download. See its model card, FireRed-Demo/README.md.
BUILT_IN = Path(__file__).resolve().parents[2] / "demo_model" / "FireRed-Demo"
DEMO_HINT = "The template firered_demo runs without a download."
NO_CHECKPOINT = "put a FireRed folder into models/diffusers"
SEARCHING_SHARE = 0.1  # of all time that may go into searching the disk for checkpoints


def checkpoint_names() -> list[str]:
    """The edit-pipeline folders below ComfyUI's diffusers folders, the built-in one last.

    Without any, one line that says where to put them.
    """
    built_in = [BUILT_IN.name] if BUILT_IN.is_dir() else []
    return list(dict.fromkeys([*_found_checkpoints(), *built_in])) or [NO_CHECKPOINT]


def _found_checkpoints() -> dict[str, Path]:
    """Checkpoint folders by name. A slow search is kept longer: ComfyUI asks a dozen times a prompt."""
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
    """The checkpoint of that name, as checkpoint_names spells it.

    Raises CheckpointError that lists the user's checkpoints, or says what is wrong with this folder.
    """
    problem = None
    for root in (*_checkpoint_roots(), *([str(BUILT_IN.parent)] if name == BUILT_IN.name else [])):
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
        f"Choose one of {', '.join(found)}." if found else f"None is in {' or '.join(_checkpoint_roots())}."
    )
    download = "" if found else f" {download_hint()}"
    raise CheckpointError(f"There is no checkpoint {shown(name)}. {choices} {DEMO_HINT}{download}")


def _folder_below(root: str, name: object) -> Path | None:
    """The folder of that name below root, or None. Only a symbolic link may lead outside of root."""
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
    except (OSError, ValueError):  # it does not exist, is too long, or has a NUL
        return None


def validate_checkpoint(name: object) -> bool | str:
    """For a node's validate_inputs: True, or what is wrong. Never raises.

    name: None where it comes from a link. It is then unknown until the node runs.
    """
    if name is None:
        return True
    try:
        get_checkpoint(name)
    except FireRedError as error:
        return str(error)
    return True


def checkpoint_fingerprint(name: object, roles: Sequence[str]) -> str:
    """For a node's fingerprint_inputs: changes when the results of these components may. Never raises.

    name: None where it comes from a link. The fingerprint then covers every checkpoint.
    """
    if name is None:
        return " ".join(checkpoint_fingerprint(each, roles) for each in checkpoint_names())
    try:
        checkpoint = get_checkpoint(name)
    except FireRedError as error:
        return str(error)
    return " ".join(fingerprint(role, checkpoint) for role in roles)
