"""The tensors that weight files hold, whichever stored tensors make each of them.

Known are the forms of diffusers (plain, bitsandbytes), of ComfyUI (FP8 and INT8, old style and new) and GGUF.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import AGAIN, CheckpointError
from .encodings import MATRIX, SCALE, Bnb4, Encoded, Encoding, Fp8, Ggml, Int8, Plain, Stored, Unknown
from .rotations import CONVROT_BLOCK, Rotation
from .tensors import (
    DTYPES,
    Header,
    ParallelFile,
    file_version,
    read_header,
    read_tensor,
    read_tensors,
    stored_bytes,
    without_prefix,
)

FP8_FORMATS, INT8_FORMAT = ("float8_e4m3fn", "float8_e5m2"), "int8_tensorwise"  # ComfyUI's names
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BNB_LEVELS = 127  # by which LLM.int8() divides its scales
LAYER_CONFIG, FILE_CONFIG = "comfy_quant", "_quantization_metadata"  # ComfyUI's JSON, by layer and by file
OLD_FP8 = "scaled_fp8"  # marks a file of ComfyUI's older form
# What lies beside a layer's weight: scales (new and old style), those of LLM.int8(), tables of 4-bit codes.
BESIDE = re.compile(
    r"(?P<layer>.+)\.(?P<part>weight_scale|scale_weight|SCB|"
    r"weight\.(absmax|quant_map|nested_\w+|quant_state\..+))"
)
SCALES, BNB8_SCALE, TABLES = ("weight_scale", "scale_weight"), "SCB", "weight."
SHAPE_TABLE = "weight.quant_state."  # JSON that says a 4-bit matrix's shape
# Of no use here: scales of activations, what only repeats a form's name, markers.
IGNORED = re.compile(r"(.*\.)?(scaled_fp8|input_scale|scale_input|weight_format|comfy_quant)")
# Signs of forms that are not read here: AWQ, GPTQ, nunchaku, compressed-tensors, SDNQ, NVFP4, FP8 in blocks.
FOREIGN = re.compile(
    r".*\.(qweight|qzeros|wscales|weight_packed|weight_scale_(2|inv)|zero_point|svd_\w+|proj_(up|down))"
)
ADVICE = (
    "Use the BF16 files, those in ComfyUI's FP8 or INT8, or a GGUF; the loader's precision (int8 or nf4) "
    "makes them as small."
)


def stored_tensors(paths: Sequence[Path]) -> Mapping[str, Stored]:
    """The tensors of a component's weight files by name, from the headers and from small tensors.

    Raises CheckpointError for files that are damaged or of a form that is not read here. Each version of the
    files is looked at once in a process.
    """
    return _stored(tuple(paths), tuple(map(file_version, paths)))


def read_encoded(
    paths: Sequence[Path], stored: Mapping[str, Stored], reuse_buffers_for: torch.device | None
) -> Iterator[tuple[str, Encoded]]:
    """These tensors one by one, on the CPU, as read_tensors reads.

    Scales and tables may be in any of the files. Those of a matrix are read when it is its turn.
    """
    owners = {each.parts[MATRIX]: name for name, each in stored.items()}
    small = {part for each in stored.values() for key, part in each.parts.items() if key != MATRIX}
    with contextlib.ExitStack() as opened:
        where: dict[str, tuple[ParallelFile, Header]] = {}
        for path in paths if small else ():
            file, header = opened.enter_context(ParallelFile(path)), read_header(path)
            where |= {name: (file, header) for name in small.intersection(header.tensors)}
        for path in paths:
            for part, tensor in read_tensors(path, owners.__contains__, reuse_buffers_for):
                each = stored[owners[part]]
                rest = {k: read_tensor(*where[name], name) for k, name in each.parts.items() if k != MATRIX}
                yield owners[part], Encoded(each.encoding, each.shape, {MATRIX: tensor, **rest})


@functools.lru_cache(maxsize=16)
def _stored(paths: tuple[Path, ...], versions: object) -> Mapping[str, Stored]:
    """versions: makes the cache look at changed files again."""
    whole = {name: entry for path in paths for name, entry in read_header(path).tensors.items()}
    in_files = without_prefix(whole)
    entries = {name: whole[in_file] for name, in_file in in_files.items()}
    beside: dict[str, dict[str, str]] = {}
    for name in entries:
        if match := BESIDE.fullmatch(name):
            beside.setdefault(match["layer"], {})[match["part"]] = name
    source = paths[0] if len(paths) == 1 else paths[0].parent
    configs, shapes = _layer_configs(paths, in_files), _shapes_of_4_bit(paths, in_files, beside)
    files = _Files(source, in_files, entries, beside, configs, shapes)
    names = (name for name in entries if not IGNORED.fullmatch(name) and not BESIDE.fullmatch(name))
    return {name: files.stored(name) for name in names}


class _Files:
    """All that the headers of a component's files say.

    in_files: the names there, by those without a prefix, which all others here are. entries: of the headers.
    beside: what lies beside each layer's weight. configs: ComfyUI's, by layer. shapes: of 4-bit matrices, by
    layer.
    """

    def __init__(
        self,
        source: Path,
        in_files: Mapping[str, str],
        entries: Mapping[str, dict[str, Any]],
        beside: Mapping[str, Mapping[str, str]],
        configs: Mapping[str, Mapping[str, Any]],
        shapes: Mapping[str, tuple[int, ...]],
    ):
        self._source, self._in_files, self._entries, self._beside = source, in_files, entries, beside
        self._configs, self._shapes = configs, shapes
        self._has_scales = any(name.rpartition(".")[2] == OLD_FP8 for name in entries)
        without = next((layer for layer in beside if f"{layer}.weight" not in entries), None)
        if without is not None:
            raise CheckpointError(f"{source} has scales for {without} but not its weight. {AGAIN}")

    def stored(self, name: str) -> Stored:
        """The tensor of that name. Raises CheckpointError for a form that is not read here."""
        entry, layer = self._entries[name], name.removesuffix(".weight")
        beside = self._beside.get(layer, {}) if layer != name else {}
        if FOREIGN.fullmatch(name):
            raise self._not_read(f"they hold {name}")
        shape, parts = tuple(entry["shape"]), {MATRIX: name}
        encoding: Encoding
        if "ggml" in entry:
            kind, shape = entry["ggml"]
            encoding = Ggml(kind)
        elif any(part.startswith(TABLES) for part in beside):
            encoding, shape = Bnb4(), self._shapes[layer]
            parts |= {part.removeprefix(TABLES): each for part, each in beside.items()}
        elif BNB8_SCALE in beside and entry["dtype"] == "I8":
            self._require_row_scales(name, beside[BNB8_SCALE])
            encoding, parts[SCALE] = Int8(divisor=BNB_LEVELS), beside[BNB8_SCALE]
        else:
            encoding, scale = self._scaled_or_plain(name, layer, beside)
            parts |= {SCALE: scale} if scale else {}
        nbytes = sum(stored_bytes(self._entries[part]) for part in parts.values())
        return Stored(encoding, shape, {key: self._in_files[part] for key, part in parts.items()}, nbytes)

    def _scaled_or_plain(
        self, name: str, layer: str, beside: Mapping[str, str]
    ) -> tuple[Encoding, str | None]:
        """A tensor of ComfyUI's forms, or of plain numbers: its encoding, and the name of its scale."""
        entry, config = self._entries[name], self._configs.get(layer, {}) if layer != name else {}
        dtype, scale = DTYPES.get(entry["dtype"]), next((beside[s] for s in SCALES if s in beside), None)
        kind = config.get("format")
        if kind is not None and kind != INT8_FORMAT and kind not in FP8_FORMATS:
            raise self._not_read(f"{layer} is in the form {kind}")
        if scale is None and (kind is not None or (dtype in FP8 and self._has_scales and layer != name)):
            raise CheckpointError(f"{self._source}: {name} lacks its scale. {AGAIN}")
        if scale is not None:
            self._require_row_scales(name, scale)
        if scale is not None and dtype in FP8:
            return Fp8(), scale
        if scale is not None and dtype is torch.int8 and kind == INT8_FORMAT:
            return Int8(self._rotation(name, config)), scale
        if scale is not None or BNB8_SCALE in beside:
            raise self._not_read(f"they hold {scale or beside[BNB8_SCALE]}")
        if dtype in (torch.int8, torch.uint8) and layer != name:
            raise self._not_read(f"{name} is stored as {entry['dtype']}")
        return (Plain(dtype) if dtype else Unknown(entry["dtype"])), None

    def _require_row_scales(self, name: str, scale: str) -> None:
        """Raise CheckpointError unless there is one scale for all of the tensor, or one for each row."""
        shape, scales = self._entries[name]["shape"], self._entries[scale]["shape"]
        count = torch.Size(scales).numel()
        if not shape or (count != 1 and (count, scales[0]) != (shape[0], shape[0])):
            raise self._not_read(f"{scale} has the shape {scales}, {name} has {shape}")

    def _rotation(self, name: str, config: Mapping[str, Any]) -> Rotation | None:
        if not config.get("convrot"):
            return None
        block, width = config.get("convrot_groupsize", CONVROT_BLOCK), self._entries[name]["shape"][-1]
        rotation = Rotation("convrot", block if isinstance(block, int) else 0)
        if not rotation.exists or width % block:
            raise CheckpointError(
                f"{self._source}: {name} has {width} channels, said to be rotated in blocks of {block!r}, "
                f"which cannot be. {AGAIN}"
            )
        return rotation

    def _not_read(self, sign: str) -> CheckpointError:
        return CheckpointError(
            f"{self._source}: these weights are quantised in a form that is not read here ({sign}). {ADVICE}"
        )


