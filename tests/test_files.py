"""Checkpoint files as other versions and people write them: used, or refused by name; never confused."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import other_versions
import pytest
import torch
from conftest import replica_for
from engine.cards.card import Card
from engine.errors import CheckpointError
from engine.files.cache import DiskCache
from engine.files.checkpoint import Checkpoint, open_checkpoint
from engine.files.configs import DEFAULTS
from engine.files.search import find_checkpoints
from engine.models import loading
from engine.planning.machine import Device, Machine
from engine.planning.memory_map import draw_memory_map
from engine.planning.placement import ROLES, place
from engine.sampling.encoded_cache import embedding_name
from engine.sampling.schedule import make_schedule
from engine.weights.components import fingerprint
from PIL import Image
from safetensors.torch import load_file, save_file

WEIGHTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
BOM = b"\xef\xbb\xbf"


PROCESSOR_5 = "processor_config.json"


def change_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text(encoding="utf-8")) | values
    kept = {name: value for name, value in content.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


def same_times(folder: Path) -> None:
    """As container layers and the Nix store have them."""
    for path in folder.rglob("*"):
        os.utime(path, ns=(10**9, 10**9))


def rename_dtype(path: Path, tensor: str, dtype: str) -> None:
    """Let a safetensors file say that a tensor's bytes are of another dtype."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header[tensor]["dtype"] = dtype
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


def cpu_machine() -> Machine:
    return Machine(
        (), Device(Card("cpu", "cpu", torch.device("cpu"), False, 2**36, is_gpu=False), 2**36), False
    )


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
    placed = place(cpu_machine(), Checkpoint(tiny_copy))
    assert message in placed.problems[role] and {there.role for there in placed.places} == {*ROLES} - {role}


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
    assert message in place(cpu_machine(), Checkpoint(tiny_copy)).problems["transformer"]


def test_a_scheduler_that_diffusers_refuses_is_named(tiny: Checkpoint) -> None:
    config = tiny.component("scheduler").config() | {"use_karras_sigmas": True, "use_beta_sigmas": True}
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json cannot be used"):
        make_schedule(config, 4, 64)


def test_statistics_that_are_no_numbers_are_named(tiny_copy: Path) -> None:
    change_json(tiny_copy / "vae" / "config.json", latents_std=[1.0, 2.0])
    with pytest.raises(CheckpointError, match=r"latents_std is .* must be a list of 16 numbers"):
        Checkpoint(tiny_copy).latent_statistics()


# Identities


@pytest.mark.parametrize("role", ROLES)
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
    """16 MiB in 64 matrices and as many small vectors, of which one changes at a time."""
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
    """And the transformer's weights stay loaded: its replica is the same."""
    checkpoint = Checkpoint(tiny_copy)
    before, replica = fingerprint(role, checkpoint), replica_for(checkpoint, "transformer")
    change_json(tiny_copy / file, **values)
    assert fingerprint(role, checkpoint) != before
    assert replica_for(checkpoint, "transformer") == replica


# Processors


def without(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def other_numbers(folder: Path) -> None:
    """The tokens for pictures and videos change places, as in another model's vocabulary."""
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
        (without("tokenizer.json"), r"tokenizer\.json|\('Describe' has 0\) is 3, not 64"),
        (other_numbers, r"the number of the token <\|image_pad\|> is 7, not 6"),
        (no_merges, "tokens before the prompt .* not 64"),
        (other_patches, "the image processor's patch_size is 16, not 14"),
        (without(PROCESSOR_5), "processor cannot be read"),
    ],
)
def test_a_processor_of_another_model_or_without_its_words_is_named(
    tiny_copy: Path, damage: Callable[[Path], None], message: str
) -> None:
    other_versions.rewrite_as_transformers_5(tiny_copy)  # each of its files holds what no other does
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
    """macOS leaves one beside every file on drives of other systems."""
    for file in [*tiny_copy.rglob("*.json"), *tiny_copy.rglob("*.safetensors")]:
        (file.parent / f"._{file.name}").write_bytes(b"\x00\x05\x16\x07")
    index = tiny_copy / "transformer" / "._diffusion_pytorch_model.safetensors.index.json"
    index.write_bytes(b"\x00\x05\x16\x07")
    checkpoint = Checkpoint(tiny_copy)
    assert embeds_alike(tiny, checkpoint) and not place(cpu_machine(), checkpoint).problems
    loading.load(replica_for(checkpoint, "transformer"))


