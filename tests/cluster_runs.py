"""Runs for tests of a cluster, and how they are sampled on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import replica_for
from engine.cluster.pool import Pool
from engine.cluster.task import Task
from engine.files.cache import DiskCache
from engine.files.checkpoint import Checkpoint
from engine.sampling.conditioning import Condition
from engine.sampling.resume import SavedRun
from engine.sampling.sampling import SamplingRun, prepare_run

PICTURES, STEPS, LONG = 3, 3, 90
Saver = Callable[[str], SavedRun | None]


def no_file(name: str) -> None:
    return None


def files_in(folder: Path) -> Saver:
    return lambda name: SavedRun(DiskCache(folder, 10**9), name)


def make_run(
    checkpoint: Checkpoint,
    pictures: int = PICTURES,
    steps: int = STEPS,
    precision: str = "int8",
    **changes: Any,
) -> SamplingRun:
    """A guided run of pictures of 128x128. changes: of prepare_run's arguments."""
    replica = replica_for(checkpoint, "transformer", precision)
    generator = torch.Generator().manual_seed(0)
    conditions = {
        name: Condition(
            torch.randn(1, tokens, 128, generator=generator), None,
            (torch.randn(1, 16, 1, 8, 8, generator=generator),),
        )
        for name, tokens in (("positive", 20), ("negative", 7))
    }  # fmt: skip
    arguments = {"samples": torch.zeros(pictures, 16, 1, 16, 16)} | changes
    return prepare_run(
        replica, conditions, steps=steps, true_cfg_scale=4.0, width=0, height=0, seed=3, **arguments
    )


def finish(pool: Pool, run: SamplingRun, saver: Saver = no_file, act=lambda done: None) -> torch.Tensor:
    """Sample the run on the pool; `act` is told the number of steps done."""
    return pool.wait(
        pool.submit(Task(run, "stop"), saver), run.schedule.steps, lambda what, done, total, _: act(done)
    )
