"""One sampling run: all checked and decided before a weight is loaded, then the loop for each picture."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .components import ComponentSpec
from .conditioning import NEGATIVE, POSITIVE, Condition, from_conditioning
from .denoise import StepState, denoise
from .estimates import transformer_bytes
from .guard import STOP
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
from .resume import RunState, SavedRun, run_name
from .schedule import Schedule, make_schedule
from .transfer import cross
from .transformer import Transformer
from .workers import LocalWorker

log = logging.getLogger("FireRed")

# done, total, denoised: steps done of all pictures' steps, and the current estimate (1, 16, 1, h, w),
# normalised.
OnStep = Callable[[int, int, torch.Tensor], None]
EMPTY_LATENT_CHANNELS = 4


@dataclass(frozen=True)
class SamplingPlan:
    """A run that passed every check.

    conditions: by branch; both where the run is guided. height, width: of the latents asked for; the loop
    works on the next even size.
    """

    spec: ComponentSpec
    conditions: Mapping[str, Condition]
    schedule: Schedule
    true_cfg_scale: float
    seed: int
    batch: int
    height: int
    width: int

    @property
    def padded_size(self) -> tuple[int, int]:
        return self.height + self.height % PATCH, self.width + self.width % PATCH

    def working_bytes(self) -> int:
        """What the transformer needs beside its weights."""
        height, width = self.padded_size
        tokens = height * width // PATCH**2 + max(condition.tokens for condition in self.conditions.values())
        return transformer_bytes(self.spec.checkpoint, self.spec.math, tokens)

    def name(self, guard: str = STOP) -> str:
        """Of this run and of no other: a digest of everything its result depends on.

        guard: what it let pass, which a stricter one must not take over.
        """
        spec, schedule = self.spec, self.schedule
        parts: list[object] = [guard, spec.identity, spec.precision, spec.card.name, self.padded_size]
        parts += [schedule.sigmas, schedule.timesteps, self.true_cfg_scale, self.seed, self.batch]
        parts += [self.height, self.width, *spec.checkpoint.latent_statistics()]
        for branch, condition in self.conditions.items():
            references = condition.reference_latents
            parts += [branch, condition.prompt_embeds, condition.mask, len(references), *references]
        return run_name(spec.device, *parts)


def read_conditions(spec: ComponentSpec, branches: Mapping[str, Any]) -> dict[str, Condition]:
    """Each branch's CONDITIONING as this transformer takes it. Raises InputError and NonFiniteError."""
    width = spec.checkpoint.component("transformer").config()["joint_attention_dim"]
    return {branch: from_conditioning(given, branch, width) for branch, given in branches.items()}


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
    return SamplingPlan(spec, used, schedule, true_cfg_scale if guided else 1.0, seed, batch, height, width)


def sample(
    transformer: Transformer,
    plan: SamplingPlan,
    on_step: OnStep = lambda done, total, denoised: None,
    on_fold: OnProgress = untold,
    saved: SavedRun | None = None,
    guard: str = STOP,
) -> torch.Tensor:
    """Run the plan: raw latents (B, 16, 1, h, w), FP32 on the CPU.

    on_fold: told how far the schedule's modulation is, before the first step. What either callback raises
    stops the run. saved: where the run is kept; one that was interrupted goes on at its last step, to the
    same bits.
    """
    size, steps = plan.padded_size, plan.schedule.steps
    mean, std = plan.spec.checkpoint.latent_statistics()
    noise = pack(make_noise((plan.batch, LATENT_CHANNELS, *size), plan.seed))
    state = _resume(plan, transformer, saved) or RunState(0, noise[:1])
    results = list(state.finished)
    if len(results) == plan.batch:
        return torch.cat(results)
    worker = LocalWorker(transformer, plan.spec, plan.schedule, size, plan.conditions, guard, on_fold)
    while len(results) < plan.batch:
        done_before, finished = len(results) * steps, tuple(results)

        def report(step: StepState, done_before: int = done_before, finished: Any = finished) -> None:
            if saved is not None:
                saved.update(RunState(step.step, step.latents, finished))
            on_step(done_before + step.step, plan.batch * steps, unpack(step.denoised, *size))

        try:
            final = denoise(
                worker.predict,
                state.latents.to(plan.spec.device, torch.float32),
                plan.schedule,
                plan.true_cfg_scale,
                report,
                state.step,
            )
        except BaseException:
            if saved is not None:
                saved.flush()
            raise
        raw = denormalize(cross(unpack(final, *size), torch.device("cpu")), mean, std)
        results.append(raw[..., : plan.height, : plan.width])
        state = RunState(0, noise[len(results) : len(results) + 1], tuple(results))
        if saved is not None:
            saved.update(state, now=len(results) == plan.batch)
    return torch.cat(results)


def _resume(plan: SamplingPlan, transformer: Transformer, saved: SavedRun | None) -> RunState | None:
    """Where an interrupted run goes on, if there is one whose state is whole."""
    state = saved.open(transformer.arithmetic) if saved is not None else None
    if saved is None or state is None:
        return None
    if saved.finished(state, plan.batch) is not None:
        return state
    if len(state.finished) >= plan.batch or not 0 <= state.step <= plan.schedule.steps:
        return None
    height, width = plan.padded_size
    tokens = (1, height * width // PATCH**2, LATENT_CHANNELS * PATCH**2)
    if state.latents.shape != tokens or not bool(state.latents.isfinite().all()):
        return None
    picture = f" of picture {len(state.finished) + 1}" if plan.batch > 1 else ""
    log.info("resuming the interrupted run at step %d/%d%s", state.step + 1, plan.schedule.steps, picture)
    return state


def _empty_as_qwen(samples: torch.Tensor) -> torch.Tensor:
    """The 4-channel zeros of core's Empty Latent Image are only a size, at the same 8 pixels a latent."""
    if samples.ndim == 4 and samples.shape[1] == EMPTY_LATENT_CHANNELS and not bool(samples.any()):
        return samples.new_zeros((samples.shape[0], LATENT_CHANNELS, *samples.shape[2:]))
    return samples
