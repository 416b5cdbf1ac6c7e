"""The LoRA files in ComfyUI's model folders."""

from __future__ import annotations

import logging
from pathlib import Path

import folder_paths

from ..engine.errors import InputError
from ..engine.files.checkpoint import Checkpoint
from ..engine.files.lora import LoRA, is_lora_name, lora_identity, open_lora
from ..engine.limits import shown
from ..engine.weights.adapters import adaptable_layers

log = logging.getLogger("FireRed")

NO_LORA = "put a LoRA into models/loras"


def lora_names() -> list[str]:
    """The .safetensors files below ComfyUI's loras folders, or one line that says where to put them."""
    names = folder_paths.get_filename_list("loras")
    return list(filter(is_lora_name, names)) or [NO_LORA]


def get_lora(name: object, checkpoint: Checkpoint) -> LoRA:
    """The LoRA of that name for the checkpoint's transformer. Logs what of the file is not applied.

    Raises InputError for a name that is not there and a file made for another model, and CheckpointError.
    """
    if name is None or name == NO_LORA:
        raise InputError("There is no LoRA chosen. Choose one, or take this node out.")
    path = _path(name)
    if path is None:
        raise InputError(
            f"There is no LoRA {shown(name)} in {' or '.join(folder_paths.get_folder_paths('loras'))}."
        )
    lora = open_lora(path, adaptable_layers(checkpoint))
    if lora.left_out:
        log.warning("%s: not applied: %s", lora.name, lora.left_out)
    return lora


def lora_fingerprint(name: object) -> str:
    """For a node's fingerprint_inputs: changes when the file does. Never raises."""
    if name is None:  # a link gives it, so it may be any
        return " ".join(map(lora_fingerprint, lora_names()))
    path = _path(name)
    return "" if path is None else repr(lora_identity(path))


def _path(name: object) -> Path | None:
    if not isinstance(name, str):
        return None
    found = folder_paths.get_full_path("loras", name)
    return None if found is None else Path(found)
