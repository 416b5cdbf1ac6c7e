"""Checkpoints on disk: diffusers folders of the edit pipeline, their components and weight files.

Headers are read to describe and check the files. Tensors are read one at a time.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import AGAIN, CheckpointError
from ..latents import QWEN_STATISTICS, LatentStatistics
from .configs import read_config, read_json, read_latent_statistics
from .encodings import Encoded, Stored
from .identity import Content, folder_content, folder_identity
from .stored import read_encoded, stored_tensors
from .tensors import read_header

INDEX = "model_index.json"
PIPELINE_CLASS = "QwenImageEditPlusPipeline"
FIRERED = "FireRed-Image-Edit-1.0"
DOWNLOAD_COMMAND = f"hf download FireRedTeam/{FIRERED} --local-dir ComfyUI/models/diffusers/{FIRERED}"

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # without an index
# The same with a variant in the name, as save_pretrained(variant="fp16") writes them.
VARIANT = re.compile(r"(diffusion_pytorch_model|model)\.(safetensors\.index\.[^.]+\.json|[^.]+\.safetensors)")
SHARD = re.compile(r".*-\d+-of-\d+\.safetensors")
OTHER_WEIGHTS = (".safetensors", ".sft", ".bin", ".gguf", ".pt", ".pth", ".ckpt")
# Of a processor, one of each is needed. transformers 5 writes the first of these, transformers 4 the second.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


@dataclass(frozen=True)
class Component:
    """One component of a checkpoint, such as `transformer`. path: its folder."""

    path: Path
    name: str

    def config(self) -> dict[str, Any]:
        """Its config.json (scheduler_config.json for the scheduler), as read_config checks it."""
        return read_config(self.path, self.name)

    def shards(self) -> list[Path]:
        """The weight files, each checked. Raises CheckpointError naming one that is missing or incomplete."""
        shards = self._shard_paths()
        for shard in shards:
            read_header(shard)
        return shards

    def _shard_paths(self) -> list[Path]:
        files = self._file_names()
        plain = [name for name in files if name.endswith(".safetensors.index.json")]
        plain += [name for name in WEIGHT_FILES if name in files]
        variants = [name for name in files if VARIANT.fullmatch(name) and not SHARD.fullmatch(name)]
        if not plain and len(variants) > 1:
            raise CheckpointError(
                f"{self.path} has several variants of its weights: {', '.join(variants)}. Keep one of them."
            )
        for name in plain or variants:
            path = self.path / name
            return _indexed_shards(path) if name.endswith(".json") else [path]
        if any(map(SHARD.fullmatch, files)):
            raise CheckpointError(
                f"{self.path} has no *.safetensors.index.json beside its shards. Download it again; they "
                f"can stay."
            )
        others = [name for name in files if name.endswith(OTHER_WEIGHTS)]
        if not others:
            raise CheckpointError(f"No .safetensors weights in {self.path}. Download the folder again.")
        raise CheckpointError(
            f"No .safetensors weights in {self.path} that these nodes read ({' or '.join(WEIGHT_FILES)}): "
            f"it has {', '.join(others)}. Download the safetensors files of the original folder."
        )

    def _file_names(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.path) if not name.startswith("."))
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read ({error}). Check the disk.") from error

    def stored(self) -> Mapping[str, Stored]:
        """The tensors in its files, by name. Checks the files as shards() does."""
        return stored_tensors(self._shard_paths())

    def tensors(
        self, wanted: Callable[[str], bool] = lambda name: True, reuse_buffers_for: torch.device | None = None
    ) -> Iterator[tuple[str, Encoded]]:
        """The tensors whose names are `wanted`, one by one, on the CPU. See read_tensors."""
        chosen = {name: each for name, each in self.stored().items() if wanted(name)}
        yield from read_encoded(self.shards(), chosen, reuse_buffers_for)

    @property
    def needed(self) -> tuple[tuple[str, ...], ...]:
        """Of a processor: groups of files, of each of which one is needed."""
        return PROCESSOR_FILES, TOKENIZER_FILES

    @contextlib.contextmanager
    def readable(self) -> Iterator[Path]:
        """A folder from which libraries read it, inside the context."""
        yield self.path

    def identity(self) -> str:
        """A short hash of the component's files. See folder_identity."""
        return folder_identity(self.path)

    def content(self) -> Content:
        """Its files, equal for a copy on another machine. See folder_content."""
        return folder_content(self.path)


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder whose model_index.json names QwenImageEditPlusPipeline."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def component(self, name: str) -> Component:
        """The component. Raises CheckpointError when there is none."""
        component = Component(self.folder / name, name)
        if not component.path.is_dir():
            raise CheckpointError(f"Checkpoint {self.name!r} has no {name}/ folder in {self.folder}. {AGAIN}")
        return component

    def latent_statistics(self) -> LatentStatistics:
        """Its VAE's statistics, or Qwen-Image's if it has no VAE. Raises CheckpointError for bad ones."""
        path = self.folder / "vae" / "config.json"
        return read_latent_statistics(path) if path.is_file() else QWEN_STATISTICS


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`. Raises CheckpointError when that does not hold the edit pipeline."""
    index = folder / INDEX
    try:
        there = index.is_file()
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read ({error}). Check the permissions.") from error
    if not there:
        raise CheckpointError(
            f"{folder} has no model_index.json, so it is not a diffusers folder. {download_hint()}"
        )
    found = read_json(index).get("_class_name")
    if found != PIPELINE_CLASS:
        raise CheckpointError(f"{folder} holds a {found}, not a {PIPELINE_CLASS}. {download_hint()}")
    return Checkpoint(folder)


def download_hint() -> str:
    return f"Get FireRed with: {DOWNLOAD_COMMAND}"


def _indexed_shards(index: Path) -> list[Path]:
    """The weight files that an index lists. All are in the index's folder."""
    weight_map = read_json(index).get("weight_map")
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    if not names or any(name != os.path.basename(name) for name in names):
        raise CheckpointError(
            f"{index} has no weight_map that names the weight files. Download this file again; the others "
            f"can stay."
        )
    return [index.with_name(name) for name in sorted(names)]
