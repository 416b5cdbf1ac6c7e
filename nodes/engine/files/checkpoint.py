"""What is on disk: diffusers folders of the edit pipeline, their components and their tensors.

Nothing here keeps weights: headers are read to describe and verify, tensors are handed out one at a time.
Format of the weights: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from ..errors import CheckpointError

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

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Dtype and shape of tensors, by name.
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # where there is no index
# The same with a variant in the name, as save_pretrained(variant="fp16") writes it.
VARIANT = re.compile(r"(diffusion_pytorch_model|model)\.(safetensors\.index\.[^.]+\.json|[^.]+\.safetensors)")
SHARD = re.compile(r".*-\d+-of-\d+\.safetensors")
OTHER_WEIGHTS = (".safetensors", ".sft", ".bin", ".gguf", ".pt", ".pth", ".ckpt")
MAX_PINNED_BYTES = 2**28
READERS = 4  # threads that read a file together
PIECE_BYTES = 2**24  # that one of them reads at a time
MAX_HEADER_BYTES = 100_000_000  # the limit the safetensors library itself enforces
SAMPLED_BYTES = 2**22  # about what is read of a big file to recognise it
MIN_SAMPLE_BYTES = 2**12  # of each tensor
MAX_DEPTH = 5  # of a checkpoint below its root: a Hugging Face cache has it in models--NAME/snapshots/HASH
NEVER_SEARCHED = "blobs"  # of a Hugging Face cache; and what is hidden

# What the configs must say where they say anything: the class, or for the text encoder the kind of model.
# transformers always writes `model_type`, but `architectures` at the top, inside text_config or nowhere.
CLASS_KEYS = {
    "transformer": ("_class_name", "QwenImageTransformer2DModel"),
    "text_encoder": ("model_type", "qwen2_5_vl"),
    "vae": ("_class_name", "AutoencoderKLQwenImage"),
    "scheduler": ("_class_name", "FlowMatchEulerDiscreteScheduler"),
}
# What diffusers takes for the numbers we read where a config leaves them out.
DEFAULTS: dict[str, dict[str, int | float]] = {
    "transformer": {
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
    },
    "vae": {"base_dim": 96},
    "scheduler": {
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "shift": 1.0,
    },
}
# What these nodes compute. A config that asks for something else would silently get another picture.
COMPUTED: dict[str, dict[str, int | bool]] = {
    "transformer": {
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "guidance_embeds": False,
        "use_additional_t_cond": False,
        "use_layer3d_rope": False,
    },
    "vae": {"z_dim": 16, "input_channels": 3},
    "scheduler": {"num_train_timesteps": 1000, "stochastic_sampling": False},
}
QUANTIZED_CONFIGS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Component:
    """One component's folder of a checkpoint, such as `transformer`."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def config(self) -> dict[str, Any]:
        """The component's own config.json (scheduler_config.json for the scheduler), checked.

        Numbers that we read and it leaves out have diffusers' defaults. Raises CheckpointError for another
        model, for weights that are quantised already, and for what these nodes would compute differently.
        """
        path = self.folder / ("scheduler_config.json" if self.name == "scheduler" else "config.json")
        config = read_json(path)
        key, expected = CLASS_KEYS[self.name]
        found = config.get(key) or expected
        if found != expected:
            raise CheckpointError(
                f"{self.folder} holds a {found}, not a {expected} ({path.name} says so). Download the "
                f"original {self.name} folder."
            )
        for part in (config, config.get("text_config")):
            for name in QUANTIZED_CONFIGS:
                if isinstance(part, dict) and part.get(name):
                    raise already_quantized(self.folder, f"{path.name} has a {name}")
        for name, value in COMPUTED.get(self.name, {}).items():
            if config.get(name, value) != value:
                raise CheckpointError(
                    f"{path} sets {name} to {config[name]!r}; these nodes compute {value!r} only. Use the "
                    f"{self.name} folder of a FireRed-Image-Edit or Qwen-Image-Edit checkpoint."
                )
        config = DEFAULTS.get(self.name, {}) | config
        for name, default in DEFAULTS.get(self.name, {}).items():
            _require_number(path, name, config[name], whole=isinstance(default, int))
        if "axes_dims_rope" in config:
            _require_axes(path, config["axes_dims_rope"], config["attention_head_dim"])
        return config

    def shards(self) -> list[Path]:
        """The weight files, each checked to be complete. Raises CheckpointError naming one that is not."""
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
                f"{self.folder} has several variants of its weights: {', '.join(variants)}. Keep one of them."
            )
        for name in plain or variants:
            path = self.folder / name
            return _indexed_shards(path) if name.endswith(".json") else [path]
        if any(map(SHARD.fullmatch, files)):
            raise CheckpointError(
                f"{self.folder} has no *.safetensors.index.json beside its shards. Download it again; they "
                f"can stay."
            )
        others = [name for name in files if name.endswith(OTHER_WEIGHTS)]
        if not others:
            raise CheckpointError(f"No .safetensors weights in {self.folder}. Download the folder again.")
        raise CheckpointError(
            f"No .safetensors weights in {self.folder} that these nodes read ({' or '.join(WEIGHT_FILES)}): "
            f"it has {', '.join(others)}. Download the safetensors files of the original folder."
        )

    def _file_names(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.folder) if not name.startswith("."))
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be read ({error}). Check the disk.") from error

    def stored(self) -> dict[str, dict[str, Any]]:
        """Dtype, shape and offsets of every stored tensor, by name; the files are checked as by shards."""
        return {name: info for shard in self._shard_paths() for name, info in read_header(shard).items()}

    def tensors(
        self, wanted: Callable[[str], bool] = lambda name: True, borrowed_for: torch.device | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The stored tensors whose names are `wanted`, in turn, on the CPU; see read_tensors."""
        for shard in self.shards():
            yield from read_tensors(shard, wanted, borrowed_for)

    def identity(self) -> str:
        """A short hash of the component's files: names, sizes, times and what they hold.

        Of small files it is all they hold; of big ones the header, a block from the middle of every tensor,
        and the end. So two fine-tunes differ, also where every file has one size and one time. What it cannot
        tell apart is a change inside big tensors that leaves their sampled blocks, the size and the times as
        they were. Each version of a file is read once in a process.
        """
        try:
            files = {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*")}
            shown = [name for name in sorted(files) if not name.startswith(".") and "/." not in name]
            return _digest([(name, *file_identity(files[name])) for name in shown if files[name].is_file()])
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be read ({error}). Check the permissions."
            ) from error


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
        """Mean and standard deviation of the latent channels, each (1, 16, 1, 1, 1) FP32 on the CPU.

        Raises CheckpointError where the VAE's config.json has others than 16 numbers.
        """
        path = self.folder / "vae" / "config.json"
        config = read_json(path) if path.is_file() else {}
        mean = config.get("latents_mean", LATENTS_MEAN)
        std = config.get("latents_std", LATENTS_STD)
        for name, values in (("latents_mean", mean), ("latents_std", std)):
            if not isinstance(values, list | tuple) or len(values) != len(LATENTS_MEAN):
                raise CheckpointError(
                    f"{path}: {name} is {values!r}; it must be a list of {len(LATENTS_MEAN)} numbers. "
                    "Download this file again."
                )
            for value in values:
                _require_number(path, name, value, positive=name == "latents_std")
        return torch.tensor(mean).view(1, -1, 1, 1, 1), torch.tensor(std).view(1, -1, 1, 1, 1)


def _require_axes(path: Path, axes: object, head_size: int) -> None:
    """Raise CheckpointError where a rotary embedding does not divide a head's channels into pairs."""
    whole = isinstance(axes, list | tuple) and all(isinstance(axis, int) and axis > 0 for axis in axes)
    if not whole or any(axis % 2 for axis in axes) or sum(axes) != head_size or len(axes) != 3:  # type: ignore
        raise CheckpointError(
            f"{path}: axes_dims_rope is {axes!r}; it must be three even numbers that add up to {head_size}. "
            "Download this file again."
        )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Check that `folder` holds the edit pipeline. Raises CheckpointError saying what it holds instead."""
    index = folder / "model_index.json"
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


def find_checkpoints(roots: Iterable[str | Path]) -> dict[str, Path]:
    """Every edit-pipeline folder below the given roots, by its path relative to its root (with `/`).

    Each real folder is looked at once, whatever links lead to it, and where it is before where a link leads.
    Nothing is looked for below a folder with a model_index.json, in caches and hidden folders, or deeper than
    MAX_DEPTH.
    """
    found: dict[str, Path] = {}
    for root, folder in _pipeline_folders([Path(root) for root in roots]):
        with contextlib.suppress(CheckpointError):
            found.setdefault(folder.relative_to(root).as_posix(), open_checkpoint(folder).folder)
    return dict(sorted(found.items()))


def _pipeline_folders(roots: list[Path]) -> Iterator[tuple[Path, Path]]:
    """Each folder that has a model_index.json, after the root that it is below."""
    folders = [(root, root, 0) for root in reversed(roots)]
    links: list[tuple[Path, Path, int]] = []
    seen: set[tuple[int, object]] = set()
    while folders or links:
        root, folder, depth = folders.pop() if folders else links.pop()
        try:
            there = os.stat(folder)
            real = there.st_dev, there.st_ino or os.path.realpath(folder)  # some drives number nothing
            if real in seen:
                continue
            seen.add(real)
            with os.scandir(folder) as listed:
                entries = sorted(listed, key=lambda entry: entry.name, reverse=True)
            below = [entry for entry in entries if _is_searched(entry)]
        except (OSError, ValueError):  # not there, not ours to read, or a name this system cannot hold
            continue
        if any(entry.name == "model_index.json" for entry in entries):
            yield root, folder
        elif depth < MAX_DEPTH:
            for entry in below:
                (links if entry.is_symlink() else folders).append((root, folder / entry.name, depth + 1))


def _is_searched(entry: os.DirEntry[str]) -> bool:
    try:
        return not entry.name.startswith(".") and entry.name != NEVER_SEARCHED and entry.is_dir()
    except OSError:  # a link to itself, or into what is not ours to read
        return False


def download_hint() -> str:
    return f"Get FireRed with: {DOWNLOAD_COMMAND}"


def already_quantized(folder: Path, sign: str) -> CheckpointError:
    """What to say of weights that somebody else quantised. sign: what shows it."""
    return CheckpointError(
        f"{folder} is quantised already ({sign}), in a form these nodes do not read. Download the original "
        f"folder with BF16 weights; the loader's precision (int8 or nf4) makes them as small."
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk, in UTF-8 or UTF-16, with or without a byte order mark.

    Raises CheckpointError when it is missing or not one.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. Download this file again; the others can stay.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Download this file again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object. Download this file again.")
    return content


def _require_number(
    path: Path, name: str, value: object, whole: bool = False, positive: bool = False
) -> None:
    kind = int if whole else int | float
    good = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    if not good or ((whole or positive) and value <= 0):  # type: ignore[operator]
        wanted = "a whole number above 0" if whole else "a number above 0" if positive else "a number"
        raise CheckpointError(f"{path}: {name} is {value!r}; it must be {wanted}. Download this file again.")


def _indexed_shards(index: Path) -> list[Path]:
    """The weight files that an index lists, all beside it."""
    weight_map = read_json(index).get("weight_map")
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    if not names or any(name != os.path.basename(name) for name in names):
        raise CheckpointError(
            f"{index} has no weight_map that names the weight files. Download this file again; the others "
            f"can stay."
        )
    return [index.with_name(name) for name in sorted(names)]


def file_identity(path: Path) -> tuple[int, int, str]:
    """A file's size, its time in nanoseconds and a digest of what it holds (see Component.identity).

    All zero and empty where it cannot be read.
    """
    try:
        stat = path.stat()
        version = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
        return stat.st_size, stat.st_mtime_ns, _content(os.fspath(path), *version)
    except (OSError, ValueError):
        return 0, 0, ""


@functools.lru_cache(maxsize=4096)
def _content(path: str, size: int, *version: int) -> str:
    """A digest of samples of a file. version: of the file, so that each is read once."""
    hashed = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        for start, length in _samples(Path(path), size):
            file.seek(start)
            hashed.update(file.read(length))
    return hashed.hexdigest()


def _samples(path: Path, size: int) -> Iterator[tuple[int, int]]:
    """Start and length of what is read of a file, in its order."""
    if size <= SAMPLED_BYTES or path.suffix == ".json":
        yield 0, size
        return
    try:
        header, start_of_data = _read_header(path)
    except CheckpointError:
        header, start_of_data = {}, SAMPLED_BYTES
    yield 0, start_of_data
    length = max(MIN_SAMPLE_BYTES, SAMPLED_BYTES // max(len(header), 1))
    for start, end in sorted(info["data_offsets"] for info in header.values()):
        yield start_of_data + max(start, (start + end - length) // 2), min(length, end - start)
    yield size - MIN_SAMPLE_BYTES, MIN_SAMPLE_BYTES


def _digest(parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Names, dtypes and shapes of a safetensors file, after checking that all its bytes are there."""
    return _read_header(path)[0]


def _read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The header, and where in the file the data starts that its offsets count from."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, MAX_HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, info in header.items():
            start, end = info["data_offsets"]
            dtype = DTYPES.get(info["dtype"])
            if dtype is not None and torch.Size(info["shape"]).numel() * dtype.itemsize != end - start:
                raise ValueError(f"the size of {name} does not match its shape")
        start_of_data = 8 + length
        expected = start_of_data + max((info["data_offsets"][1] for info in header.values()), default=0)
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
    return header, start_of_data


def read_tensors(
    path: Path,
    wanted: Callable[[str], bool] = lambda name: True,
    borrowed_for: torch.device | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The `wanted` tensors of a safetensors file, each being read while the one before is worked on.

    Plain reads rather than a memory map: never more than two tensors of the file are in host memory.
    borrowed_for: the device each tensor is copied to before the next is asked for; two buffers then do.
    """
    header, start_of_data = _read_header(path)
    names = sorted(filter(wanted, header), key=lambda name: header[name]["data_offsets"][0])
    sizes = {name: stored_bytes(header[name]) for name in names}
    buffers = []
    if borrowed_for is not None:
        buffers = [_host_buffer(max(sizes.values(), default=0), borrowed_for) for _ in range(2)]

    def read(index: int) -> torch.Tensor:
        name = names[index]
        info, size = header[name], sizes[name]
        if info["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} is stored as {info['dtype']}, which these nodes do not read."
            )
        data = buffers[index % 2][:size] if buffers else torch.empty(size, dtype=torch.uint8)
        try:
            complete = file.read_into(data.numpy().data, start_of_data + info["data_offsets"][0])
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}). Check the disk, or download it again."
            ) from error
        if not complete:
            raise CheckpointError(f"{path} became shorter while it was read. Download this file again.")
        return data.view(DTYPES[info["dtype"]]).reshape(info["shape"])

    with ParallelFile(path) as file, ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, 0) if names else None
        for index, name in enumerate(names):
            assert ahead is not None
            tensor = ahead.result()
            ahead = reader.submit(read, index + 1) if index + 1 < len(names) else None
            yield name, tensor
            del tensor


class ParallelFile:
    """A file that a few threads read together: one alone is slower than a fast disk or the page cache."""

    def __init__(self, path: Path):
        self._files: SimpleQueue[Any] = SimpleQueue()
        with contextlib.ExitStack() as opened:
            for _ in range(READERS):
                self._files.put(opened.enter_context(path.open("rb", buffering=0)))
            self._opened = opened.pop_all()
        self._pool = ThreadPoolExecutor(READERS)

    def __enter__(self) -> ParallelFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._opened.close()

    def read_into(self, data: memoryview, offset: int) -> bool:
        """Fill `data` from there on; False where the file ends before. Raises OSError."""
        starts = range(0, len(data), PIECE_BYTES)
        pieces = [data[start : start + PIECE_BYTES] for start in starts]
        if len(pieces) < 2:  # not worth a thread
            return all(self._read_piece(piece, offset) for piece in pieces)
        return all(self._pool.map(self._read_piece, pieces, [offset + start for start in starts]))

    def _read_piece(self, piece: memoryview, offset: int) -> bool:
        file = self._files.get()
        try:
            file.seek(offset)
            while piece and (count := file.readinto(piece)):
                piece = piece[count:]
            return not piece
        finally:
            self._files.put(file)


def stored_bytes(info: dict[str, Any]) -> int:
    """How many bytes a tensor takes in its file, from its entry in the header."""
    start, end = info["data_offsets"]
    return end - start


def _host_buffer(size: int, device: torch.device) -> torch.Tensor:
    """Uninitialised bytes, pinned for copies to a GPU if few: pinned memory is never given back."""
    pinned = device.type == "cuda" and size <= MAX_PINNED_BYTES
    return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
