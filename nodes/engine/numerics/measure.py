"""Measure how large a model's activations get in each block, in real forwards."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from ..errors import InputError
from ..latents import LatentStatistics, draw_noise, pack, pack_raw, require_latents
from ..limits import EXACT, INT8, STEPS, require_text
from ..models.guard import OFF, require_finite_input
from ..models.text import TextEncoder
from ..models.trace import FP16_MAX, tensors_in, watch_outputs
from ..models.transformer import Transformer
from ..progress import OnProgress, ignore_progress
from ..sampling.conditioning import POSITIVE
from ..sampling.sampling import SamplingRun
from ..sampling.workers import LocalWorker
from ..weights.formats import weights_only
from .attention import AttentionVerdict
from .ranges import OUTLIER, BlockRange

BLOCKS = re.compile(r"(transformer_blocks|visual\.blocks|language_model\.layers)\.(\d+)(\..*)?")
MAX_STEPS = 6  # each is a forward and a line in the chart
TOWERS = {"visual.blocks": "vision tower", "language_model.layers": "language model"}


def parse_steps(text: str, steps: int) -> list[int]:
    """The step numbers (from 1) in "1, 20, 40". Numbers above `steps` mean the last. Raises InputError."""
    steps, parts = STEPS.require(steps), require_text(text, "look_at").replace(",", " ").split()
    try:
        numbers = sorted({min(int(part), steps) for part in parts})
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= MAX_STEPS or numbers[0] < 1:
        raise InputError(
            f"look_at is {text!r}; write up to {MAX_STEPS} step numbers, 1 to {steps}, such as 1, {steps}."
        )
    return numbers


def measure_transformer(
    transformer: Transformer,
    run: SamplingRun,
    steps: Sequence[int],
    samples: torch.Tensor | None = None,
    on_progress: OnProgress = ignore_progress,
) -> dict[str, list[BlockRange]]:
    """The ranges of the positive branch at `steps` (from 1), by labels such as "step 1".

    samples: raw latents (B, 16, 1, h, w) of the run's size. The model's input is their first picture with the
    step's noise; without samples, or with zeros, noise alone. Raises InputError and NonFiniteError.
    """
    looked_at = {POSITIVE: run.conditions[POSITIVE]}
    worker = LocalWorker(transformer, run.schedule, run.padded_size, looked_at, OFF, options=run.options)
    ranges = {}
    for done, (step, latents) in enumerate(inputs_of(run, steps, samples), start=1):
        forward = functools.partial(worker.predict, latents, step - 1)
        ranges[f"step {step}"] = measure(transformer.model, forward)
        on_progress(done, len(steps))
    return ranges


def inputs_of(
    run: SamplingRun, steps: Sequence[int], samples: torch.Tensor | None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Each of the steps (from 1) with its packed latents on the run's card; as measure_transformer."""
    noise = pack(next(draw_noise(run.padded_size, run.seed, run.draws)))
    picture = torch.zeros_like(noise)
    if samples is not None and bool(samples.any()):
        picture = _packed(run.conditions[POSITIVE].statistics, samples)
    for step in steps:
        sigma = run.schedule.sigmas[step - 1]
        yield step, ((1 - sigma) * picture + sigma * noise).to(run.replica.device)


def compare_attention(
    transformer: Transformer,
    run: SamplingRun,
    steps: Sequence[int],
    samples: torch.Tensor | None = None,
    on_progress: OnProgress = ignore_progress,
) -> AttentionVerdict:
    """Three forwards of the positive branch for each of the steps (from 1); samples as measure_transformer.

    The reference computes exact attention, and products in FP32 with the same INT8 weights.
    """
    looked_at, changes = {POSITIVE: run.conditions[POSITIVE]}, []
    exact, rounded = (
        LocalWorker(
            transformer, run.schedule, run.padded_size, looked_at, OFF,
            options=replace(run.options, attention=attention),
        )
        for attention in (EXACT, INT8)
    )  # fmt: skip
    for done, (step, latents) in enumerate(inputs_of(run, steps, samples), start=1):
        with weights_only(transformer.model):
            reference = exact.predict(latents, step - 1)[POSITIVE]
            by_attention = rounded.predict(latents, step - 1)[POSITIVE]
        by_products = exact.predict(latents, step - 1)[POSITIVE]
        differences = torch.stack([by_attention - reference, by_products - reference])
        changes.append(differences.flatten(1).norm(dim=1) / reference.norm())
        on_progress(done, len(steps))
    return AttentionVerdict(*torch.stack(changes).amax(dim=0).tolist())  # amax keeps NaN


