"""A checkpoint's files are described, checked and streamed, and errors name the damaged file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_checkpoint
import torch
from conftest import replica_for
from engine.errors import CheckpointError
from engine.files.checkpoint import Checkpoint, open_checkpoint
from engine.models import loading
from safetensors.torch import load_file, save_file

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def test_a_foreign_folder_is_named_for_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(CheckpointError, match="FluxPipeline, not a QwenImageEditPlusPipeline"):
        open_checkpoint(tmp_path)


def test_the_builder_is_deterministic(tiny_folder: Path, tmp_path: Path) -> None:
    again = tiny_checkpoint.build(tmp_path / "again")
    for role in ("transformer", "text_encoder", "vae"):
        for file in (tiny_folder / role).glob("*.safetensors"):
            assert file.read_bytes() == (again / role / file.name).read_bytes()


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_a_truncated_shard_is_named(tiny_copy: Path, kept: int) -> None:
    weights = tiny_copy / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors"):
        replica_for(Checkpoint(tiny_copy), "transformer")


def test_a_missing_shard_is_named(tiny_copy: Path) -> None:
    split_in_two(tiny_copy)
    (tiny_copy / "transformer" / "part-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"part-2\.safetensors is missing"):
        replica_for(Checkpoint(tiny_copy), "transformer")


def test_shards_load_like_one_file(tiny: Checkpoint, tiny_copy: Path) -> None:
    split_in_two(tiny_copy)
    whole = loading.load(replica_for(tiny, "transformer")).model.state_dict()
    sharded = loading.load(replica_for(Checkpoint(tiny_copy), "transformer")).model.state_dict()
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


def test_weights_that_are_not_safetensors_are_named(tiny_copy: Path) -> None:
    (tiny_copy / WEIGHTS).write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        replica_for(Checkpoint(tiny_copy), "transformer")


def test_a_tensor_of_another_shape_is_named(tiny_copy: Path) -> None:
    rewrite(tiny_copy / WEIGHTS, lambda tensors: tensors | {"img_in.weight": torch.zeros(3, 3)})
    with pytest.raises(CheckpointError, match=r"img_in\.weight is \(3, 3\)"):
        loading.load(replica_for(Checkpoint(tiny_copy), "transformer"))


def test_a_missing_tensor_is_named(tiny_copy: Path) -> None:
    rewrite(tiny_copy / WEIGHTS, lambda tensors: {k: v for k, v in tensors.items() if k != "img_in.weight"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of the model's tensors.*img_in\.weight"):
        loading.load(replica_for(Checkpoint(tiny_copy), "transformer"))


def test_a_tensor_of_another_model_is_named(tiny_copy: Path) -> None:
    rewrite(tiny_copy / WEIGHTS, lambda tensors: tensors | {"lora.up": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"lora\.up"):
        loading.load(replica_for(Checkpoint(tiny_copy), "transformer"))


def test_a_component_of_another_class_is_named(tiny_copy: Path) -> None:
    config = tiny_copy / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "AutoencoderKL"}))
    with pytest.raises(CheckpointError, match="holds a AutoencoderKL, not a AutoencoderKLQwenImage"):
        loading.load(replica_for(Checkpoint(tiny_copy), "vae"))


@pytest.mark.parametrize("missing", ["processor", "scheduler", "vae"])
def test_a_missing_folder_is_named(tiny_copy: Path, missing: str) -> None:
    shutil.rmtree(tiny_copy / missing)
    with pytest.raises(CheckpointError, match=f"no {missing}/ folder"):
        Checkpoint(tiny_copy).component(missing)


def test_both_namings_of_the_text_encoder_load_alike(tiny: Checkpoint, tiny_copy: Path) -> None:
    """transformers has stored the names of Qwen2.5-VL with and without `model.` and `language_model.`."""

    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert "visual.merger.ln_q.weight" in tensors and "model.norm.weight" in tensors
        nested = {
            name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()
        }
        return {
            f"model.{name}" if name.startswith("visual.") else name: value for name, value in nested.items()
        }

    rewrite(tiny_copy / "text_encoder" / "model.safetensors", rename)
    ours = loading.load(replica_for(tiny, "text_encoder")).model.state_dict()
    renamed = loading.load(replica_for(Checkpoint(tiny_copy), "text_encoder")).model.state_dict()
    assert ours.keys() == renamed.keys()
    assert all(torch.equal(ours[name], renamed[name]) for name in ours)


def test_replaced_files_make_another_spec(tiny_copy: Path) -> None:
    before = replica_for(Checkpoint(tiny_copy), "vae")
    assert before == replica_for(Checkpoint(tiny_copy), "vae")
    rewrite(tiny_copy / "vae" / "diffusion_pytorch_model.safetensors", lambda tensors: tensors)
    assert before != replica_for(Checkpoint(tiny_copy), "vae")


def split_in_two(folder: Path) -> None:
    """Store the transformer as two shards and an index, as big checkpoints are."""
    weights = folder / WEIGHTS
    tensors = load_file(weights)
    names = sorted(tensors)
    halves = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, weights.parent / file)
    index = {"weight_map": {name: file for file, half in halves.items() for name in half}}
    (weights.parent / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    weights.unlink()


def rewrite(file: Path, change) -> None:
    tensors = load_file(file)
    save_file({name: value.contiguous() for name, value in change(tensors).items()}, file)


def test_a_file_that_shrinks_while_it_is_read_is_named(tiny_copy: Path) -> None:
    """The thread that reads raises the error, and the caller of load gets it."""
    weights = tiny_copy / WEIGHTS

    def shrink(done: int, total: int) -> None:
        if weights.stat().st_size > 2000:
            with weights.open("r+b") as file:
                file.truncate(weights.stat().st_size // 2)

    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        loading.load(replica_for(Checkpoint(tiny_copy), "transformer"), shrink)
