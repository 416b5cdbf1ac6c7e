"""The checkpoints in ComfyUI's model folders."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import comfy
import folder_paths

from ..engine.errors import CheckpointError, FireRedError
from ..engine.files.checkpoint import Checkpoint, download_hint, open_checkpoint
from ..engine.files.search import find_checkpoints, find_files
from ..engine.files.single import open_file
from ..engine.limits import shown
from ..engine.weights.components import fingerprint

# Ships with the pack, so that it runs without a download. See its model card, FireRed-Demo/README.md.
BUILT_IN = Path(__file__).resolve().parents[2] / "demo_model" / "FireRed-Demo"
DEMO_HINT = "The template firered_demo runs without a download."
# ComfyUI's folders for single files of each component.
FILE_FOLDERS = {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}
TOKENIZER = Path(comfy.__path__[0]) / "text_encoders" / "qwen25_tokenizer"  # ComfyUI's own copy
NO_CHECKPOINT = "put a FireRed folder into models/diffusers"
SEARCHING_SHARE = 0.1  # of all time that may go into searching the disk for checkpoints


def checkpoint_names(role: str) -> list[str]:
    """What a loader of that component can choose: folders of the edit pipeline, single files, the built-in.

    Without any, one line that says where to put them.
    """
    built_in = [BUILT_IN.name] if BUILT_IN.is_dir() else []
    return list(dict.fromkeys([*_found(role), *built_in])) or [NO_CHECKPOINT]


def _found(role: str) -> dict[str, Path]:
    """Folders and then files, by name. A slow search is kept longer: ComfyUI asks a dozen times a prompt."""
    roots, started = tuple(_checkpoint_roots()), time.monotonic()
    file_roots = tuple(folder_paths.get_folder_paths(FILE_FOLDERS[role]))
    last = _searches.get(role)
    if last is None or last.roots != (roots, file_roots) or started >= last.valid_until:
        files = find_files(file_roots, role)
        found = {**files, **find_checkpoints(roots)}
        ordered = {name: found[name] for name in sorted(found, key=lambda name: (name in files, name))}
        ended = time.monotonic()
        last = _Search((roots, file_roots), ordered, ended + (ended - started) / SEARCHING_SHARE)
        _searches[role] = last
    return last.found


class _Search(NamedTuple):
    roots: tuple[tuple[str, ...], tuple[str, ...]]
    found: dict[str, Path]
    valid_until: float  # on the monotonic clock


_searches: dict[str, _Search] = {}


def _checkpoint_roots() -> list[str]:
    return folder_paths.get_folder_paths("diffusers")


def get_checkpoint(name: object, role: str) -> Checkpoint:
    """The checkpoint of that name, as checkpoint_names spells it for that component.

    A name may also have backslashes or capitals as another system wrote them. Raises CheckpointError that
    lists the user's checkpoints, or says what is wrong with this one.
    """
    problem = None
    roots = [*_checkpoint_roots(), *([str(BUILT_IN.parent)] if name == BUILT_IN.name else [])]
    for path in filter(None, (_path_below(root, name) for root in roots)):
        if path.is_dir():
            try:
                return open_checkpoint(path)
            except CheckpointError as error:
                problem = problem or error
    file_roots = folder_paths.get_folder_paths(FILE_FOLDERS[role])
    for path in filter(None, (_path_below(root, name) for root in file_roots)):
        if path.is_file():
            try:
                return open_file(path, role, TOKENIZER)
            except CheckpointError as error:
                problem = problem or error
    if problem is not None:
        raise problem
    found = _found(role)
    spelled = next((each for each in found if isinstance(name, str) and _alike(each) == _alike(name)), None)
    if spelled is not None and spelled != name:
        return get_checkpoint(spelled, role)
    where = " or ".join([*_checkpoint_roots(), *file_roots])
    choices = f"Choose one of {', '.join(found)}." if found else f"None is in {where}."
    download = "" if found else f" {download_hint()}"
    raise CheckpointError(f"There is no checkpoint {shown(name)}. {choices} {DEMO_HINT}{download}")


def _alike(name: str) -> str:
    """The same for names that differ as Windows and Linux spell them."""
    return name.replace("\\", "/").casefold()


def _path_below(root: str, name: object) -> Path | None:
    """The folder or file of that name below root, or None. Only a symbolic link may lead outside of root."""
    if not isinstance(name, str) or not name:
        return None
    relative = Path(name)
    if relative.anchor or ".." in relative.parts:
        return None
    try:
        path = Path(root, relative)
        path.stat()
        return path
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"The checkpoint name {name!a} cannot be a path here: this system's encoding for file "
            f"names ({error.encoding}) lacks some of its letters. Rename it, or start Python with "
            "PYTHONUTF8=1."
        ) from None
    except (OSError, ValueError):  # it does not exist, is too long, or has a NUL
        return None


def validate_checkpoint(name: object, role: str) -> bool | str:
    """For a node's validate_inputs: True, or what is wrong. Never raises.

    name: None where it comes from a link. It is then unknown until the node runs.
    """
    if name is None:
        return True
    try:
        get_checkpoint(name, role)
    except FireRedError as error:
        return str(error)
    return True


def checkpoint_fingerprint(name: object, role: str, roles: Sequence[str] = ()) -> str:
    """For a node's fingerprint_inputs: changes when the results of its components may. Never raises.

    name: None where it comes from a link. The fingerprint then covers every checkpoint. role: of the list
    that the name is from. roles: the components, if others than that.
    """
    if name is None:
        return " ".join(checkpoint_fingerprint(each, role, roles) for each in checkpoint_names(role))
    try:
        checkpoint = get_checkpoint(name, role)
    except FireRedError as error:
        return str(error)
    return " ".join(fingerprint(each, checkpoint) for each in roles or [role])
