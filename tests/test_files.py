"""Checkpoint files as other versions and other people write them are used, or refused with their name."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import other_versions
import pytest
import torch
from conftest import replica_for
from engine.errors import CheckpointError
from engine.files.checkpoint import Checkpoint, open_checkpoint
from engine.files.configs import DEFAULTS
from engine.files.search import find_checkpoints
from engine.models import loading
from engine.planning.memory_map import draw_memory_map
from engine.planning.planner import ROLES, make_plan
from engine.sampling.schedule import make_schedule
from machines import cpu_machine
from other_versions import change_json, rename_dtype
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_checkpoint import WEIGHTS

BOM = b"\xef\xbb\xbf"


PROCESSOR_5 = "processor_config.json"


# Configs


def without_model_type(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "model_type"}


def without_any_class(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in without_model_type(config).items() if name != "architectures"}


SPELLINGS = (other_versions.nest_architectures, other_versions.flatten, without_model_type, without_any_class)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_text_encoder_whose_config_is_spelt_otherwise_embeds_alike(
    tiny: Checkpoint, tiny_copy: Path, spelling: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    path = tiny_copy / "text_encoder" / "config.json"
    other_versions.write_json(path, spelling(other_versions.read(path)))
    assert embeds_alike(tiny, Checkpoint(tiny_copy))


def test_a_folder_saved_by_transformers_5_embeds_alike(tiny: Checkpoint, tiny_copy: Path) -> None:
    other_versions.rewrite_as_transformers_5(tiny_copy)
    assert embeds_alike(tiny, Checkpoint(tiny_copy))


def embeds_alike(*checkpoints: Checkpoint) -> bool:
    pictures = [Image.new("RGB", (64, 64), "red")]
    encoders = (loading.load(replica_for(checkpoint, "text_encoder")) for checkpoint in checkpoints)
    first, *others = (encoder.encode("Add a red hat", pictures) for encoder in encoders)
    return all(torch.equal(first, other) for other in others)


def test_a_text_encoder_without_its_head_loads(tiny: Checkpoint, tiny_copy: Path) -> None:
    """Qwen2_5_VLModel.save_pretrained names its tensors language_model.* and visual.*."""
    weights = tiny_copy / WEIGHTS["text_encoder"]
    stored = load_file(weights)
    del stored["lm_head.weight"]
    save_file(
        {name.replace("model.", "language_model.", 1): tensor for name, tensor in stored.items()}, weights
    )
    whole = loading.load(replica_for(tiny, "text_encoder")).model.state_dict()
    bare = loading.load(replica_for(Checkpoint(tiny_copy), "text_encoder")).model.state_dict()
    assert whole.keys() == bare.keys() and all(torch.equal(whole[name], bare[name]) for name in whole)


@pytest.mark.parametrize("role", ["transformer", "vae"])
def test_a_config_without_its_class_is_taken(tiny_copy: Path, role: str) -> None:
    change_json(tiny_copy / role / "config.json", _class_name=None)
    loading.load(replica_for(Checkpoint(tiny_copy), role))


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("transformer", diffusers.QwenImageTransformer2DModel),
        ("vae", diffusers.AutoencoderKLQwenImage),
        ("scheduler", diffusers.FlowMatchEulerDiscreteScheduler),
    ],
)
def test_what_a_config_leaves_out_is_what_diffusers_takes(tiny_copy: Path, name: str, model: Any) -> None:
    parameters = inspect.signature(model.__init__).parameters
    file = tiny_copy / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
    change_json(file, **dict.fromkeys([*DEFAULTS[name], "axes_dims_rope"]))
    config = Checkpoint(tiny_copy).component(name).config()
    for key in DEFAULTS[name]:
        assert config[key] == parameters[key].default


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("text_encoder/config.json", {"model_type": "qwen3_vl"}, "holds a qwen3_vl, not a qwen2_5_vl"),
        ("transformer/config.json", {"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel, not"),
        ("transformer/config.json", {"guidance_embeds": True}, "sets guidance_embeds to True"),
        ("transformer/config.json", {"use_layer3d_rope": True}, "sets use_layer3d_rope to True"),
        ("transformer/config.json", {"in_channels": 132}, "sets in_channels to 132"),
        ("transformer/config.json", {"num_layers": "60"}, "num_layers is '60'; it must be a whole number"),
        ("vae/config.json", {"base_dim": 0}, "base_dim is 0; it must be a whole number above 0"),
        ("vae/config.json", {"z_dim": 48}, "sets z_dim to 48"),
    ],
)
def test_a_config_that_means_another_model_is_refused_by_name(
    tiny_copy: Path, file: str, values: dict[str, Any], message: str
) -> None:
    change_json(tiny_copy / file, **values)
    role = file.partition("/")[0]
    with pytest.raises(CheckpointError, match=message):
        replica_for(Checkpoint(tiny_copy), role)
    placed = make_plan(cpu_machine(), Checkpoint(tiny_copy))
    assert message in placed.problems[role] and {there.role for there in placed.placements} == {*ROLES} - {
        role
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "UniPCMultistepScheduler"}, "holds a UniPCMultistepScheduler, not a FlowMatchEuler"),
        ({"stochastic_sampling": True}, "sets stochastic_sampling to True; these nodes compute False only"),
        ({"base_shift": "0.5"}, "base_shift is '0.5'; it must be a number"),
    ],
)
def test_a_scheduler_that_computes_something_else_is_refused_by_name(
    tiny_copy: Path, values: dict[str, Any], message: str
) -> None:
    change_json(tiny_copy / "scheduler" / "scheduler_config.json", **values)
    assert message in make_plan(cpu_machine(), Checkpoint(tiny_copy)).problems["transformer"]


def test_a_scheduler_that_diffusers_refuses_is_named(tiny: Checkpoint) -> None:
    config = tiny.component("scheduler").config() | {"use_karras_sigmas": True, "use_beta_sigmas": True}
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json cannot be used"):
        make_schedule(config, 4, 64)


def test_statistics_that_are_no_numbers_are_named(tiny_copy: Path) -> None:
    change_json(tiny_copy / "vae" / "config.json", latents_std=[1.0, 2.0])
    with pytest.raises(CheckpointError, match=r"latents_std is .* must be a list of 16 numbers"):
        Checkpoint(tiny_copy).latent_statistics()


# Processors


def without(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def other_numbers(folder: Path) -> None:
    """Exchange the tokens for pictures and videos, as in the vocabulary of another model."""
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    swapped = text.replace("<|image_pad|>", "<|x|>").replace("<|video_pad|>", "<|image_pad|>")
    path.write_text(swapped.replace("<|x|>", "<|video_pad|>"), encoding="utf-8")


def no_merges(folder: Path) -> None:
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    whole["model"]["merges"] = []
    path.write_text(json.dumps(whole), encoding="utf-8")


def other_patches(folder: Path) -> None:
    path = folder / PROCESSOR_5
    path.write_text(path.read_text(encoding="utf-8").replace('"patch_size": 14', '"patch_size": 16'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            without("tokenizer.json"),
            r"tokenizer\.json|\('Describe' has 0\) is 3, not 64|processor cannot be read",
        ),
        (other_numbers, r"the number of the token <\|image_pad\|> is 7, not 6"),
        (no_merges, "tokens before the prompt .* not 64"),
        (other_patches, "the image processor's patch_size is 16, not 14"),
        (without(PROCESSOR_5), "processor cannot be read"),
    ],
)
def test_a_processor_of_another_model_or_without_its_words_is_named(
    tiny_copy: Path, damage: Callable[[Path], None], message: str
) -> None:
    other_versions.rewrite_as_transformers_5(tiny_copy)  # there each file is needed
    damage(tiny_copy / "processor")
    with pytest.raises(CheckpointError, match=message) as caught:
        loading.load(replica_for(Checkpoint(tiny_copy), "text_encoder"))
    assert str(tiny_copy / "processor") in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", PROCESSOR_5, "tokenizer_config.json"])
def test_a_processor_with_byte_order_marks_is_read(tiny: Checkpoint, tiny_copy: Path, name: str) -> None:
    other_versions.rewrite_as_transformers_5(tiny_copy)
    file = tiny_copy / "processor" / name
    file.write_bytes(BOM + file.read_bytes())
    assert embeds_alike(tiny, Checkpoint(tiny_copy))


def test_hidden_files_beside_a_checkpoints_own_are_not_its(tiny: Checkpoint, tiny_copy: Path) -> None:
    """macOS writes one beside every file on a drive of another system."""
    for file in [*tiny_copy.rglob("*.json"), *tiny_copy.rglob("*.safetensors")]:
        (file.parent / f"._{file.name}").write_bytes(b"\x00\x05\x16\x07")
    index = tiny_copy / "transformer" / "._diffusion_pytorch_model.safetensors.index.json"
    index.write_bytes(b"\x00\x05\x16\x07")
    checkpoint = Checkpoint(tiny_copy)
    assert embeds_alike(tiny, checkpoint) and not make_plan(cpu_machine(), checkpoint).problems
    loading.load(replica_for(checkpoint, "transformer"))


@pytest.mark.parametrize("axes", [None, "x", [8, 12], [8, 12, 13], [8, 12, 14], [-8, 20, 20]])
def test_rotary_axes_that_do_not_divide_a_head_are_named(tiny_copy: Path, axes: object) -> None:
    path = tiny_copy / "transformer" / "config.json"
    other_versions.write_json(path, other_versions.read(path) | {"axes_dims_rope": axes})
    with pytest.raises(CheckpointError, match=r"transformer.config\.json: axes_dims_rope is .* add up to 32"):
        Checkpoint(tiny_copy).component("transformer").config()


# Dtypes, weights and JSON


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "U16"])
def test_a_dtype_that_is_not_read_is_named_where_it_is_needed(tiny_copy: Path, dtype: str) -> None:
    rename_dtype(tiny_copy / WEIGHTS["transformer"], "img_in.weight", dtype)
    placed = make_plan(cpu_machine(), Checkpoint(tiny_copy))
    message = f"img_in.weight is stored as {dtype}, which these nodes do not read"
    assert message in placed.problems["transformer"] and message in str(placed)
    assert str(tiny_copy / "transformer") in placed.problems["transformer"]
    assert [there.role for there in placed.placements] == ["text_encoder", "vae"]
    assert draw_memory_map(placed).height > 0
    replica_for(Checkpoint(tiny_copy), "vae")
    with pytest.raises(CheckpointError, match=f"stored as {dtype}"):
        replica_for(Checkpoint(tiny_copy), "transformer")


def test_a_dtype_of_a_tensor_that_is_not_needed_does_not_matter(tiny_copy: Path) -> None:
    rename_dtype(tiny_copy / WEIGHTS["text_encoder"], "lm_head.weight", "F8_E8M0")
    loading.load(replica_for(Checkpoint(tiny_copy), "text_encoder"))


@pytest.mark.parametrize("damage", ["config", "tensor", "text_config"])
def test_weights_that_are_quantised_already_are_told_before_loading(tiny_copy: Path, damage: str) -> None:
    role = "text_encoder" if damage == "text_config" else "transformer"
    config = tiny_copy / role / "config.json"
    described = {"quant_method": "gptq", "bits": 4}
    if damage == "config":
        change_json(config, quantization_config=described)
    elif damage == "text_config":
        text = json.loads(config.read_text())["text_config"]
        change_json(config, text_config=text | {"quantization_config": described})
    else:
        tensors = load_file(tiny_copy / WEIGHTS[role])
        save_file(tensors | {"img_in.SCB": torch.ones(64)}, tiny_copy / WEIGHTS[role])
    with pytest.raises(
        CheckpointError,
        match=r"is quantised already|in a form that is not read here",
    ):
        replica_for(Checkpoint(tiny_copy), role)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_variant_alone_is_used(tiny: Checkpoint, tiny_copy: Path, sharded: bool) -> None:
    """The files have the names that save_pretrained(variant="fp16") gives them."""
    folder = tiny_copy / "transformer"
    tensors = load_file(tiny_copy / WEIGHTS["transformer"])
    (tiny_copy / WEIGHTS["transformer"]).unlink()
    stem = "diffusion_pytorch_model"
    if sharded:
        names = sorted(tensors)
        files = {f"{stem}.fp16-0000{part + 1}-of-00002.safetensors": names[part::2] for part in (0, 1)}
        for file, half in files.items():
            save_file({name: tensors[name] for name in half}, folder / file)
        weight_map = {name: file for file, half in files.items() for name in half}
        index = folder / f"{stem}.safetensors.index.fp16.json"
        index.write_bytes(BOM + json.dumps({"weight_map": weight_map}).encode())
    else:
        save_file(tensors, folder / f"{stem}.fp16.safetensors")
    found = loading.load(replica_for(Checkpoint(tiny_copy), "transformer")).model.state_dict()
    whole = loading.load(replica_for(tiny, "transformer")).model.state_dict()
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    if not sharded:
        shutil.copy(folder / f"{stem}.fp16.safetensors", folder / f"{stem}.ema.safetensors")
        with pytest.raises(CheckpointError, match=r"several variants of its weights.*ema.*fp16"):
            replica_for(Checkpoint(tiny_copy), "transformer")


@pytest.mark.parametrize("name", ["model.bin", "firered-Q4_K_M.gguf", "firered.safetensors"])
def test_weights_under_another_name_are_named(tiny_copy: Path, name: str) -> None:
    weights = tiny_copy / WEIGHTS["transformer"]
    weights.rename(weights.with_name(name))
    with pytest.raises(CheckpointError, match=rf"No .safetensors weights in .*it has .*{name}"):
        replica_for(Checkpoint(tiny_copy), "transformer")


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": "../vae/x.safetensors"}}])
def test_an_index_that_lists_nothing_usable_is_named(tiny_copy: Path, index: dict[str, Any]) -> None:
    path = tiny_copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json has no weight_map"):
        replica_for(Checkpoint(tiny_copy), "transformer")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "text_encoder/config.json"])
def test_json_as_windows_editors_save_it_is_read(tiny_copy: Path, encoding: str, file: str) -> None:
    path = tiny_copy / file
    path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)
    checkpoint = open_checkpoint(tiny_copy)
    assert not make_plan(cpu_machine(), checkpoint).problems
    assert list(find_checkpoints([tiny_copy.parent])) == ["copy"]
    loading.load(replica_for(checkpoint, "transformer" if "transformer" in file else "text_encoder"))


@pytest.mark.parametrize(
    ("file", "role"),
    [
        ("transformer/config.json", "transformer"),
        ("scheduler/scheduler_config.json", "transformer"),
        ("processor/processor_config.json", "text_encoder"),
        ("processor/tokenizer.json", "text_encoder"),
        ("vae/config.json", "vae"),
    ],
)
def test_the_plan_names_the_file_that_is_missing(tiny_copy: Path, file: str, role: str) -> None:
    other_versions.rewrite_as_transformers_5(tiny_copy)
    (tiny_copy / file).unlink()
    placed = make_plan(cpu_machine(), Checkpoint(tiny_copy))
    assert file.partition("/")[2] in placed.problems[role] and placed.problems[role] in str(placed)
    with pytest.raises(CheckpointError, match=file.partition("/")[2]):
        placed.placement(role)
