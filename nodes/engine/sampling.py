"""One sampling run: all checked and decided before a weight is loaded, then the loop for each picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .components import ComponentSpec
from .conditioning import Condition
from .denoise import StepState, denoise
from .latents import (
    LATENT_CHANNELS,
    PATCH,
    VAE_SCALE,
    denormalize,
    make_noise,
    output_size,
    pack,
    require_latents,
    require_size,
    unpack,
)
from .progress import OnProgress, untold
from .schedule import Schedule, make_schedule
from .transfer import cross
from .workers import NEGATIVE, POSITIVE, LocalWorker

# done, total, denoised: steps done of all pictures' steps, and the current estimate (1, 16, 1, h, w),
# normalised.
OnStep = Callable[[int, int, torch.Tensor], None]
EMPTY_LATENT_CHANNELS = 4


@dataclass(frozen=True)
class SamplingPlan:
    """A run that passed every check.

    true_cfg_scale: None without guidance. height, width: of the latents asked for; the loop works on the next
    even size.
    """

    spec: ComponentSpec
    conditions: Mapping[str, Condition]
    schedule: Schedule
    true_cfg_scale: float | None
    seed: int
    batch: int
    height: int
    width: int

    @property
    def padded_size(self) -> tuple[int, int]:
        return self.height + self.height % PATCH, self.width + self.width % PATCH


def plan_sampling(
    spec: ComponentSpec,
    conditions: Mapping[str, Condition],
    *,
    steps: int,
    true_cfg_scale: float,
    width: int,
    height: int,
    seed: int,
    samples: torch.Tensor | None = None,
) -> SamplingPlan:
    """Check a run and decide its size and schedule.

    conditions: POSITIVE and, for guidance above 1, NEGATIVE. width, height: pixels, 0 to follow the first
    reference.
    samples: a LATENT's tensor; it gives the size (over width and height) and how many pictures to sample.
    Raises InputError and CheckpointError.
    """
    guided = true_cfg_scale > 1 and NEGATIVE in conditions
    used = {name: conditions[name] for name in ((POSITIVE, NEGATIVE) if guided else (POSITIVE,))}
    if samples is None:
        width, height = output_size(width, height, conditions[POSITIVE].image_size)
        batch, height, width = 1, height // VAE_SCALE, width // VAE_SCALE
    else:
        batch, _, _, height, width = require_latents(_empty_as_qwen(samples), "The latent").shape
        require_size(width * VAE_SCALE, height * VAE_SCALE, "Connect a latent of another size, or none.")
    tokens = -(-height // PATCH) * -(-width // PATCH)
    schedule = make_schedule(spec.checkpoint.component("scheduler").config(), steps, tokens)
    return SamplingPlan(spec, used, schedule, true_cfg_scale if guided else None, seed, batch, height, width)


def sample(
    transformer: Any,
    plan: SamplingPlan,
    on_step: OnStep = lambda done, total, denoised: None,
    on_fold: OnProgress = untold,
) -> torch.Tensor:
    """Run the plan: raw latents (B, 16, 1, h, w), FP32 on the CPU.

    on_fold: told how far the schedule's modulation is, before the first step. What either callback raises
    stops the run.
    """
    size = plan.padded_size
    mean, std = plan.spec.checkpoint.latent_statistics()
    worker = LocalWorker(transformer, plan.spec, plan.schedule, size, plan.conditions, on_fold)
    noise = make_noise((plan.batch, LATENT_CHANNELS, *size), plan.seed)
    results = []
    for picture in range(plan.batch):

        def report(state: StepState, done_before: int = picture * plan.schedule.steps) -> None:
            on_step(done_before + state.step, plan.batch * plan.schedule.steps, unpack(state.denoised, *size))

        latents = pack(noise[picture : picture + 1])
        final = denoise(worker, plan.spec, latents, plan.schedule, plan.true_cfg_scale, report)
        raw = denormalize(cross(unpack(final, *size), torch.device("cpu")), mean, std)
        results.append(raw[..., : plan.height, : plan.width])
    return torch.cat(results)


def _empty_as_qwen(samples: torch.Tensor) -> torch.Tensor:
    """The 4-channel zeros of core's Empty Latent Image are only a size, at the same 8 pixels a latent."""
    if samples.ndim == 4 and samples.shape[1] == EMPTY_LATENT_CHANNELS and not bool(samples.any()):
        return samples.new_zeros((samples.shape[0], LATENT_CHANNELS, *samples.shape[2:]))
    return samples
