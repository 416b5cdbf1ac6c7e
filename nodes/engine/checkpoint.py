"""What is on disk: diffusers folders of the edit pipeline, their components and their tensors.

Nothing here keeps weights: headers are read to describe and verify, tensors are handed out one at a time.
Format of the weights: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

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
MAX_PINNED_BYTES = 2**28
READERS = 4  # threads that read a file together
PIECE_BYTES = 2**24  # that one of them reads at a time
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
        shards = self._shard_paths()
        for shard in shards:
            read_header(shard)
        return shards

    def _shard_paths(self) -> list[Path]:
        indexes = sorted(self.folder.glob("*.safetensors.index.json"))
        if indexes:
            names = sorted(set(read_json(indexes[0]).get("weight_map", {}).values()))
        else:
            names = [name for name in WEIGHT_FILES if (self.folder / name).is_file()]
        if not names and any(self.folder.glob("*-of-*.safetensors")):
            raise CheckpointError(
                f"{self.folder} has no *.safetensors.index.json beside its shards. Download it again; they "
                f"can stay."
            )
        if not names:
            raise CheckpointError(f"No .safetensors weights in {self.folder}. Download the folder again.")
        return [self.folder / name for name in names]

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