@pytest.mark.parametrize("axes", [None, "x", [8, 12], [8, 12, 13], [8, 12, 14], [-8, 20, 20]])
def test_rotary_axes_that_do_not_divide_a_head_are_named(tiny_copy: Path, axes: object) -> None:
    path = tiny_copy / "transformer" / "config.json"
    other_versions.write_json(path, other_versions.read(path) | {"axes_dims_rope": axes})
    with pytest.raises(CheckpointError, match=r"transformer.config\.json: axes_dims_rope is .* add up to 32"):
        Checkpoint(tiny_copy).component("transformer").config()


# Dtypes, weights and JSON


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4", "U16"])
def test_a_dtype_that_is_not_read_is_named_where_it_is_needed(tiny_copy: Path, dtype: str) -> None:
    rename_dtype(tiny_copy / WEIGHTS["transformer"], "img_in.weight", dtype)
    placed = place(cpu_machine(), Checkpoint(tiny_copy))
    message = f"img_in.weight is stored as {dtype}, which these nodes do not read"
    assert message in placed.problems["transformer"] and message in str(placed)
    assert WEIGHTS["transformer"] in placed.problems["transformer"]
    assert [there.role for there in placed.places] == ["text_encoder", "vae"]
    assert draw_memory_map(placed).height > 0
    replica_for(Checkpoint(tiny_copy), "vae")
    with pytest.raises(CheckpointError, match=f"stored as {dtype}"):
        replica_for(Checkpoint(tiny_copy), "transformer")


def test_a_dtype_of_a_tensor_that_is_not_needed_does_not_matter(tiny_copy: Path) -> None:
    rename_dtype(tiny_copy / WEIGHTS["text_encoder"], "lm_head.weight", "F8_E4M3")
    loading.load(replica_for(Checkpoint(tiny_copy), "text_encoder"))


@pytest.mark.parametrize("damage", ["config", "tensor", "text_config"])
def test_weights_that_are_quantised_already_are_told_before_loading(tiny_copy: Path, damage: str) -> None:
    role = "text_encoder" if damage == "text_config" else "transformer"
    config = tiny_copy / role / "config.json"
    described = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    if damage == "config":
        change_json(config, quantization_config=described)
    elif damage == "text_config":
        text = json.loads(config.read_text())["text_config"]
        change_json(config, text_config=text | {"quantization_config": described})
    else:
        tensors = load_file(tiny_copy / WEIGHTS[role])
        save_file(tensors | {"img_in.SCB": torch.ones(64)}, tiny_copy / WEIGHTS[role])
    with pytest.raises(CheckpointError, match=r"is quantised already .* Download the original folder"):
        replica_for(Checkpoint(tiny_copy), role)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_variant_alone_is_used(tiny: Checkpoint, tiny_copy: Path, sharded: bool) -> None:
    """As save_pretrained(variant="fp16") names the files."""
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
    assert not place(cpu_machine(), checkpoint).problems
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
    placed = place(cpu_machine(), Checkpoint(tiny_copy))
    assert file.partition("/")[2] in placed.problems[role] and placed.problems[role] in str(placed)
    with pytest.raises(CheckpointError, match=file.partition("/")[2]):
        placed.place(role)


# The search


def holds_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "QwenImageEditPlusPipeline"}')
    return folder


def test_links_to_ancestors_list_each_real_folder_once(tmp_path: Path) -> None:
    root = tmp_path / "diffusers"
    holds_checkpoint(root / "team" / "model")
    for number in range(3):
        (root / f"all-{number}").symlink_to(tmp_path)
        (root / "team" / f"up-{number}").symlink_to("..")
    assert list(find_checkpoints([root, root])) == ["team/model"]


def test_an_entry_that_cannot_be_followed_hides_nothing_beside_it(tmp_path: Path, tiny_copy: Path) -> None:
    (tiny_copy.parent / "loop").symlink_to("loop")
    (tiny_copy.parent / "nowhere").symlink_to(tmp_path / "gone")
    assert list(find_checkpoints([tiny_copy.parent])) == [tiny_copy.name]


def test_a_checkpoint_that_is_a_link_is_listed_unless_it_is_there_itself(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "diffusers", holds_checkpoint(tmp_path / "elsewhere" / "model")
    real = holds_checkpoint(root / "real")
    (root / "linked").symlink_to(elsewhere)
    (root / "again").symlink_to(real)
    assert list(find_checkpoints([root])) == ["linked", "real"]


def test_caches_and_what_lies_below_a_checkpoint_are_not_searched(tmp_path: Path) -> None:
    names = ("model/old", "blobs/a", ".cache/b", "1/2/3/4/5/6", "hub/snapshots/0", "1/2/3/4/5a")
    holds_checkpoint(tmp_path / "model")
    for name in names:
        holds_checkpoint(tmp_path / name)
    assert list(find_checkpoints([tmp_path])) == ["1/2/3/4/5a", "hub/snapshots/0", "model"]
