"""Checkpoints are told apart by content, and what is made of one is never taken for another's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import replica_for
from engine.errors import CheckpointError
from engine.files.cache import DiskCache
from engine.files.checkpoint import Checkpoint
from engine.models import loading
from engine.sampling.encoded_cache import embedding_name
from engine.weights.components import fingerprint
from other_versions import change_json
from safetensors.torch import load_file, save_file
from tiny_checkpoint import WEIGHTS


def same_times(folder: Path) -> None:
    """Give every file the same time, as container layers and the Nix store do."""
    for path in folder.rglob("*"):
        os.utime(path, ns=(10**9, 10**9))


@pytest.mark.parametrize("role", WEIGHTS)
def test_fine_tunes_of_equal_sizes_and_times_are_two(tiny_copy: Path, tmp_path: Path, role: str) -> None:
    other = Path(shutil.copytree(tiny_copy, tmp_path / "other" / tiny_copy.name))
    tensors = load_file(other / WEIGHTS[role])
    name = sorted(tensors)[len(tensors) // 2]
    tensors[name] = tensors[name] + 0.25
    save_file(tensors, other / WEIGHTS[role], metadata={"format": "pt"})
    for folder in (tiny_copy, other):
        same_times(folder)
    assert (tiny_copy / WEIGHTS[role]).stat().st_size == (other / WEIGHTS[role]).stat().st_size
    first, second = (replica_for(Checkpoint(folder), role, "bf16") for folder in (tiny_copy, other))
    assert first.spec.identity != second.spec.identity


def test_every_tensor_of_a_big_file_counts(tmp_path: Path) -> None:
    """64 matrices, 16 MiB together, and as many small vectors. One of them changes at a time."""
    tensors = {f"{number}.weight": torch.zeros(256, 256) for number in range(64)}
    tensors |= {f"{number}.bias": torch.zeros(256) for number in range(64)}
    seen = set()
    for changed in (None, "0.weight", "31.weight", "63.weight", "0.bias", "40.bias"):
        folder = tmp_path / "transformer"
        folder.mkdir(exist_ok=True)
        delta = {changed: tensors[changed] + 1e-3} if changed else {}
        save_file(tensors | delta, folder / "model.safetensors")
        same_times(folder)
        seen.add(Checkpoint(tmp_path).component("transformer").identity())
    assert len(seen) == 6


def test_a_copy_with_its_times_is_the_same(tiny_copy: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_copy, tmp_path / "moved"))
    (other / "vae" / ".DS_Store").write_bytes(b"junk")
    assert (
        replica_for(Checkpoint(tiny_copy), "vae").spec.identity
        == replica_for(Checkpoint(other), "vae").spec.identity
    )


def test_another_processor_is_another_text_encoder_and_another_key(tiny_copy: Path) -> None:
    before = replica_for(Checkpoint(tiny_copy), "text_encoder")
    change_json(tiny_copy / "processor" / "tokenizer_config.json", model_max_length=4096)
    after = replica_for(Checkpoint(tiny_copy), "text_encoder")
    assert before != after and before.spec.identity == after.spec.identity
    assert embedding_name(before, "hat", []) != embedding_name(after, "hat", [])


@pytest.mark.parametrize("file", ["processor/tokenizer_config.json", "text_encoder/config.json"])
def test_files_that_changed_are_not_loaded_for_the_old_key(
    tiny_copy: Path, tmp_path: Path, file: str
) -> None:
    replica = replica_for(Checkpoint(tiny_copy), "text_encoder", "int8")
    (tiny_copy / file).write_text((tiny_copy / file).read_text() + "\n")
    cache = DiskCache(tmp_path / "cache", 10**9)
    with pytest.raises(CheckpointError, match=r"changed while they were in use\. Run the prompt again\."):
        loading.load(replica, cache=cache)
    assert not list(cache.folder.glob("*"))


def test_files_that_change_while_they_are_read_are_not_kept(tiny_copy: Path, tmp_path: Path) -> None:
    replica = replica_for(Checkpoint(tiny_copy), "transformer", "int8")
    weights, cache = tiny_copy / WEIGHTS["transformer"], DiskCache(tmp_path / "cache", 10**9)

    def touch(done: int, total: int) -> None:
        os.utime(weights, ns=(1, 1))

    with pytest.raises(CheckpointError, match="changed while they were in use"):
        loading.load(replica, touch, cache)
    assert not list(cache.folder.glob("*"))


@pytest.mark.parametrize(
    ("file", "values", "role"),
    [
        ("scheduler/scheduler_config.json", {"max_shift": 1.0}, "transformer"),
        ("vae/config.json", {"latents_mean": [0.1] * 16}, "transformer"),
        ("processor/tokenizer_config.json", {"model_max_length": 4096}, "text_encoder"),
    ],
)
def test_a_fingerprint_covers_what_lies_beside(
    tiny_copy: Path, file: str, values: dict[str, Any], role: str
) -> None:
    """The transformer's weights stay loaded, because its replica is the same."""
    checkpoint = Checkpoint(tiny_copy)
    before, replica = fingerprint(role, checkpoint), replica_for(checkpoint, "transformer")
    change_json(tiny_copy / file, **values)
    assert fingerprint(role, checkpoint) != before
    assert replica_for(checkpoint, "transformer") == replica
