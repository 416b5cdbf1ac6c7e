"""What is on disk: diffusers folders of the edit pipeline, their components and their tensors.

Nothing here keeps weights: headers are read to describe and verify, tensors are handed out one at a time.
Format of the weights: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError

PIPELINE_CLASS = "QwenImageEditPlusPipeline"
FIRERED = "FireRed-Image-Edit-1.0"
DOWNLOAD_COMMAND = f"hf download FireRedTeam/{FIRERED} --local-dir ComfyUI/models/diffusers/{FIRERED}"

# Qwen-Image's latent statistics (16 channels), for checkpoints stored without a VAE folder.
# Source: the defaults of diffusers' AutoencoderKLQwenImage.
LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

MAX_HEADER_BYTES = 100_000_000  # the limit the safetensors library itself enforces


@dataclass(frozen=True)
class Component:
    """One component's folder of a checkpoint, such as `transformer`."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def config(self) -> dict[str, Any]:
        """The component's own config.json (scheduler_config.json for the scheduler)."""
        name = "scheduler_config.json" if self.name == "scheduler" else "config.json"
        return read_json(self.folder / name)

    def shards(self) -> list[Path]:
        """The weight files, each checked to be complete. Raises CheckpointError naming one that is not."""
        indexes = sorted(self.folder.glob("*.safetensors.index.json"))
        if indexes:
            names = sorted(set(read_json(indexes[0]).get("weight_map", {}).values()))
        else:
            names = [path.name for path in sorted(self.folder.glob("*.safetensors"))][:1]
        if not names:
            raise CheckpointError(f"No .safetensors weights in {self.folder}. Download the folder again.")
        shards = [self.folder / name for name in names]
        for shard in shards:
            read_header(shard)
        return shards

    def numel(self) -> int:
        """How many parameters the weight files hold."""
        headers = (read_header(shard) for shard in self.shards())
        return sum(prod(info["shape"]) for header in headers for info in header.values())

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every stored tensor in turn, memory-mapped on the CPU in its stored dtype."""
        for shard in self.shards():
            try:
                with safe_open(shard, framework="pt", device="cpu") as file:
                    for name in file.keys():  # noqa: SIM118 (not a dict)
                        yield name, file.get_tensor(name)
            except SafetensorError as error:
                raise CheckpointError(
                    f"{shard} cannot be read ({error}). Download this file again."
                ) from error

    def identity(self) -> str:
        """A short hash that changes when the component's files do (names, sizes, times; not contents)."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        stats = [
            (str(path.relative_to(self.folder)), path.stat().st_size, path.stat().st_mtime_ns)
            for path in files
        ]
        return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder whose model_index.json says QwenImageEditPlusPipeline."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def component(self, name: str) -> Component:
        """The component's folder. Raises CheckpointError when this checkpoint was stored without it."""
        component = Component(self.folder / name)
        if not component.folder.is_dir():
            raise CheckpointError(
                f"Checkpoint {self.name!r} has no {name}/ folder in {self.folder}. Download it again."
            )
        return component

    def latent_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latent channels, each (1, 16, 1, 1, 1) FP32 on the CPU."""
        config = (
            Component(self.folder / "vae").config() if (self.folder / "vae" / "config.json").is_file() else {}
        )
        mean = torch.tensor(config.get("latents_mean", LATENTS_MEAN))
        std = torch.tensor(config.get("latents_std", LATENTS_STD))
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Check that `folder` holds the edit pipeline. Raises CheckpointError saying what it holds instead."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise CheckpointError(
            f"{folder} has no model_index.json, so it is not a diffusers folder. {download_hint()}"
        )
    found = read_json(index).get("_class_name")
    if found != PIPELINE_CLASS:
        raise CheckpointError(f"{folder} holds a {found}, not a {PIPELINE_CLASS}. {download_hint()}")
    return Checkpoint(folder)


def find_checkpoints(roots: Iterable[str | Path]) -> dict[str, Path]:
    """Every edit-pipeline folder below the given roots, by its path relative to its root (with `/`)."""
    found: dict[str, Path] = {}
    for root in map(Path, roots):
        for folder, subfolders, files in os.walk(root, followlinks=True):
            if "model_index.json" not in files:
                continue
            subfolders.clear()
            try:
                checkpoint = open_checkpoint(Path(folder))
            except CheckpointError:
                continue
            found.setdefault(checkpoint.folder.relative_to(root).as_posix(), checkpoint.folder)
    return dict(sorted(found.items()))


def download_hint() -> str:
    return f"Get FireRed with: {DOWNLOAD_COMMAND}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk. Raises CheckpointError when it is missing or not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. Download the checkpoint again.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Download this file again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object. Download this file again.")
    return content


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Names, dtypes and shapes of a safetensors file, after checking that all its bytes are there."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, MAX_HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        expected = 8 + length + max((info["data_offsets"][1] for info in header.values()), default=0)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. Download this file again; the others can stay.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file ({error}). Download this file again."
        ) from error
    if size < expected:
        raise CheckpointError(
            f"{path} is truncated: {size:,} of {expected:,} bytes. Download this file again; the others can "
            f"stay."
        )
    return header
