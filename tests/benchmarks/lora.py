"""What a LoRA costs: the time of a forward and the memory with it and without, at the real width.

Usage: python lora.py FOLDER [RANK]    (a checkpoint by full_checkpoint.py; the LoRA is random, on all layers)
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from engine.files.checkpoint import open_checkpoint
from engine.files.lora import LoRA, open_lora
from engine.models import loading
from engine.sampling.options import SamplingOptions
from engine.sampling.workers import LocalWorker
from engine.weights.adapters import Adapter, adaptable_layers
from engine.weights.names import FOLDED
from full_checkpoint import write_tensors
from precision import GIB, inputs, replica_for, timed

WAYS = (
    ("int8", "fp32"), ("int8-fast", "fp32"), ("nf4", "fp32"), ("int8-bnb", "fp32"), ("fp32", "fp32"),
    ("bf16", "bf16"), ("int8", "bf16"), ("int8-fast", "bf16"),
)  # fmt: skip


def random_lora(folder: Path, path: Path, rank: int) -> LoRA:
    """As a Lightning LoRA: BF16, on the linears of the blocks but for the modulation."""
    layers = adaptable_layers(open_checkpoint(folder))
    parameters: dict[str, torch.Tensor] = {}
    for name, (outputs, width) in layers.items():
        if name.startswith("transformer_blocks") and not FOLDED.match(f"{name}."):
            for half, shape in (("lora_A", (rank, width)), ("lora_B", (outputs, rank))):
                parameters[f"{name}.{half}.weight"] = torch.empty(shape, device="meta")
    write_tensors(parameters, path)
    return open_lora(path, layers)


def measure(folder: Path, lora: LoRA, precision: str, math: str) -> str:
    """A row of the table."""
    replica = replica_for(folder, "transformer", precision, math)
    transformer = loading.load(replica)
    run, latents = inputs(folder, replica)
    seconds, used, peaks = [], [], []
    for adapters in ((), (Adapter(lora, 1.0),)):
        options = SamplingOptions(adapters=adapters)
        before = torch.cuda.memory_allocated()
        worker = LocalWorker(transformer, run.schedule, run.padded_size, run.conditions, options=options)
        used.append(torch.cuda.memory_allocated() - before)
        torch.cuda.reset_peak_memory_stats()
        seconds.append(timed(lambda worker=worker: worker.predict(latents, 1)))
        peaks.append(torch.cuda.max_memory_allocated())
        del worker
    without, with_lora = seconds
    return (
        f"| {precision}, {math} arithmetic | {without:.3f} | {with_lora:.3f} | {with_lora / without:.3f} "
        f"| {(used[1] - used[0]) / GIB:.3f} | {(peaks[1] - peaks[0]) / GIB:.3f} "
        f"| {8 * with_lora / (80 * without):.3f} |"
    )


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 64
    with tempfile.TemporaryDirectory() as temporary:
        lora = random_lora(folder, Path(temporary) / "lora.safetensors", rank)
        print(
            f"{torch.cuda.get_device_name()}, rank {rank}: the file's factors are {lora.nbytes / GIB:.3f} GiB"
        )
        print("| | step s | with LoRA | ratio | memory GiB | at the peak GiB | 8 forwards against 80 |")
        print("|---|---|---|---|---|---|---|")
        for precision, math in WAYS:
            print(measure(folder, lora, precision, math), flush=True)


if __name__ == "__main__":
    main()
