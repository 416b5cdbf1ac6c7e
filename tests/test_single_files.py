"""The files that users of ComfyUI have: each form gives what the library that wrote it reads out of it."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import comfy_kitchen
import gguf
import numpy as np
import pytest
import real_checkpoint
import tiny_checkpoint
import torch
from comfy_kitchen.tensor.int8_utils import _build_hadamard, _rotate_weight
from conftest import replica_for
from core_vae import core_names
from diffusers import QwenImageControlNetModel, QwenImageTransformer2DModel
from engine.errors import CheckpointError
from engine.files.cache import DiskCache
from engine.files.checkpoint import Checkpoint, open_checkpoint
from engine.files.encodings import MATRIX, Encoded, Plain
from engine.files.gguf import read_gguf_header
from engine.files.search import find_files
from engine.files.single import FileCheckpoint, open_file, role_of
from engine.models import loading, vae
from engine.planning.planner import make_plan
from engine.weights.conversion import write_int8
from engine.weights.filling import cache_name
from machines import cpu_machine
from PIL import Image
from prompts import LOADERS, SAMPLE, changed, edit_prompt, keep_tensor, kept_tensor, succeed
from safetensors.torch import load_file, save_file
from test_lora import GRID, TIMESTEP, predicted, relative_error
from test_transformer import by_diffusers

from launcher.client import Client, PromptRejected
from launcher.folders import comfyui_folder

Tensors = dict[str, torch.Tensor]
TOKENIZER = comfyui_folder() / "comfy/text_encoders/qwen25_tokenizer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint whose sizes can be read off its tensors: heads of 128 channels, as published."""
    path = tmp_path_factory.mktemp("published") / "tiny"
    return open_checkpoint(tiny_checkpoint.build(path, text_width=256, published_heads=True))


def weights(folder: Checkpoint, role: str = "transformer") -> Tensors:
    return load_file(folder.folder / tiny_checkpoint.WEIGHTS[role])


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    """What these programs quantise: the linear layers of the blocks, modulation included."""
    return name.startswith("transformer_blocks") and name.endswith(".weight") and tensor.ndim == 2


# Each writes the transformer's tensors as a program does, and returns what that program reads out of them.


def plain(dtype: torch.dtype) -> Callable[[Tensors, Path], Tensors]:
    def write(tensors: Tensors, path: Path) -> Tensors:
        stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        save_file(stored, path)
        return stored

    return write


def with_prefix(tensors: Tensors, path: Path) -> Tensors:
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}, path)
    return tensors


def all_in_one(tensors: Tensors, path: Path) -> Tensors:
    """A transformer in raw FP8 beside other components, one of which is in scaled FP8."""
    stored = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    encoder = "text_encoders.qwen25_7b.transformer"
    others = {
        "vae.decoder.middle.0.residual.0.gamma": torch.ones(2),
        f"{encoder}.scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn),
        f"{encoder}.model.layers.0.mlp.up_proj.weight": torch.ones(2, 2).to(torch.float8_e4m3fn),
        f"{encoder}.model.layers.0.mlp.up_proj.scale_weight": torch.ones(()),
    }
    save_file({f"model.diffusion_model.{name}": each for name, each in stored.items()} | others, path)
    return stored


def old_fp8(tensors: Tensors, path: Path) -> Tensors:
    return _scaled(tensors, path, "scale_weight", {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)})


def new_fp8(tensors: Tensors, path: Path) -> Tensors:
    layers = {name.removesuffix(".weight") for name, tensor in tensors.items() if is_matrix(name, tensor)}
    config = {"format": "float8_e4m3fn"}
    described = {f"{layer}.comfy_quant": _bytes(config) for layer in layers}
    return _scaled(tensors, path, "weight_scale", described)


def _scaled(tensors: Tensors, path: Path, scale_name: str, beside: Tensors) -> Tensors:
    """In FP8 with a scale for each matrix; the scale of the inputs is of no use to us."""
    stored, decoded = dict(beside), dict(tensors)
    for name, tensor in tensors.items():
        if not is_matrix(name, tensor):
            stored[name] = tensor
            continue
        scale = tensor.float().abs().max() / 448
        codes, layer = (tensor.float() / scale).to(torch.float8_e4m3fn), name.removesuffix(".weight")
        stored |= {name: codes, f"{layer}.{scale_name}": scale}
        stored[f"{layer}.{'scale_input' if scale_name == 'scale_weight' else 'input_scale'}"] = torch.ones(())
        decoded[name] = codes.float() * scale
    save_file(stored, path)
    return decoded


def every_fp8(tensors: Tensors, path: Path) -> Tensors:
    """A scale for each row of every weight, of one dimension too."""
    stored, decoded = dict(tensors), dict(tensors)
    for name in filter(lambda name: name.endswith(".weight"), tensors):
        shape = tensors[name].shape
        rows = tensors[name].float().reshape(shape[0], -1)
        scale = rows.abs().amax(1, keepdim=True) / 448
        codes = (rows / scale).to(torch.float8_e4m3fn)
        stored |= {name: codes.reshape(shape), f"{name}_scale": scale}
        decoded[name] = (codes.float() * scale).reshape(shape)
    save_file(stored, path)
    return decoded