def _layer_configs(paths: Sequence[Path], in_files: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """ComfyUI's descriptions of quantised layers, by layer."""
    found: dict[str, Mapping[str, Any]] = {}
    suffix = f".{LAYER_CONFIG}"
    described = {in_files[name]: name.removesuffix(suffix) for name in in_files if name.endswith(suffix)}
    for path in paths:
        metadata = read_header(path).metadata
        try:
            if FILE_CONFIG in metadata:  # its layers may lack the prefix that the file's names have
                layers = json.loads(metadata[FILE_CONFIG])["layers"]
                found |= {layer: layers[in_file] for layer, in_file in without_prefix(layers).items()}
            for name, tensor in read_tensors(path, described.__contains__) if described else ():
                found[described[name]] = json.loads(tensor.numpy().tobytes())
            found = {layer: {**config, **config.get("params", {})} for layer, config in found.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: what it says of its quantised layers cannot be read ({error}). {AGAIN}"
            ) from error
    return found


def _shapes_of_4_bit(
    paths: Sequence[Path], in_files: Mapping[str, str], beside: Mapping[str, Mapping[str, str]]
) -> dict[str, tuple[int, ...]]:
    """The shapes of bitsandbytes' 4-bit matrices, by layer: the files keep them in tables only."""
    owners = {
        in_files[name]: layer
        for layer, parts in beside.items()
        for part, name in parts.items()
        if part.startswith(SHAPE_TABLE)
    }
    shapes = {}
    for path in paths if owners else ():
        for name, tensor in read_tensors(path, owners.__contains__):
            try:
                shapes[owners[name]] = tuple(map(int, json.loads(tensor.numpy().tobytes())["shape"]))
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{path}: {name} cannot be read ({error}). {AGAIN}") from error
    for layer, parts in beside.items():
        if any(part.startswith(TABLES) for part in parts) and layer not in shapes:
            raise CheckpointError(f"{paths[0].parent}: the 4-bit matrix {layer} lacks tables. {AGAIN}")
    return shapes
