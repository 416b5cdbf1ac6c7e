"""Measure what our own kernels gain on one GPU: the parts of a forward, memory, and what they change.

The real-size transformer with random weights, 1024x1024, one 1 MP reference, 250 text tokens, TF32 off. Each
way is measured in a process of its own, on the card's own choice of kernels; `torch` is without ours.
Usage: python own_kernels.py CHECKPOINT [WAY ...]  (full_checkpoint.py makes CHECKPOINT; WAY: int8-fast-fp32)
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from engine.arithmetic import exact_fp32
from engine.limits import EXACT, INT8
from engine.models import loading
from engine.sampling.conditioning import POSITIVE
from engine.sampling.options import SamplingOptions
from engine.sampling.workers import LocalWorker
from precision import DEVICE, GIB, inputs, replica_for, timed
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

WAYS = ("fp32-fp32", "int8-fp32", "int8-fast-fp32", "bf16-bf16", "int8-fast-bf16")
KINDS = {  # of kernels, by what their names contain
    "attention": ("fmha", "attend", "sdpa", "flash"),
    "products": ("gemm", "cutlass", "nvjet", "multiply_int8"),
}


def measure(folder: Path, way: str, attention: str, results: Path) -> dict[str, float]:
    name, _, math = way.rpartition("-")
    replica = replica_for(folder, "transformer", name, math)
    transformer = loading.load(replica)
    run, latents = inputs(folder, replica)
    options = SamplingOptions(attention=attention)
    worker = LocalWorker(transformer, run.schedule, run.padded_size, run.conditions, options=options)
    lane = worker.lane(POSITIVE, latents, 1)
    torch.cuda.synchronize()
    weights = torch.cuda.memory_allocated()
    with torch.inference_mode(), exact_fp32():
        torch.save(lane.predict().float().cpu(), results)
        torch.cuda.reset_peak_memory_stats()
        seconds = timed(lambda: replace(lane).predict(), 3)
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            lane.predict()
            torch.cuda.synchronize()
    busy: dict[str, float] = collections.Counter()
    for event in profiled.events():
        if event.device_type == DeviceType.CUDA:
            kind = next(
                (kind for kind, names in KINDS.items() if any(n in event.name for n in names)), "rest"
            )
            busy[kind] += event.time_range.elapsed_us() / 1e3
    peak = torch.cuda.max_memory_allocated() - weights
    return {"forward": seconds * 1e3, **busy, "beside weights GiB": peak / GIB}


def in_process(folder: Path, way: str, attention: str, kernels: str, results: Path) -> dict[str, float]:
    command = [sys.executable, __file__, str(folder), "--one", way, attention, str(results)]
    environment = os.environ | {"FIRERED_KERNELS": kernels}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    folder, *ways = sys.argv[1:]
    if ways[:1] == ["--one"]:
        print(json.dumps(measure(Path(folder), *ways[1:3], Path(ways[3]))))
        return
    print(torch.cuda.get_device_name(DEVICE))
    columns = ("forward", "products", "attention", "rest", "beside weights GiB")
    print(f"| weights and arithmetic | kernels | {' ms | '.join(columns)} | change |\n|---|---|{'---|' * 6}")
    with tempfile.TemporaryDirectory() as temporary:
        reference = None
        for way in ways or WAYS:
            rows = [("torch", EXACT, "off"), ("ours", EXACT, "on")]
            if way.endswith("fp32"):
                rows.append(("ours, attention int8", INT8, "on"))
            for label, attention, kernels in rows:
                found = in_process(Path(folder), way, attention, kernels, Path(temporary, "result.pt"))
                result = torch.load(Path(temporary, "result.pt"))
                reference = result if reference is None else reference
                change = float((result - reference).norm() / reference.norm())
                cells = " | ".join(f"{found[column]:.3g}" for column in columns)
                print(f"| {way} | {label} | {cells} | {change:.1e} |", flush=True)


if __name__ == "__main__":
    main()