def int8(
    convrot: bool, in_metadata: bool, prefix: str = "", prefix_in_metadata: str = ""
) -> Callable[[Tensors, Path], Tensors]:
    def write(tensors: Tensors, path: Path) -> Tensors:
        """With comfy-kitchen's own rotation and rounding."""
        stored, decoded, layers = {}, dict(tensors), {}
        hadamard = _build_hadamard(256)
        for name, tensor in tensors.items():
            if not is_matrix(name, tensor):
                stored[name] = tensor
                continue
            layer, matrix = name.removesuffix(".weight"), tensor.float()
            rotated = _rotate_weight(matrix, hadamard, 256) if convrot else matrix
            codes, scale = comfy_kitchen.quantize_int8_rowwise(rotated)
            stored |= {name: codes, f"{layer}.weight_scale": scale}
            layers[layer] = {"format": "int8_tensorwise"} | ({"convrot": True} if convrot else {})
            back = codes.float() * scale.reshape(-1, 1)
            decoded[name] = _rotate_weight(back, hadamard, 256) if convrot else back
        described = {"layers": {prefix_in_metadata + layer: config for layer, config in layers.items()}}
        metadata = {"_quantization_metadata": json.dumps(described)} if in_metadata else None
        if not in_metadata:
            stored |= {f"{layer}.comfy_quant": _bytes(config) for layer, config in layers.items()}
        save_file({prefix + name: tensor for name, tensor in stored.items()}, path, metadata)
        return decoded

    return write


def _bytes(config: dict) -> torch.Tensor:
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


# Where the FP16 scales of a block are, so that random codes decode to small numbers.
GGUF_SCALES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,),
    "IQ4_XS": (0,), "IQ2_XXS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ1_S": (0,), "TQ1_0": (52,),
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
}  # fmt: skip


def gguf_of(kind: str) -> Callable[[Tensors, Path], Tensors]:
    def write(tensors: Tensors, path: Path) -> Tensors:
        """As converters write it: blocks in that type, vectors in F32, the rest in BF16."""
        quantised, decoded = gguf.GGMLQuantizationType[kind], {}
        writer, generator = gguf.GGUFWriter(path, "qwen_image"), np.random.default_rng(0)
        for name, tensor in tensors.items():
            array = tensor.float().numpy()
            if is_matrix(name, tensor):
                codes = _blocks(array.shape, kind, generator)
                writer.add_tensor(name, codes, raw_dtype=quantised)
                decoded[name] = torch.from_numpy(gguf.dequantize(codes, quantised))
            else:
                writer.add_tensor(name, array)
                decoded[name] = tensor.float()
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return decoded

    return write