def measure_text_encoder(
    encoder: TextEncoder, prompt: str, pictures: Sequence[Image.Image]
) -> dict[str, list[BlockRange]]:
    """The ranges of the vision tower (if there are pictures) and of the language model, by name."""
    blocks = measure(encoder.model, lambda: encoder.encode(prompt, pictures, guard=OFF))
    return {
        label: tower
        for prefix, label in TOWERS.items()
        if (tower := [block for block in blocks if block.name.startswith(prefix)])
    }


@torch.inference_mode()
def measure(model: torch.nn.Module, forward: Callable[[], object]) -> list[BlockRange]:
    """Run `forward`, which calls `model`, and return the ranges of its blocks in the order they run.

    Costs a read of each activation and of each linear layer's input, and one copy to the host at the end.
    Removes its hooks.
    """
    tallies: dict[str, _Tally] = {}
    inside = {name: module for name, module in model.named_modules() if BLOCKS.fullmatch(name)}

    def watch(name: str, module: torch.nn.Module, args: Any, output: Any) -> None:
        match = BLOCKS.fullmatch(name)
        assert match is not None
        tally = tallies.setdefault(f"{match[1]}.{match[2]}", _Tally())
        for tensor in tensors_in(output):
            tally.add_output(tensor)
        if hasattr(module, "in_features"):
            for tensor in tensors_in(args):
                tally.add_column_input(tensor)

    with watch_outputs(inside, watch):
        forward()
    if not tallies:
        return []
    totals = [tally.totals() for tally in tallies.values()]
    rows = torch.stack([total.to(totals[0].device) for total in totals]).tolist()
    return [
        BlockRange(name, largest, outliers / max(tally.columns, 1), overflows / tally.channels)
        for (name, tally), (largest, outliers, overflows) in zip(tallies.items(), rows, strict=True)
    ]


class _Tally:
    """The counts of one block. They stay on its device: the program waits for it only at the end."""

    def __init__(self) -> None:
        self._peaks: list[torch.Tensor] = []
        self._outliers: list[torch.Tensor] = []
        self._overflows: list[torch.Tensor] = []
        self.columns = self.channels = 0

    def add_output(self, tensor: torch.Tensor) -> None:
        """Count a module's output (..., channels)."""
        peaks = _channel_peaks(tensor)
        self._peaks.append(peaks.max())
        self._overflows.append(_count_reaching(peaks, FP16_MAX))
        self.channels += peaks.numel()

    def add_column_input(self, tensor: torch.Tensor) -> None:
        """Count the input (..., columns) of a linear layer."""
        peaks = _channel_peaks(tensor)
        self._peaks.append(peaks.max())
        self._outliers.append(_count_reaching(peaks, OUTLIER))
        self.columns += peaks.numel()

    def totals(self) -> torch.Tensor:
        """Three FP32 numbers: the largest magnitude, outlier columns, overflowing channels."""
        largest = torch.stack(self._peaks).max()
        outliers = torch.stack([*self._outliers, torch.zeros_like(largest)]).sum()
        return torch.stack([largest, outliers, torch.stack(self._overflows).sum()])


def _channel_peaks(tensor: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each channel, (channels) FP32. NaN gives NaN."""
    lowest, highest = tensor.reshape(-1, tensor.shape[-1]).aminmax(dim=0)
    return torch.maximum(-lowest, highest).float()


def _count_reaching(peaks: torch.Tensor, limit: float) -> torch.Tensor:
    """How many peaks are at or above the limit or NaN, 0-d FP32."""
    return torch.logical_not(peaks < limit).sum().float()


def _packed(statistics: LatentStatistics, samples: torch.Tensor) -> torch.Tensor:
    """The first picture of raw latents, normalised and packed: (1, tokens, 64) FP32 on the CPU."""
    raw = require_finite_input(require_latents(samples, "The latent")[:1], "The latent").cpu().float()
    return pack_raw(raw, statistics)
