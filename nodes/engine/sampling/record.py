"""What happened in a run, for people: a few lines for a node's output and the picture's file."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..cards.kernels import device_label
from ..latents import VAE_SCALE
from ..progress import duration
from ..units import GIB

if TYPE_CHECKING:
    from .sampling import SamplingRun

FROM_DISK = "its steps were computed by an earlier prompt, whose latents were still on disk"


@dataclass
class RunRecord:
    """What a run notes while it goes.

    arithmetic: the kernels that the transformers chose. first_step: the step of all pictures, from 0, with
    which it began. skipped: how many steps the step cache left out. ends: when each step was done, on
    `clock`. peaks: the most bytes in use by torch, by card; only where torch counts them. workers: of a
    cluster, that computed it.
    """

    clock: Callable[[], float] = time.monotonic
    arithmetic: str = ""
    first_step: int = 0
    skipped: int = 0
    started: float = 0.0
    ends: list[float] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)
    workers: list[str] = field(default_factory=list)

    def start(self, devices: Sequence[torch.device]) -> None:
        self.started = self.clock()
        for device in devices:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)

    def finish(self, devices: Sequence[torch.device]) -> None:
        for device in devices:
            if device.type == "cuda":
                self.peaks[device_label(device)] = torch.cuda.max_memory_allocated(device)

    def add_workers(self, results: Sequence[Mapping[str, Any]]) -> None:
        """What the workers of a cluster say of the pictures they sampled."""
        self.arithmetic = "; ".join(dict.fromkeys(result["arithmetic"] for result in results))
        self.skipped += sum(result["skipped"] for result in results)
        counts = Counter(result["worker"] for result in results)
        self.workers = [f"{name}: {count} picture{'s' * (count > 1)}" for name, count in counts.items()]
        for result in results:
            if result["peak"]:
                name = result["worker"]
                self.peaks[name] = max(result["peak"], self.peaks.get(name, 0))

    def step(self) -> None:
        """A step is done."""
        self.ends.append(self.clock())

    @property
    def seconds_each(self) -> float | None:
        """Of a step. The first one also sets things up, so its time counts only while there is no other."""
        if len(self.ends) > 1:
            return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)
        return self.ends[0] - self.started if self.ends else None

    def describe(self, run: SamplingRun) -> str:
        """The lines."""
        options, layout = run.options, run.layout
        lines = [str(run.replica)]
        if layout is not None:
            others = ", ".join(str(replica.card) for replica in layout.replicas[1:])
            lines[0] += f", shared with {others} ({layout.mode})"
        if self.workers:
            lines.append(f"computed by {', '.join(self.workers)}")
        if self.arithmetic:
            lines.append(f"kernels: {self.arithmetic}")
        lines += [f"LoRA: {each.lora.name} at {each.strength:g}" for each in options.adapters]
        size = f"{run.width * VAE_SCALE}x{run.height * VAE_SCALE}"
        pictures = f"{run.batch} pictures, " if run.batch > 1 else ""
        lines.append(
            f"{pictures}{size}, {run.references} references, {run.schedule.steps} steps, "
            f"cfg {run.true_cfg_scale:g}, seed {run.seed}"
        )
        lines.append(self._time(run))
        lines += [f"peak memory of {card}: {peak / GIB:.2f} GiB" for card, peak in self.peaks.items()]
        return "\n".join(lines)

    def _time(self, run: SamplingRun) -> str:
        if self.seconds_each is None:
            return FROM_DISK
        said = f"{self.seconds_each:.3g} s a step, {duration(self.ends[-1] - self.started)} in all"
        if self.first_step:
            said += f"; resumed at step {self.first_step + 1} of {run.batch * run.schedule.steps}"
        if self.skipped:
            said += f"; the step cache skipped {self.skipped}"
        return said
