"""One sampling run: all checked and decided before a weight is loaded, then the loop for each picture."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..cards.transfer import copy_to
from ..errors import InputError
from ..images import warn_of_many_pictures
from ..latents import (
    HEIGHT,
    LATENT_CHANNELS,
    MIN_SIZE,
    PATCH,
    TOKEN_PIXELS,
    VAE_SCALE,
    WIDTH,
    draw_noise,
    empty_as_qwen,
    output_size,
    pack,
    require_latents,
    require_size,
    unpack,
)
from ..limits import SEED, STEPS, TRUE_CFG_SCALE
from ..models.guard import STOP
from ..models.transformer import Transformer
from ..progress import OnProgress, ignore_progress
from ..weights.components import Replica
from ..weights.estimates import transformer_bytes
from ..weights.precision import ROLE_PRECISIONS, resolve
from ..weights.room import at_precision, has_room, require_room
from .conditioning import NEGATIVE, POSITIVE, Condition, ReferenceMethod, from_conditioning
from .denoise import StepState, denoise
from .resume import RunState, SavedRun, run_name
from .schedule import Schedule, make_schedule
from .workers import LocalWorker

log = logging.getLogger("FireRed")

# done, total, denoised: steps done of all pictures' steps, and the current estimate (1, 16, 1, h, w),
# normalised.
OnStep = Callable[[int, int, torch.Tensor], None]
ROTARY_POSITIONS = 4096  # each way from 0, in the transformer's table (diffusers' QwenEmbedRope)


@dataclass(frozen=True)
class SamplingRun:
    """A run that passed every check.

    conditions: by branch; both where the run is guided. draws: for each picture which of the seed's draws is
    its noise. height, width: of the latents asked for; the loop works on the next even size.
    """

    replica: Replica
    conditions: Mapping[str, Condition]
    schedule: Schedule
    true_cfg_scale: float
    seed: int
    draws: tuple[int, ...]
    height: int
    width: int

    @property
    def batch(self) -> int:
        """How many pictures to sample."""
        return len(self.draws)

    @property
    def padded_size(self) -> tuple[int, int]:
        return self.height + self.height % PATCH, self.width + self.width % PATCH

    def working_bytes(self) -> int:
        """What the transformer needs beside its weights."""
        height, width = self.padded_size
        tokens = height * width // PATCH**2 + max(condition.tokens for condition in self.conditions.values())
        spec = self.replica.spec
        return transformer_bytes(spec.checkpoint, spec.precision, tokens, self.replica.fused)

    def require_room(self, room: float) -> None:
        """Raise DoesNotFitError where the run does not go into `room` bytes, all that its device can give."""
        if has_room(self.replica, self.working_bytes(), room):
            return
        alternatives = (self._smaller(), self._with_fewer_references(), self._at_other_precisions())
        fitting = [
            words
            for ways in alternatives
            for words, _ in itertools.islice(
                (way for way in ways if has_room(way[1].replica, way[1].working_bytes(), room)), 1
            )
        ]
        remedy = f"What would fit: {', or '.join(fitting)}." if fitting else "Choose a bigger card, or cpu."
        require_room(self.replica, self.working_bytes(), room, f"Sampling {self._task}", remedy)

    @property
    def _references(self) -> int:
        return max(len(condition.reference_latents) for condition in self.conditions.values())

    @property
    def _task(self) -> str:
        return f"{self.width * VAE_SCALE}x{self.height * VAE_SCALE} with {_pictures(self._references)}"

    def _smaller(self) -> Iterator[tuple[str, SamplingRun]]:
        """This run at smaller sizes of its shape, the largest first."""
        for percent in range(95, 0, -5):
            height, width = (side * percent // 100 // PATCH * PATCH for side in (self.height, self.width))
            if min(height, width) * VAE_SCALE < MIN_SIZE:
                return
            yield f"{width * VAE_SCALE}x{height * VAE_SCALE}", replace(self, height=height, width=width)

    def _with_fewer_references(self) -> Iterator[tuple[str, SamplingRun]]:
        for count in reversed(range(self._references)):
            conditions = {
                branch: replace(condition, reference_latents=condition.reference_latents[:count])
                for branch, condition in self.conditions.items()
            }
            yield _pictures(count), replace(self, conditions=conditions)

    def _at_other_precisions(self) -> Iterator[tuple[str, SamplingRun]]:
        """At the other precisions that are safe, the largest first."""
        replica = self.replica
        rows = (row for row in ROLE_PRECISIONS[replica.spec.role].values() if not row.is_fp16)
        others = [at_precision(replica, resolve(row, replica.card)) for row in rows]
        for other in sorted(others, key=lambda other: -other.spec.nbytes()):
            yield f"precision {other.spec.precision.name}", replace(self, replica=other)

    def name(self, guard: str = STOP) -> str:
        """The run's name: a digest of everything its result depends on.

        guard: what it let pass, which a stricter one must not take over.
        """
        spec, card, schedule = self.replica.spec, self.replica.card, self.schedule
        parts: list[object] = [guard, spec.identity, *spec.precision.identity, card.name, self.padded_size]
        parts += [schedule.sigmas, schedule.timesteps, self.true_cfg_scale, self.seed, self.draws]
        parts += [self.height, self.width]
        for branch, condition in self.conditions.items():
            references = condition.reference_latents
            parts += [branch, condition.prompt_embeds, condition.mask, len(references), *references]
            parts += [condition.statistics]
        return run_name(card.device, *parts)


def _pictures(count: int) -> str:
    return f"{count or 'no'} reference picture{'s' * (count > 1)}"


def read_conditions(replica: Replica, branches: Mapping[str, Any]) -> dict[str, Condition]:
    """Each branch's CONDITIONING as this transformer takes it. Raises InputError and NonFiniteError."""
    checkpoint = replica.spec.checkpoint
    config, statistics = checkpoint.component("transformer").config(), checkpoint.latent_statistics()
    method = ReferenceMethod.of(config)
    return {
        branch: from_conditioning(given, branch, config["joint_attention_dim"], method, statistics)
        for branch, given in branches.items()
    }


