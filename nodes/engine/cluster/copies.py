"""Find this machine's copies of files that a task from another machine names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path, PureWindowsPath
from typing import Any

from ..errors import CheckpointError
from ..files.checkpoint import Checkpoint
from ..files.identity import Content, file_content, folder_content
from ..files.lora import lora_files
from ..files.search import find_checkpoints, folders_below
from ..files.single import FileCheckpoint

FOLDERS_VARIABLE = "FIRERED_MODELS"  # this machine's model folders, with the system's separator between them
ROLE = "transformer"


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What another machine needs to find its copy: plain values for find_checkpoint."""
    return {
        "path": os.fspath(checkpoint.folder),
        "file": isinstance(checkpoint, FileCheckpoint),
        "content": checkpoint.component(ROLE).content(),
    }


def find_checkpoint(described: Mapping[str, Any]) -> Checkpoint:
    """This machine's copy of a checkpoint. Raises CheckpointError where there is none, or another one."""
    if described["file"]:
        return FileCheckpoint(_find(described, Path.is_file, file_content, _files), ROLE)
    return Checkpoint(_find(described, Path.is_dir, _transformer, _checkpoints))


def describe_lora(path: Path) -> dict[str, Any]:
    """What another machine needs to find its copy of a LoRA: plain values for find_lora."""
    return {"path": os.fspath(path), "content": _lora(path)}


def find_lora(described: Mapping[str, Any]) -> Path:
    """This machine's copy of a LoRA. Raises CheckpointError where there is none, or another one."""
    return _find(described, Path.is_file, _lora, _files)


def model_folders() -> list[Path]:
    """The folders in FOLDERS_VARIABLE."""
    return [Path(folder) for folder in os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep) if folder]


def _find(
    described: Mapping[str, Any],
    is_there: Callable[[Path], bool],
    content_of: Callable[[Path], Content],
    search: Callable[[str], Iterator[Path]],
) -> Path:
    """The first path with that content: the same path as there, else one of the same name, else any."""
    given: str = described["path"]
    wanted: Content = tuple((name, size, digest) for name, size, digest in described["content"])
    path, name = Path(given), PureWindowsPath(given).name  # which splits at / too
    tried: dict[Path, str] = {}
    for candidate in (path, *search(name)):
        try:
            if candidate not in tried and is_there(candidate):
                tried[candidate] = _difference(content_of(candidate), wanted)
                if not tried[candidate]:
                    return candidate
        except (OSError, CheckpointError) as error:
            tried[candidate] = str(error)
    if tried:
        path, difference = next(iter(tried.items()))
        raise CheckpointError(
            f"{path} is not what ComfyUI's machine has: {difference}. Copy {name} from there again."
        )
    folders = os.environ.get(FOLDERS_VARIABLE)
    where = f"below {FOLDERS_VARIABLE}={folders}" if folders else f"and {FOLDERS_VARIABLE} is not set"
    raise CheckpointError(
        f"There is no {name}: it is neither at {given} nor {where}. Copy it to this machine, set "
        f"{FOLDERS_VARIABLE} to the folder that it is in, and start Ray again there."
    )


def _difference(found: Content, wanted: Content) -> str:
    """What differs first, in words; empty where nothing does."""
    for here, there in zip_longest(found, wanted):
        if here != there:
            here_name, there_name = (each[0] or "the file" if each else "" for each in (here, there))
            if here and there and here_name == there_name:
                how = "has another size" if here[1] != there[1] else "has other content"
                return f"{here_name} {how}"
            return f"{there_name or here_name} is in one of them alone"
    return ""


def _transformer(folder: Path) -> Content:
    return folder_content(folder / ROLE)


def _lora(path: Path) -> Content:
    return tuple(content for each in lora_files(path) for content in file_content(each))


def _checkpoints(name: str) -> Iterator[Path]:
    """The checkpoints below the model folders, those of that name first."""
    found = find_checkpoints(model_folders()).values()
    yield from sorted(found, key=lambda folder: folder.name != name)


def _files(name: str) -> Iterator[Path]:
    """The files of that name below the model folders."""
    for _, folder, names in folders_below(model_folders()):
        if name in names:
            yield folder / name
