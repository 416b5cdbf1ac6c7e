"""Measure what folding a schedule's modulation costs: seconds and GB/s, from the disk and the page cache.

A plain read of the same bytes is measured for comparison.

Usage: python modulation.py [FOLDER [STEPS [LAYERS]]]    (a checkpoint of the real width; without one, or with
`-`, one is written that holds LAYERS layers of modulation alone, 0.23 GB each)
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import real_checkpoint
import tiny_checkpoint
import torch
from engine.cards.card import Card
from engine.files.checkpoint import Checkpoint, open_checkpoint
from engine.files.tensors import read_header, stored_bytes
from engine.models.config import TransformerConfig
from engine.models.modulation import Modulation, is_folded
from engine.weights.components import ComponentSpec, Replica
from engine.weights.precision import PRECISIONS
from full_checkpoint import write_tensors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BUFFER_BYTES = 2**26


def main(folder: str = "-", steps: str = "40", layers: str = "20") -> None:
    with contextlib.ExitStack() as kept:
        if folder == "-":
            folder = write(Path(kept.enter_context(tempfile.TemporaryDirectory(dir="."))), int(layers))
        checkpoint = open_checkpoint(Path(folder))
        device = (
            torch.cuda.get_device_name()
            if DEVICE.type == "cuda"
            else f"{torch.get_num_threads()} CPU threads"
        )
        print(f"{steps} steps on {device}, torch {torch.__version__}")
        print("| | from | GB | s | GB/s |\n|---|---|---|---|---|")
        for source in ("disk", "page cache"):
            for what, run in (("plain read", plain_read), ("fold", fold)):
                if source == "disk" and not drop_from_page_cache(checkpoint):
                    continue
                started = time.perf_counter()
                size = run(checkpoint, int(steps))
                seconds = time.perf_counter() - started
                print(
                    f"| {what} | {source} | {size / 1e9:.2f} | {seconds:.2f} | {size / 1e9 / seconds:.2f} |",
                    flush=True,
                )


def fold(checkpoint: Checkpoint, steps: int) -> int:
    """Fold as the sampler does for a new schedule, and return the number of bytes read."""
    card = Card("cpu", "cpu", torch.device("cpu"), native_bf16=False, memory=2**40, is_gpu=False)
    replica = Replica(ComponentSpec.of("transformer", checkpoint, PRECISIONS["fp32"]), card)
    read: list[int] = []
    config = TransformerConfig.of(checkpoint.component("transformer").config())
    modulation = Modulation(replica, config, None)
    modulation.of(torch.linspace(1, 0.02, steps), lambda done, total: read.append(done))
    return read[-1]


def plain_read(checkpoint: Checkpoint, steps: int) -> int:
    """Read the same bytes in the order of the files, with one thread, into one buffer."""
    buffer, total = memoryview(bytearray(BUFFER_BYTES)), 0
    for path, offset, size in pieces(checkpoint):
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while size:
                count = file.readinto(buffer[:size])
                total, size = total + count, size - count
    return total


def pieces(checkpoint: Checkpoint) -> Iterator[tuple[Path, int, int]]:
    """The modulation weights in the files: file, first byte, number of bytes."""
    for shard in checkpoint.component("transformer").shards():
        with shard.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        stored = [info for name, info in read_header(shard).items() if is_folded(name)]
        for info in sorted(stored, key=lambda info: info["data_offsets"]):
            yield shard, start + info["data_offsets"][0], stored_bytes(info)


def drop_from_page_cache(checkpoint: Checkpoint) -> bool:
    """Drop the files from the page cache, so that they are read from the disk. Whether the system can."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for shard in checkpoint.component("transformer").shards():
        with shard.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def write(folder: Path, layers: int) -> str:
    """Write a checkpoint with what folding reads, and nothing else of the transformer."""
    tiny_checkpoint.write_rest(folder)
    model = real_checkpoint.transformer_on_meta(layers)
    model.save_config(folder / "transformer")
    needed = {name: parameter for name, parameter in model.named_parameters() if is_folded(name)}
    write_tensors(needed, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return str(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