def _blocks(shape: tuple[int, ...], kind: str, generator: np.random.Generator) -> np.ndarray:
    """Random codes with scales that make numbers of the size of weights."""
    size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    codes = generator.integers(0, 256, (shape[0], shape[1] // size, nbytes), dtype=np.uint8)
    for offset in GGUF_SCALES[kind]:
        codes[..., offset : offset + 2] = np.frombuffer(np.float16(0.0005).tobytes(), np.uint8)
    return codes.reshape(shape[0], -1)


WRITERS: dict[str, Callable[[Tensors, Path], Tensors]] = {
    "bf16": plain(torch.bfloat16),
    "fp16": plain(torch.float16),
    "fp32": plain(torch.float32),
    "prefix": with_prefix,
    "all in one": all_in_one,
    "raw e4m3": plain(torch.float8_e4m3fn),
    "raw e5m2": plain(torch.float8_e5m2),
    "old fp8": old_fp8,
    "new fp8": new_fp8,
    "every fp8": every_fp8,
    "int8": int8(convrot=False, in_metadata=False),
    "convrot": int8(convrot=True, in_metadata=False),
    "convrot in metadata": int8(convrot=True, in_metadata=True),
    "convrot with prefix": int8(True, False, prefix="diffusion_model."),
    "convrot with prefix in metadata": int8(True, True, "diffusion_model.", "diffusion_model."),
    "convrot in metadata without prefix": int8(True, True, prefix="model.diffusion_model."),
}
GGUFS = {kind: gguf_of(kind) for kind in GGUF_SCALES}


def written(name: str, tensors: Tensors, folder: Path) -> tuple[FileCheckpoint, Tensors]:
    """A file in that form, and the numbers in it."""
    path = folder / f"model.{'gguf' if name in GGUFS else 'safetensors'}"
    decoded = (WRITERS | GGUFS)[name](tensors, path)
    return open_file(path, "transformer"), decoded


def original_of(folder: Checkpoint, decoded: Tensors) -> QwenImageTransformer2DModel:
    """diffusers' model with these numbers as FP32 weights."""
    model = QwenImageTransformer2DModel.from_pretrained(folder.folder / "transformer").float().eval()
    model.load_state_dict({name: tensor.float() for name, tensor in decoded.items()})
    return model


@pytest.mark.parametrize("form", [*WRITERS, *GGUFS])
def test_a_form_gives_what_its_own_library_reads(folder: Checkpoint, tmp_path: Path, form: str) -> None:
    checkpoint, decoded = written(form, weights(folder), tmp_path)
    expected = by_diffusers(original_of(folder, decoded), GRID, TIMESTEP, None, text_width=256)
    ours = predicted(loading.load(replica_for(checkpoint, "transformer", "fp32")))
    assert relative_error(ours, expected) < 1e-5


@pytest.mark.parametrize("form", ["raw e4m3", "new fp8", "convrot", "Q4_K", "IQ2_XXS"])
@pytest.mark.parametrize("precision", ["bf16", "int8", "int8-fast", "nf4"])
def test_a_form_is_turned_into_each_precision(
    folder: Checkpoint, tmp_path: Path, form: str, precision: str
) -> None:
    """As if the whole numbers had been stored: the difference is the precision's own rounding."""
    checkpoint, decoded = written(form, weights(folder), tmp_path)
    expected = by_diffusers(original_of(folder, decoded), GRID, TIMESTEP, None, text_width=256)
    ours = predicted(loading.load(replica_for(checkpoint, "transformer", precision)))
    assert (
        relative_error(ours, expected)
        < {"bf16": 0.02, "int8": 0.02, "int8-fast": 0.03, "nf4": 0.2}[precision]
    )


@pytest.mark.parametrize("precision", ["fp32", "int8", "nf4"])
def test_a_file_is_the_folder_bit_for_bit(folder: Checkpoint, tmp_path: Path, precision: str) -> None:
    checkpoint, _ = written("bf16", weights(folder), tmp_path)
    one, other = (
        predicted(loading.load(replica_for(each, "transformer", precision))) for each in (folder, checkpoint)
    )
    assert torch.equal(one, other)


def test_int8_rows_are_used_as_they_lie(folder: Checkpoint, tmp_path: Path) -> None:
    """Nothing is rounded twice, and nothing is cached that the file has already."""
    checkpoint, decoded = written("convrot", weights(folder), tmp_path)
    replica = replica_for(checkpoint, "transformer", "int8")
    model = loading.load(replica).model
    stored = load_file(checkpoint.folder)
    name = "transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(model.get_submodule(name.removesuffix(".weight")).weight, stored[name])
    assert cache_name(replica.spec) is None
    expected = by_diffusers(original_of(folder, decoded), GRID, TIMESTEP, None, text_width=256)
    assert (
        relative_error(predicted(loading.load(replica)), expected) < 1e-4
    )  # FP32 products: no rounding at all


def test_fp32_keeps_the_files_own_form_in_memory(folder: Checkpoint, tmp_path: Path) -> None:
    """So a file in four bits takes four bits, and its numbers lose nothing."""
    checkpoint, _ = written("Q4_K", weights(folder), tmp_path)
    whole = replica_for(folder, "transformer", "fp32").spec.nbytes()
    kept = replica_for(checkpoint, "transformer", "fp32").spec.nbytes()
    assert kept < 0.5 * whole


def test_the_marker_of_2511_is_zero_cond_t(tmp_path: Path) -> None:
    built = tiny_checkpoint.build(tmp_path / "tiny", text_width=256, published_heads=True, zero_cond_t=True)
    folder = open_checkpoint(built)
    marker = {"__index_timestep_zero__": torch.tensor(0.0)}
    checkpoint, _ = written("bf16", weights(folder) | marker, tmp_path)
    assert checkpoint.component("transformer").config()["zero_cond_t"]
    one, other = (predicted(loading.load(replica_for(each, "transformer"))) for each in (folder, checkpoint))
    assert torch.equal(one, other)


# Folders that bitsandbytes quantised


@pytest.mark.parametrize("bits", [8, 4])
def test_a_folder_that_bitsandbytes_quantised(folder: Checkpoint, tmp_path: Path, bits: int) -> None:
    copy = Path(shutil.copytree(folder.folder, tmp_path / "quantised"))
    stored, decoded = {}, dict(weights(folder))
    for name, tensor in weights(folder).items():
        if not is_matrix(name, tensor) or "transformer_blocks.0.img_mod" in name:
            stored[name] = tensor
        elif bits == 8:
            codes, scales, _ = bnb.int8_vectorwise_quant(tensor.half())
            layer = name.removesuffix(".weight")
            stored |= {name: codes, f"{layer}.SCB": scales, f"{layer}.weight_format": torch.tensor(0)}
            decoded[name] = codes.float() * scales.float().reshape(-1, 1) / 127
        else:
            codes, state = bnb.quantize_4bit(tensor, quant_type="nf4", compress_statistics=True)
            stored |= {name: codes, **{f"{name}.{key}": part for key, part in state.as_dict(True).items()}}
            state.dtype = torch.float32
            decoded[name] = bnb.dequantize_4bit(codes, state)
    _save_in_two(stored, copy / "transformer")
    config = json.loads((copy / "transformer/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}
    (copy / "transformer/config.json").write_text(json.dumps(config))
    expected = by_diffusers(original_of(folder, decoded), GRID, TIMESTEP, None, text_width=256)
    for precision, most in (("fp32", 1e-5), ("nf4", 1e-5) if bits == 4 else ("int8", 1e-4)):
        ours = predicted(loading.load(replica_for(open_checkpoint(copy), "transformer", precision)))
        assert relative_error(ours, expected) < most


def test_tables_are_read_with_their_matrix(folder: Checkpoint, tmp_path: Path) -> None:
    """Those of all matrices together would take up to 1.3 GB of host memory."""
    checkpoint, _ = written("every fp8", weights(folder), tmp_path)
    tensors, before = checkpoint.component("transformer").tensors(), _live_tensors()
    read = [next(tensors) for _ in range(5)]
    assert _live_tensors() - before <= 2 * len(read) + 2  # with the one that is read ahead


def _live_tensors() -> int:
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


def _save_in_two(stored: Tensors, folder: Path) -> None:
    """Two shards that part matrices from their scales, as the real ones do."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    names, files = sorted(stored), {}
    for part in (0, 1):
        file = f"diffusion_pytorch_model-0000{part + 1}-of-00002.safetensors"
        save_file({name: stored[name].contiguous() for name in names[part::2]}, folder / file)
        files |= dict.fromkeys(names[part::2], file)
    index = {"weight_map": files}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


# Headers of GGUF


def write_gguf(path: Path, words: int = 50) -> None:
    """Every type of field, and tensors of several types, one of them kept in another shape."""
    writer = gguf.GGUFWriter(path, "qwen2vl")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"test.{kind}", 3)
    for kind in ("float32", "float64"):
        getattr(writer, f"add_{kind}")(f"test.{kind}", 0.5)
    writer.add_bool("test.bool", True)
    writer.add_string("test.string", "words \u00e4")
    writer.add_array("test.tokens", [f"word {number}" for number in range(words)])
    writer.add_array("test.merges", [f"a{number} b{number}" for number in range(words)])
    writer.add_array("test.types", [1] * words)
    writer.add_array("test.nested", [["a", "b"], ["c"]])
    writer.add_array("test.deeper", [[[1, 2], [3]], [[4]]])
    writer.add_array("test.bools", [True, False])
    writer.add_custom_alignment(64)
    writer.add_array("comfy.gguf.orig_shape.folded", [2, 3, 32])
    writer.add_tensor("folded", np.ones((6, 32), np.float32))
    writer.add_tensor("plain", np.ones(5, np.float16))
    for kind in ("Q4_K", "Q8_0"):
        codes = _blocks((3, 512), kind, np.random.default_rng(0))
        writer.add_tensor(kind, codes, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_header_is_what_the_library_reads(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    tensors, start, fields = read_gguf_header(tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert start == reader.data_offset
    assert fields == {"general.architecture": reader.fields["general.architecture"].contents()}
    assert list(tensors) == [each.name for each in reader.tensors]
    for each in reader.tensors:
        entry, begin = tensors[each.name], each.data_offset - reader.data_offset
        shape = (2, 3, 32) if each.name == "folded" else tuple(each.shape[::-1].tolist())
        assert entry["data_offsets"] == [begin, begin + each.n_bytes]
        assert entry.get("ggml", (entry["dtype"], tuple(entry["shape"]))) == (each.tensor_type.name, shape)


def test_a_text_encoder_as_gguf_is_recognised_quickly(tmp_path: Path) -> None:
    """Its tokenizer has 300,000 strings. The library needs 8 seconds for them."""
    write_gguf(tmp_path / "encoder.gguf", words=150_000)
    started = time.perf_counter()
    assert role_of(tmp_path / "encoder.gguf") is None
    assert time.perf_counter() - started < 1


def _put(offset: int, kind: str, value: Any) -> Callable[[bytes], bytes]:
    packed = struct.pack(kind, value)
    return lambda content: content[:offset] + packed + content[offset + len(packed) :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_put(0, "4s", b"GGML"), "does not begin with GGUF"),
        (_put(4, ">I", 3), "is big-endian"),
        (_put(4, "<I", 1), "has version 1 of the format"),
        (_put(8, "<Q", 2**40), "1,099,511,627,776 parts follow"),
        (_put(24, "<Q", 2**40), "a name of 1,099,511,627,776 bytes"),
        (lambda content: content[:300], "truncated: its header does not end in its 300 bytes"),
        (lambda content: content[:-100], r"truncated: [\d,]+ of [\d,]+ bytes"),
    ],
)
def test_a_damaged_gguf_is_named(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"model\.gguf is .*{message}"):
        open_file(path, "transformer")


# Text encoders and VAEs


def text_encoder_file(
    folder: Checkpoint, path: Path, fp8: Callable[[str], bool] = lambda name: False, newer: bool = False
) -> tuple[FileCheckpoint, Tensors]:
    """A text encoder in one file, and the numbers in it. fp8: the matrices that are in scaled FP8."""
    tensors = {
        _core_name("text_encoder", name): tensor for name, tensor in weights(folder, "text_encoder").items()
    }
    if newer:
        tensors = {_newer_name(name): tensor for name, tensor in tensors.items()}
    codes = {n: (t.float() / 0.01).to(torch.float8_e4m3fn) for n, t in tensors.items() if fp8(n)}
    scales = {f"{name.removesuffix('.weight')}.scale_weight": torch.tensor(0.01) for name in codes}
    marker = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)} if codes else {}
    save_file(tensors | codes | scales | marker, path)
    decoded = tensors | {name: code.float() * 0.01 for name, code in codes.items()}
    return open_file(path, "text_encoder", TOKENIZER), decoded


def _newer_name(name: str) -> str:
    """Of transformers since 4.52, for ComfyUI's."""
    return f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.")


def is_layer(name: str) -> bool:
    """The linear layers of language model and vision tower, which ComfyUI's FP8 file has in FP8."""
    return name.endswith(("_proj.weight", "qkv.weight", "attn.proj.weight", "mlp.0.weight", "mlp.2.weight"))


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_a_text_encoder_in_one_file(folder: Checkpoint, tmp_path: Path, fp8: bool, newer: bool) -> None:
    """With ComfyUI's tokenizer: the published vocabulary, and 64 tokens before the prompt."""
    path = tmp_path / "qwen_2.5_vl_7b.safetensors.safetensors"
    checkpoint, decoded = text_encoder_file(folder, path, lambda name: fp8 and is_layer(name), newer)
    assert role_of(path) == "text_encoder"
    encoder = loading.load(replica_for(checkpoint, "text_encoder"))
    for name, tensor in _held(encoder.model).items():
        stored = name.replace("language_model.", "model.")
        expected = decoded[_newer_name(stored) if newer else stored]
        assert torch.equal(tensor.decode().float(), expected.float()), name
    embedding = encoder.encode("Add a red hat", [Image.new("RGB", (64, 48), "red")])
    assert embedding.shape[-1] == 256 and bool(embedding.isfinite().all())


def _held(model: torch.nn.Module) -> dict[str, Encoded]:
    """The weights that a model holds, by name, in the form in which it holds them."""
    held = {
        name: Encoded(Plain(tensor.dtype), tuple(tensor.shape), {MATRIX: tensor})
        for name, tensor in model.state_dict().items()
    }
    kept = {name: module._encoded for name, module in model.named_modules() if hasattr(module, "_encoded")}
    return held | {f"{name}.weight": encoded for name, encoded in kept.items() if encoded is not None}


def _nbytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for encoded in _held(model).values() for tensor in encoded.parts.values())


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("embedding", [False, True])
def test_a_text_encoder_in_fp8_takes_what_is_planned(
    folder: Checkpoint, tmp_path: Path, precision: str, embedding: bool
) -> None:
    """No more than one in BF16, unless the embedding is in FP8 too: only its numbers are kept."""

    def fp8(name: str) -> bool:
        return is_layer(name) or (embedding and "embed_tokens" in name)

    checkpoint, _ = text_encoder_file(folder, tmp_path / "fp8.safetensors", fp8)
    replica, cache = replica_for(checkpoint, "text_encoder", precision), DiskCache(tmp_path / "cache", 10**9)
    first, again = (loading.load(replica, cache=cache) for _ in range(2))
    assert replica.spec.nbytes() == pytest.approx(_nbytes(first.model), abs=50_000)
    assert _nbytes(first.model) == _nbytes(again.model)
    one, other = (each.encode("Add a hat", [Image.new("RGB", (64, 48), "red")]) for each in (first, again))
    assert torch.equal(one, other)
    if not embedding:
        whole, _ = text_encoder_file(folder, tmp_path / "bf16.safetensors")
        assert replica.spec.nbytes() < replica_for(whole, "text_encoder", precision).spec.nbytes()


def test_a_vae_in_scaled_fp8_is_what_its_scales_say(folder: Checkpoint, tmp_path: Path) -> None:
    """Its weights have up to five dimensions."""
    decoded = every_fp8(weights(folder, "vae"), tmp_path / "vae.safetensors")
    found = dict(open_file(tmp_path / "vae.safetensors", "vae").component("vae").tensors())
    assert all(torch.equal(found[name].decode(), tensor) for name, tensor in decoded.items())


def test_a_read_only_tokenizer_is_used(folder: Checkpoint, tmp_path: Path) -> None:
    tokenizer = Path(shutil.copytree(TOKENIZER, tmp_path / "tokenizer"))
    for path in (*tokenizer.iterdir(), tokenizer):
        path.chmod(0o555 if path.is_dir() else 0o444)
    checkpoint, _ = text_encoder_file(folder, tmp_path / "model.safetensors")
    checkpoint = open_file(checkpoint.folder, "text_encoder", tokenizer)
    with checkpoint.component("processor").readable() as copy:
        assert all(path.stat().st_mode & 0o200 for path in (copy, *copy.iterdir()))
        assert {path.name for path in tokenizer.iterdir()} < {path.name for path in copy.iterdir()}
    tokenizer.chmod(0o755)


@pytest.mark.parametrize("names", ["wan", "diffusers"])
def test_a_vae_in_one_file_is_the_folder_bit_for_bit(folder: Checkpoint, tmp_path: Path, names: str) -> None:
    tensors = weights(folder, "vae")
    path = tmp_path / "qwen_image_vae.safetensors"
    save_file({core_names()[name]: t for name, t in tensors.items()} if names == "wan" else tensors, path)
    checkpoint, raw = open_file(path, "vae"), torch.randn(1, 16, 1, 8, 8)
    one, other = (vae.decode(loading.load(replica_for(each, "vae")), raw)[0] for each in (folder, checkpoint))
    assert torch.equal(one, other)
    assert checkpoint.latent_statistics() == folder.latent_statistics()


# What is found, and what is said of other files


def test_only_the_files_of_the_role_are_listed(folder: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    written("bf16", weights(folder), tmp_path / "sub")
    written("Q8_0", weights(folder), tmp_path)
    save_file(weights(folder, "vae"), tmp_path / "vae.safetensors")
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)}, tmp_path / "flux.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"\x10")
    torch.save({"txt_norm.weight": torch.ones(2)}, tmp_path / "pickle.pt")
    assert list(find_files([tmp_path], "transformer")) == ["model.gguf", "sub/model.safetensors"]
    assert list(find_files([tmp_path], "vae")) == ["vae.safetensors"]


def test_each_folder_of_files_is_searched_once(folder: Checkpoint, tmp_path: Path) -> None:
    root = tmp_path / "diffusion_models"
    (root / "team").mkdir(parents=True)
    (root / ".hidden").mkdir()
    written("bf16", weights(folder), root / "team")
    shutil.copy(root / "team" / "model.safetensors", root / ".hidden")
    (root / "again").symlink_to("team")
    (root / "team" / "up").symlink_to(tmp_path)
    (root / "loop").symlink_to("loop")
    assert list(find_files([root, root / "absent"], "transformer")) == ["team/model.safetensors"]


def test_a_file_that_could_not_be_read_for_a_while_is_found(
    folder: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when too many files are open."""
    path = tmp_path / "model.safetensors"
    plain(torch.bfloat16)(weights(folder), path)

    def no_file(*_: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", no_file)
        assert role_of(path) is None
    assert role_of(path) == "transformer"


def test_one_shard_of_several_is_not_a_model(folder: Checkpoint, tmp_path: Path) -> None:
    stored = weights(folder)
    path = tmp_path / "diffusion_pytorch_model-00001-of-00005.safetensors"
    save_file({name: tensor for name, tensor in stored.items() if name != "proj_out.weight"}, path)
    encoder = tmp_path / "model-00001-of-00004.safetensors"
    _, stored = text_encoder_file(folder, tmp_path / "whole.safetensors")
    save_file({name: tensor for name, tensor in stored.items() if name != "model.norm.weight"}, encoder)
    for role, shard in (("transformer", path), ("text_encoder", encoder)):
        assert role_of(shard) is None
        with pytest.raises(CheckpointError, match="is one part of several"):
            open_file(shard, role)


def test_a_controlnet_is_not_a_transformer(tmp_path: Path) -> None:
    sizes = dict(num_layers=1, attention_head_dim=16, num_attention_heads=1, axes_dims_rope=(4, 6, 6))
    model = QwenImageControlNetModel(joint_attention_dim=16, **sizes)
    save_file(model.state_dict(), tmp_path / "controlnet.safetensors")
    assert role_of(tmp_path / "controlnet.safetensors") is None
    with pytest.raises(CheckpointError, match="looks like a ControlNet"):
        open_file(tmp_path / "controlnet.safetensors", "transformer")


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_a_file_that_does_not_fit_the_model_is_called_a_file(
    folder: Checkpoint, tmp_path: Path, damage: str
) -> None:
    checkpoint, _ = written("bf16", weights(folder), tmp_path)
    name, tensors = "transformer_blocks.1.attn.to_q.bias", load_file(checkpoint.folder)
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.ones(3)
    save_file(tensors, checkpoint.folder)
    said = "lacks 1 of the model's tensors" if damage == "missing" else r"is \(3,\), and the model needs"
    with pytest.raises(CheckpointError, match=rf"model\.safetensors:? .*{said}.*Download it again\.$"):
        loading.load(replica_for(checkpoint, "transformer"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "looks like FLUX"),
        ("joint_blocks.0.x_block.attn.qkv.weight", "looks like Stable Diffusion 3"),
        ("blocks.0.cross_attn.k.weight", "looks like Wan"),
        ("transformer_blocks.0.attn.to_qkv.qweight", "nunchaku's own form"),
        ("something.else", "Its first tensor is something.else"),
    ],
)
def test_another_model_is_called_by_its_name(tmp_path: Path, name: str, message: str) -> None:
    save_file({name: torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_file(tmp_path / "other.safetensors", "transformer")


def test_a_file_of_another_role_says_which(folder: Checkpoint, tmp_path: Path) -> None:
    save_file(weights(folder, "vae"), tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"vae\.safetensors is a vae, not a transformer"):
        open_file(tmp_path / "vae.safetensors", "transformer")


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"neither \.safetensors nor \.gguf"):
        open_file(tmp_path / "model.ckpt", "transformer")


@pytest.mark.parametrize("form", ["bf16", "Q8_0"])
def test_a_truncated_file_is_named(folder: Checkpoint, tmp_path: Path, form: str) -> None:
    checkpoint, _ = written(form, weights(folder), tmp_path)
    path = checkpoint.folder
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=f"{path.name} is .*truncated"):
        open_file(path, "transformer")


@pytest.mark.parametrize("damage", ["no scale", "mxfp8", "blocks", "json", "block scales", "inverse scales"])
def test_a_form_that_is_incomplete_or_unknown_is_named(
    folder: Checkpoint, tmp_path: Path, damage: str
) -> None:
    checkpoint, _ = written("convrot", weights(folder), tmp_path)
    tensors, layer = load_file(checkpoint.folder), "transformer_blocks.1.attn.to_k"
    config = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 48}
    if damage == "no scale":
        del tensors[f"{layer}.weight_scale"]
    elif damage == "block scales":
        tensors[f"{layer}.weight_scale"] = torch.ones(2, 2)
    elif damage == "inverse scales":
        tensors[f"{layer}.weight_scale_inv"] = torch.ones(2, 2)
    elif damage == "json":
        tensors[f"{layer}.comfy_quant"] = torch.ones(4, dtype=torch.uint8)
    else:
        tensors[f"{layer}.comfy_quant"] = _bytes({"format": "mxfp8"} if damage == "mxfp8" else config)
    save_file(tensors, checkpoint.folder)
    messages = {
        "no scale": "to_k.weight lacks its scale",
        "mxfp8": "to_k is in the form mxfp8",
        "blocks": "rotated in blocks of 48, which cannot be",
        "block scales": r"to_k.weight_scale has the shape \[2, 2\]",
        "inverse scales": "they hold .*to_k.weight_scale_inv",
        "json": "what it says of its quantised layers cannot be read",
    }
    with pytest.raises(CheckpointError, match=messages[damage]):
        replica_for(checkpoint, "transformer")


def test_fp8_that_lost_its_scales_is_named(folder: Checkpoint, tmp_path: Path) -> None:
    checkpoint, _ = written("old fp8", weights(folder), tmp_path)
    tensors = load_file(checkpoint.folder)
    save_file({n: t for n, t in tensors.items() if not n.endswith("scale_weight")}, checkpoint.folder)
    with pytest.raises(CheckpointError, match="lacks its scale"):
        replica_for(checkpoint, "transformer")


def test_a_file_that_changes_while_it_loads_is_noticed(folder: Checkpoint, tmp_path: Path) -> None:
    checkpoint, _ = written("bf16", weights(folder), tmp_path)

    def replace(done: int, total: int) -> None:
        plain(torch.float16)(weights(folder), checkpoint.folder)

    with pytest.raises(CheckpointError, match=r"changed while they were in use|became shorter"):
        loading.load(replica_for(checkpoint, "transformer"), replace)


def test_the_plan_of_a_file_counts_the_published_other_parts(folder: Checkpoint, tmp_path: Path) -> None:
    checkpoint, _ = written("bf16", weights(folder), tmp_path)
    plan = make_plan(cpu_machine(), open_file(checkpoint.folder, "transformer", TOKENIZER))
    sizes = {there.role: there.weights for there in plan.placements}
    assert not plan.problems
    assert 13e9 < sizes["text_encoder"] < 16e9 and 1e8 < sizes["vae"] < 3e8


# Through the server


@pytest.fixture(scope="module")
def files(work: Path, folder: Checkpoint) -> dict[str, str]:
    """A file of each role in ComfyUI's folders, by role. The same weights are a folder called `published`."""
    models = work / "models"
    shutil.copytree(folder.folder, models / "diffusers" / "published")
    shutil.rmtree(models / "diffusers" / "published" / "processor")
    pictures = tiny_checkpoint.Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12845056)
    shutil.copytree(TOKENIZER, models / "diffusers" / "published" / "processor")
    pictures.save_pretrained(models / "diffusers" / "published" / "processor")
    (models / "unet" / "Sub").mkdir(parents=True)  # ComfyUI looks there first
    other = {"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)}
    save_file(other, models / "unet" / "Sub" / "model.safetensors")
    names = {
        "transformer": "Sub/model.safetensors",
        "text_encoder": "qwen.safetensors",
        "vae": "vae.safetensors",
    }
    for role, kind in (
        ("transformer", "diffusion_models"),
        ("text_encoder", "text_encoders"),
        ("vae", "vae"),
    ):
        path = models / kind / names[role]
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({_core_name(role, name): tensor for name, tensor in weights(folder, role).items()}, path)
    return names


def _core_name(role: str, name: str) -> str:
    if role == "vae":
        return core_names()[name]
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def test_three_files_edit_as_their_folder_does(client: Client, work: Path, files: dict[str, str]) -> None:
    from_folder = keep_tensor(edit_prompt("published"), [SAMPLE, 0], "folder")
    succeed(client, changed(from_folder, SAMPLE, resume="off"))
    for spelling in (str, lambda name: name.replace("/", "\\").lower()):
        prompt = keep_tensor(changed(edit_prompt(), SAMPLE, resume="off", cfg=4.0), [SAMPLE, 0], "files")
        for node, role in LOADERS.items():
            prompt = changed(prompt, node, checkpoint=spelling(files[role]))
        succeed(client, prompt)
        one, other = (kept_tensor(work, name)["samples"] for name in ("folder", "files"))
        assert torch.equal(one, other)


def test_each_loader_lists_the_files_of_its_role(client: Client, files: dict[str, str]) -> None:
    nodes = client.get("/object_info")
    for node, role in (("Transformer", "transformer"), ("TextEncoder", "text_encoder"), ("VAE", "vae")):
        listed = nodes[f"FireRedLoad{node}"]["input"]["required"]["checkpoint"][1]["options"]
        others = {name for other, name in files.items() if other != role}
        assert files[role] in listed and not others & set(listed)
        assert listed.index("tiny") < listed.index(files[role]) < listed.index("FireRed-Demo")


def test_a_file_in_the_wrong_loader_is_refused(client: Client, files: dict[str, str]) -> None:
    with pytest.raises(PromptRejected, match="There is no checkpoint"):
        client.run(changed(edit_prompt(), "3", checkpoint=files["transformer"]))


# Converting


@pytest.mark.parametrize("form", ["bf16", "new fp8", "Q4_K"])
def test_a_converted_file_loads_here_and_in_core(folder: Checkpoint, tmp_path: Path, form: str) -> None:
    checkpoint, decoded = written(form, weights(folder), tmp_path)
    target = tmp_path / "converted.safetensors"
    write_int8(checkpoint.component("transformer"), target, torch.device("cpu"))
    expected = by_diffusers(original_of(folder, decoded), GRID, TIMESTEP, None, text_width=256)
    converted = open_file(target, "transformer")
    assert (
        relative_error(predicted(loading.load(replica_for(converted, "transformer", "int8"))), expected)
        < 0.02
    )
    stored, layers = load_file(target), ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mod.1")
    products = subprocess.run(
        [sys.executable, "-c", IN_CORE, str(target), str(tmp_path / "core.safetensors"), *layers],
        env=os.environ | {"PYTHONPATH": str(comfyui_folder())},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert products.returncode == 0, products.stderr
    core = load_file(tmp_path / "core.safetensors")
    for layer in layers:
        right = core[f"{layer} x"] @ decoded[f"{layer}.weight"].float().T + stored[f"{layer}.bias"].float()
        assert relative_error(core[f"{layer} y"], right) < 0.02


# Load single layers with core's own class, as its loader does, and multiply.
IN_CORE = """
import sys, torch
sys.argv[1:], (path, target, *layers) = ["--cpu"], sys.argv[1:]
import comfy.options
comfy.options.enable_args_parsing()
import comfy.ops
from safetensors.torch import load_file, save_file
found, stored = {}, load_file(path)
for layer in layers:
    state = {key.removeprefix(layer + "."): value for key, value in stored.items() if key.startswith(layer + ".")}
    linear = comfy.ops.mixed_precision_ops(compute_dtype=torch.float32).Linear(*reversed(state["weight"].shape))
    linear.load_state_dict(state)
    x = torch.randn(40, state["weight"].shape[1], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found |= {layer + " x": x, layer + " y": linear(x).float().contiguous()}
save_file(found, target)
"""  # noqa: E501


def test_the_command_converts_and_never_overwrites(folder: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "converted.safetensors"
    command = [sys.executable, "-m", "launcher.convert", str(folder.folder), str(target)]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(2))
    assert first.returncode == 0 and "converted.safetensors: 0.0" in first.stdout
    assert role_of(target) == "transformer"
    assert second.returncode == 1 and "exists" in second.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["converted.safetensors"]


# Both files through core's own loader, and how far their predictions are apart.
WHOLE_IN_CORE = """
import sys
sys.argv[1:], paths = ["--cpu"], sys.argv[1:]
import comfy.options
comfy.options.enable_args_parsing()
import torch, comfy.sd, comfy.model_management
found = []
for path in paths:
    patcher = comfy.sd.load_diffusion_model(path)
    comfy.model_management.load_models_gpu([patcher])
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 1, 8, 8, generator=generator)
    context = torch.randn(1, 7, 3584, generator=generator)
    with torch.inference_mode():
        found.append(patcher.model.diffusion_model(latents, torch.tensor([0.6]), context=context).float())
print(float((found[1] - found[0]).norm() / found[0].norm()))
"""


def test_core_loads_a_converted_transformer_whole(tmp_path: Path) -> None:
    """One block of the real width, as core knows no other."""
    paths = tmp_path / "whole.safetensors", tmp_path / "converted.safetensors"
    drawn = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    tensors = {}
    for name, parameter in real_checkpoint.named_weights(real_checkpoint.transformer_on_meta(layers=1)):
        if parameter.ndim > 1:  # the same numbers again and again, in rows that begin elsewhere
            repeated = drawn.repeat(math.ceil(parameter.numel() / len(drawn)))
            tensors[name] = repeated[: parameter.numel()].view(parameter.shape).clone()
        else:
            tensors[name] = torch.full(parameter.shape, float(name.endswith("weight")), dtype=torch.bfloat16)
    save_file(tensors, paths[0])
    write_int8(open_file(paths[0], "transformer").component("transformer"), paths[1], torch.device("cpu"))
    done = subprocess.run(
        [sys.executable, "-c", WHOLE_IN_CORE, *map(str, paths)],
        env=os.environ | {"PYTHONPATH": str(comfyui_folder())},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    for path in paths:
        path.unlink()
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout.split()[-1]) < 0.03