def prepare_run(
    replica: Replica,
    conditions: Mapping[str, Condition],
    *,
    steps: int,
    true_cfg_scale: float,
    width: int,
    height: int,
    seed: int,
    samples: torch.Tensor | None = None,
    draws: Sequence[int] | None = None,
) -> SamplingRun:
    """Check a run and decide its size and schedule.

    conditions: POSITIVE and, for guidance above 1, NEGATIVE. width, height: pixels, 0 to follow the first
    reference.
    samples: a LATENT's tensor; it gives the size (over width and height) and how many pictures to sample.
    draws: for each of them which of the seed's draws is its noise, if not in turn. Raises InputError for
    every number out of bounds, and CheckpointError.
    """
    true_cfg_scale, seed = TRUE_CFG_SCALE.require(true_cfg_scale), SEED.require(seed)
    steps, width, height = STEPS.require(steps), WIDTH.require(width), HEIGHT.require(height)
    guided = true_cfg_scale > 1 and NEGATIVE in conditions
    used = {name: conditions[name] for name in ((POSITIVE, NEGATIVE) if guided else (POSITIVE,))}
    batch = 1
    if samples is None:
        width, height = output_size(width, height, conditions[POSITIVE].image_size)
        height, width = height // VAE_SCALE, width // VAE_SCALE
    else:
        batch, _, _, height, width = require_latents(empty_as_qwen(samples), "The latent").shape
        require_size(width * VAE_SCALE, height * VAE_SCALE, "Connect a latent of another size, or none.")
    for branch, condition in used.items():
        _require_positions(condition, branch, (height, width))
    warn_of_many_pictures(max(len(condition.reference_latents) for condition in used.values()))
    tokens = -(-height // PATCH) * -(-width // PATCH)
    schedule = make_schedule(replica.spec.checkpoint.component("scheduler").config(), steps, tokens)
    scale = true_cfg_scale if guided else 1.0
    return SamplingRun(replica, used, schedule, scale, seed, tuple(draws or range(batch)), height, width)


def _require_positions(condition: Condition, branch: str, size: tuple[int, int]) -> None:
    """Raise InputError where a branch has positions past the end of the transformer's rotary table.

    size: height and width of the latents to sample. Pictures lie around position 0; text follows on the
    largest of them.
    """
    sizes = [size, *(latent.shape[-2:] for latent in condition.reference_latents)]
    longest = max(-(-side // PATCH) for height_and_width in sizes for side in height_and_width)
    tokens, room = condition.prompt_embeds.shape[1], ROTARY_POSITIONS - longest // 2
    if longest - longest // 2 > ROTARY_POSITIONS:
        raise InputError(
            f"A reference latent of the {branch} conditioning is {longest * TOKEN_PIXELS} pixels long; this "
            f"model takes {2 * ROTARY_POSITIONS * TOKEN_PIXELS}. Scale the picture down before it is encoded."
        )
    if tokens > room:
        raise InputError(
            f"The {branch} conditioning has {tokens} text tokens; beside pictures of this size the model "
            f"takes {room}. Use a shorter prompt or fewer pictures, and do not join conditionings."
        )


def sample(
    transformer: Transformer,
    run: SamplingRun,
    on_step: OnStep = lambda done, total, denoised: None,
    on_modulation: OnProgress = ignore_progress,
    saved: SavedRun | None = None,
    guard: str = STOP,
) -> torch.Tensor:
    """Do the run: raw latents (B, 16, 1, h, w), FP32 on the CPU.

    on_modulation: told how far the schedule's modulation is, before the first step. What either callback
    raises stops the run. saved: where the run is kept; one that was interrupted goes on at its last step, to
    the same bits.
    """
    size = run.padded_size
    resumed = _resume(run, transformer, saved)
    finished = list(resumed.finished) if resumed else []
    if len(finished) == run.batch:
        return torch.cat(finished)
    worker = LocalWorker(transformer, run.schedule, size, run.conditions, guard, on_modulation)
    noise = map(pack, draw_noise(size, run.seed, run.draws[len(finished) :]))
    first = next(noise)
    state = resumed or RunState(0, first)
    statistics = run.conditions[POSITIVE].statistics
    while len(finished) < run.batch:
        latents = _sample_picture(run, worker, state, on_step, saved)
        raw = statistics.denormalize(copy_to(unpack(latents, *size), torch.device("cpu")))
        finished.append(raw[..., : run.height, : run.width])
        state = RunState(0, next(noise, first[:0]), tuple(finished))
        if saved is not None:
            saved.update(state, now=len(finished) == run.batch)
    return torch.cat(finished)


def _sample_picture(
    run: SamplingRun, worker: LocalWorker, start: RunState, on_step: OnStep, saved: SavedRun | None
) -> torch.Tensor:
    """The packed latents (1, tokens, 64) of the picture after the finished ones, on the run's device."""
    steps, done_before = run.schedule.steps, len(start.finished) * run.schedule.steps

    def report(step: StepState) -> None:
        if saved is not None:
            saved.update(RunState(step.step, step.latents, start.finished))
        on_step(done_before + step.step, run.batch * steps, unpack(step.denoised, *run.padded_size))

    latents = start.latents.to(run.replica.device, torch.float32)
    try:
        return denoise(worker.predict, latents, run.schedule, run.true_cfg_scale, report, start.step)
    except BaseException:
        if saved is not None:
            saved.flush()
        raise


def _resume(run: SamplingRun, transformer: Transformer, saved: SavedRun | None) -> RunState | None:
    """Where an interrupted run goes on, if there is one whose state is whole."""
    state = saved.open(transformer.arithmetic) if saved is not None else None
    if saved is None or state is None:
        return None
    if saved.finished_latents(state, run.batch) is not None:
        return state
    if len(state.finished) >= run.batch or not 0 <= state.step <= run.schedule.steps:
        return None
    height, width = run.padded_size
    tokens = (1, height * width // PATCH**2, LATENT_CHANNELS * PATCH**2)
    if state.latents.shape != tokens or not bool(state.latents.isfinite().all()):
        return None
    picture = f" of picture {len(state.finished) + 1}" if run.batch > 1 else ""
    log.info("resuming the interrupted run at step %d/%d%s", state.step + 1, run.schedule.steps, picture)
    return state
