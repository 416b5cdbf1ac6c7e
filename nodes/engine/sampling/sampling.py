"""One sampling run: check and decide everything before weights are loaded, then sample each picture."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

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
    grid_size,
    output_size,
    pack,
    pack_raw,
    pad_to_patches,
    require_latents,
    require_size,
    unpack,
)
from ..limits import SEED, STEPS, TRUE_CFG_SCALE
from ..models.attention import attention_on
from ..models.guard import STOP, require_finite_input
from ..models.transformer import Transformer, attend
from ..progress import OnProgress, ignore_progress
from ..weights.components import Replica
from ..weights.estimates import transformer_bytes
from ..weights.room import alternatives, has_room, require_room
from .conditioning import NEGATIVE, POSITIVE, Condition, ReferenceMethod, from_conditioning
from .denoise import Kept, StepState, add_noise, denoise
from .layout import Layout
from .options import DEFAULT_OPTIONS, SamplingOptions
from .parallel import ParallelWorker
from .record import RunRecord
from .resume import RunState, Saved, run_name
from .schedule import FULL_DENOISE, Schedule, make_schedule
from .step_cache import StepCache
from .workers import LocalWorker, Worker

log = logging.getLogger("FireRed")

# Called with the number of steps done, the number of steps of all pictures, and the current estimate of the
# picture: normalised latents (1, 16, 1, h, w).
OnStep = Callable[[int, int, torch.Tensor], None]
ROTARY_POSITIONS = 4096  # on each side of 0; the limit of diffusers' QwenEmbedRope


@dataclass(frozen=True)
class SamplingRun:
    """A run that passed every check.

    conditions: by branch; a run with guidance has both. draws: for each picture, the number of the seed's
    draw that is its noise. height, width: of the resulting latents; the loop works on the next even size.
    layout: how several cards share it; None for one card. replica: the transformer, on the first of them.
    pictures: raw latents (B, 16, 1, h, w) to start from or to keep a part of; None to start from noise.
    mask: (B, 1, 1, h, w), 1 where they may change; None for everywhere. native_size: the width and height in
    pixels that the decode cuts the result to; None if it cuts nothing.
    """

    replica: Replica
    conditions: Mapping[str, Condition]
    schedule: Schedule
    true_cfg_scale: float
    seed: int
    draws: tuple[int, ...]
    height: int
    width: int
    options: SamplingOptions = DEFAULT_OPTIONS
    layout: Layout | None = None
    pictures: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    native_size: tuple[int, int] | None = None

    @property
    def batch(self) -> int:
        """How many pictures to sample."""
        return len(self.draws)

    @property
    def padded_size(self) -> tuple[int, int]:
        """Height and width of the latents in the loop, both even."""
        return self.height + self.height % PATCH, self.width + self.width % PATCH

    @property
    def guided_steps(self) -> list[int]:
        """The steps, from 0, that compute the negative branch too."""
        steps = range(self.schedule.steps) if NEGATIVE in self.conditions else ()
        return [step for step in steps if self.options.is_guided(step, self.schedule.steps)]

    def on_each_card(self) -> list[SamplingRun]:
        """The run, with the transformer of each of its cards in turn."""
        replicas = self.layout.replicas if self.layout else (self.replica,)
        return [replace(self, replica=replica) for replica in replicas]

    def working_bytes(self) -> int:
        """The bytes that the transformer needs beside its weights, on the replica's card."""
        height, width = self.padded_size
        tokens = height * width // PATCH**2 + max(condition.tokens for condition in self.conditions.values())
        spec, shared = self.replica.spec, min(self._sharing)
        factors = sum(adapter.lora.nbytes for adapter in self.options.adapters if adapter.strength)
        fused, adapted = self.replica.fused, factors > 0
        beside = transformer_bytes(spec.checkpoint, spec.precision, tokens, fused, shared, adapted)
        return beside + factors

    @property
    def _guided(self) -> list[bool]:
        """For each step, whether it computes the negative branch too."""
        return [step in self.guided_steps for step in range(self.schedule.steps)]

    @property
    def _sharing(self) -> list[int]:
        """Over how many cards the tokens of a branch are split."""
        return [1] if self.layout is None else self.layout.sharing(self._guided)

    def require_room(self, room: float) -> None:
        """Raise DoesNotFitError, with what would fit instead, when the run needs more than `room` bytes."""
        if has_room(self.replica, self.working_bytes(), room):
            return
        changes = (self._smaller(), self._with_fewer_references(), self._at_other_precisions())
        first_fitting = (
            next((name for name, run in runs if has_room(run.replica, run.working_bytes(), room)), None)
            for runs in changes
        )
        fitting = list(filter(None, first_fitting))
        remedy = f"What would fit: {', or '.join(fitting)}." if fitting else "Choose a bigger card, or cpu."
        require_room(self.replica, self.working_bytes(), room, f"Sampling {self._task}", remedy)

    @property
    def references(self) -> int:
        """How many reference pictures there are."""
        return max(len(condition.reference_latents) for condition in self.conditions.values())

    @property
    def _task(self) -> str:
        return f"{self.width * VAE_SCALE}x{self.height * VAE_SCALE} with {_pictures(self.references)}"

    def _smaller(self) -> Iterator[tuple[str, SamplingRun]]:
        """This run at smaller sizes of the same shape, the largest first, each with a name."""
        for percent in range(95, 0, -5):
            height, width = (side * percent // 100 // PATCH * PATCH for side in (self.height, self.width))
            if min(height, width) * VAE_SCALE < MIN_SIZE:
                return
            yield f"{width * VAE_SCALE}x{height * VAE_SCALE}", replace(self, height=height, width=width)

    def _with_fewer_references(self) -> Iterator[tuple[str, SamplingRun]]:
        """This run with fewer references, the most first, each with a name."""
        for count in reversed(range(self.references)):
            conditions = {
                branch: replace(condition, reference_latents=condition.reference_latents[:count])
                for branch, condition in self.conditions.items()
            }
            yield _pictures(count), replace(self, conditions=conditions)

    def _at_other_precisions(self) -> Iterator[tuple[str, SamplingRun]]:
        """This run at the precisions that errors may recommend, the largest first, each with a name."""
        for other in sorted(alternatives(self.replica), key=lambda other: -other.spec.nbytes()):
            yield f"precision {other.spec.precision.name}", replace(self, replica=other)

    def start(self, number: int, noise: torch.Tensor) -> torch.Tensor:
        """The latents that a picture starts from, packed as its noise. number: from 0."""
        if self.pictures is None or number == self.batch:  # after the last picture
            return noise
        return add_noise(self._packed(number), noise, self.schedule.sigmas[0].item())

    def kept(self, number: int, noise: torch.Tensor) -> Kept | None:
        """What stays of a picture, on the run's device. number: from 0. noise: the picture's, packed."""
        if self.mask is None:
            return None
        mask = pack(pad_to_patches(self.mask[number : number + 1].expand(-1, LATENT_CHANNELS, -1, -1, -1)))
        picture, noise, mask = (
            tensor.to(self.replica.device) for tensor in (self._packed(number), noise, mask)
        )
        return Kept(picture, noise, mask, self.options.differential)

    def _packed(self, number: int) -> torch.Tensor:
        assert self.pictures is not None
        return pack_raw(self.pictures[number : number + 1], self.conditions[POSITIVE].statistics)

    def name(self, guard: str = STOP) -> str:
        """The run's name: a digest of everything its result depends on.

        guard: its level. A stricter guard must not continue a run that a weaker one let pass.
        """
        spec, card, schedule = self.replica.spec, self.replica.card, self.schedule
        parts: list[object] = [guard, spec.identity, *spec.precision.identity, card.name, self.padded_size]
        parts += [schedule.sigmas, schedule.timesteps, self.true_cfg_scale, self.seed, self.draws]
        parts += [self.height, self.width]
        for branch, condition in self.conditions.items():
            references = condition.reference_latents
            parts += [branch, condition.prompt_embeds, condition.mask, len(references), *references]
            parts += [condition.statistics]
        parts += self.options.identity(len(self.conditions) > 1)
        parts += self.layout.identity(self._guided) if self.layout else []
        parts += [] if self.pictures is None else ["pictures", self.pictures]
        parts += [] if self.mask is None else ["mask", self.mask, self.options.differential]
        return run_name(card.device, *parts)


def _pictures(count: int) -> str:
    return f"{count or 'no'} reference picture{'s' * (count > 1)}"


def read_conditions(replica: Replica, branches: Mapping[str, Any]) -> dict[str, Condition]:
    """Read each branch's CONDITIONING for this transformer. Raises as from_conditioning does."""
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
    mask: torch.Tensor | None = None,
    options: SamplingOptions = DEFAULT_OPTIONS,
    layout: Layout | None = None,
) -> SamplingRun:
    """Check a run and decide its size and schedule.

    conditions: POSITIVE and, for guidance, NEGATIVE. width, height: pixels; 0 follows the first image.
    samples: a LATENT's tensor. It overrides width and height, and gives the number of pictures to sample.
    draws: for each picture, the number of the seed's draw that is its noise; 0, 1, 2 and so on by default.
    mask: of the samples, as in SamplingRun.
    options: what the graph lays over the transformer. layout: as in SamplingRun. Raises InputError for a
    number out of bounds, and CheckpointError.
    """
    true_cfg_scale, seed = TRUE_CFG_SCALE.require(true_cfg_scale), SEED.require(seed)
    steps, width, height = STEPS.require(steps), WIDTH.require(width), HEIGHT.require(height)
    guided = true_cfg_scale > 1 and NEGATIVE in conditions
    if guided and not options.guides_any_of(steps):
        guided = False
        log.warning(
            "cfg %g has no effect: none of the %d steps is between guidance_from %g and guidance_to %g",
            true_cfg_scale, steps, options.guidance_from, options.guidance_to,
        )  # fmt: skip
    used = {name: conditions[name] for name in ((POSITIVE, NEGATIVE) if guided else (POSITIVE,))}
    batch, native = 1, None
    pictures = _pictures_to_keep(samples, mask, options.denoise)
    if samples is None:
        native = conditions[POSITIVE].native_size if not width and not height else None
        width, height = grid_size(*native) if native else (width, height)
        width, height = output_size(width, height, conditions[POSITIVE].image_size)
        height, width = height // VAE_SCALE, width // VAE_SCALE
    else:
        batch, _, _, height, width = require_latents(empty_as_qwen(samples), "The latent").shape
        require_size(width * VAE_SCALE, height * VAE_SCALE, "Connect a latent of another size, or none.")
    for branch, condition in used.items():
        _require_positions(condition, branch, (height, width))
    warn_of_many_pictures(max(len(condition.reference_latents) for condition in used.values()))
    tokens = -(-height // PATCH) * -(-width // PATCH)
    config = replica.spec.checkpoint.component("scheduler").config()
    schedule = make_schedule(config, steps, tokens, options.shift, options.denoise)
    scale = true_cfg_scale if guided else 1.0
    numbers = tuple(draws or range(batch))
    layout = layout.used(guided) if layout else None
    return SamplingRun(
        replica, used, schedule, scale, seed, numbers, height, width, options, layout, pictures, mask, native
    )


def _pictures_to_keep(
    samples: torch.Tensor | None, mask: torch.Tensor | None, denoise: float
) -> torch.Tensor | None:
    """The raw latents (B, 16, 1, h, w) FP32 whose content a run depends on; None where it starts from noise.

    Raises InputError where there are none to start from.
    """
    if mask is None and denoise > FULL_DENOISE:
        return None
    why, other = "there is a noise mask", "take the mask out"
    if mask is None:
        why, other = f"denoise of FireRed Schedule is {denoise:g}", "set denoise to 1"
    if samples is None or not bool(samples.any()):
        found = "no latent is connected" if samples is None else "the latent is empty"
        raise InputError(
            f"There is no picture to start from: {why}, but {found}. Connect the latent of FireRed Encode "
            f"Prompt or of VAE Encode, or {other}."
        )
    return require_finite_input(require_latents(samples, "The latent").cpu().float(), "The latent")


def _require_positions(condition: Condition, branch: str, size: tuple[int, int]) -> None:
    """Raise InputError when a branch has rotary positions outside of +-ROTARY_POSITIONS.

    size: height and width of the latents to sample. Pictures are centred on position 0. The text's positions
    come after those of the largest picture.
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
    transformer: Transformer | Sequence[Transformer] | Computing,
    run: SamplingRun,
    on_step: OnStep = lambda done, total, denoised: None,
    on_modulation: OnProgress = ignore_progress,
    saved: Saved | None = None,
    guard: str = STOP,
    record: RunRecord | None = None,
) -> torch.Tensor:
    """Do the run. Returns raw latents (B, 16, 1, h, w), FP32 on the CPU.

    transformer: on the run's card, or on each card of its layout, or what computes elsewhere.
    on_modulation: the progress of the schedule's modulation, before the first step. An exception in a
    callback stops the run. saved: the run's file; an interrupted run goes on at its last saved step, with the
    same bits. guard: what to do about NaN and infinity, one of guard.GUARDS. record: to be filled. Raises
    NonFiniteError.
    """
    size, record = run.padded_size, record or RunRecord()
    if isinstance(transformer, Transformer):
        transformer = [transformer]
    computing = transformer if isinstance(transformer, Computing) else Cards(transformer)
    record.arithmetic = computing.arithmetic(run)
    resumed = _resume(run, record.arithmetic, saved)
    finished = list(resumed.finished) if resumed else []
    if len(finished) == run.batch:
        return torch.cat(finished)
    record.start(computing.devices)
    record.first_step = len(finished) * run.schedule.steps + (resumed.step if resumed else 0)
    worker = computing.worker(run, guard, on_modulation)
    draws = map(pack, draw_noise(size, run.seed, run.draws[len(finished) :]))
    noise = next(draws)
    state = resumed or RunState(0, run.start(0, noise))
    statistics = run.conditions[POSITIVE].statistics
    while len(finished) < run.batch:
        kept = run.kept(len(finished), noise)
        latents = _sample_picture(run, worker, state, kept, on_step, saved, record)
        raw = statistics.denormalize(copy_to(unpack(latents, *size), torch.device("cpu")))
        finished.append(raw[..., : run.height, : run.width])
        noise = next(draws, noise[:0])
        state = RunState(0, run.start(len(finished), noise), tuple(finished))
        if saved is not None:
            saved.update(state, now=len(finished) == run.batch)
    record.finish(computing.devices)
    return torch.cat(finished)


@runtime_checkable
class Computing(Protocol):
    """Where the predictions of a run are computed. devices: those of this process."""

    devices: Sequence[torch.device]

    def arithmetic(self, run: SamplingRun) -> str:
        """The kernels that compute the run."""
        ...

    def worker(self, run: SamplingRun, guard: str, on_modulation: OnProgress) -> Worker:
        """What computes the run's predictions. The arguments are those of `sample`."""
        ...


class Cards:
    """Cards of this process that hold the transformer."""

    def __init__(self, transformers: Sequence[Transformer]):
        self._transformers = transformers
        self.devices = [each.replica.device for each in transformers]

    def arithmetic(self, run: SamplingRun) -> str:
        found = []
        for each in self._transformers:
            rounds = attention_on(each.replica.device, run.options.attention) is not attend
            found.append(", ".join(filter(None, (each.arithmetic, "INT8 attention" if rounds else ""))))
        return "; ".join(dict.fromkeys(found))

    def worker(self, run: SamplingRun, guard: str, on_modulation: OnProgress) -> Worker:
        cards = [run_worker(transformer, run, guard, on_modulation) for transformer in self._transformers]
        return ParallelWorker(cards, run.layout) if run.layout else cards[0]


def run_worker(
    transformer: Transformer, run: SamplingRun, guard: str, on_modulation: OnProgress = ignore_progress
) -> LocalWorker:
    """A worker for all branches of the run."""
    return LocalWorker(
        transformer, run.schedule, run.padded_size, run.conditions, guard, on_modulation, run.options
    )


def _sample_picture(
    run: SamplingRun,
    worker: Worker,
    start: RunState,
    kept: Kept | None,
    on_step: OnStep,
    saved: Saved | None,
    record: RunRecord,
) -> torch.Tensor:
    """The packed latents (1, tokens, 64) of the next picture, on the run's device."""
    steps, done_before = run.schedule.steps, len(start.finished) * run.schedule.steps
    cached = {name: tensor.to(run.replica.device) for name, tensor in start.step_cache.items()}
    cache = StepCache(worker.predict, run.schedule, run.options.step_cache, run.guided_steps, cached)

    def report(step: StepState) -> None:
        record.step()
        if saved is not None:
            saved.update(RunState(step.step, step.latents, start.finished, cache.state()))
        on_step(done_before + step.step, run.batch * steps, unpack(step.denoised, *run.padded_size))

    latents = start.latents.to(run.replica.device, torch.float32)
    try:
        final = denoise(cache.predict, latents, run.schedule, run.true_cfg_scale, report, start.step, kept)
    except BaseException:
        if saved is not None:
            saved.flush()
            log.info("stopped; the same prompt, with seed %d, goes on at the step it reached", run.seed)
        raise
    record.skipped += cache.skipped
    if cache.skipped:
        log.info("the step cache computed %d of %d steps", steps - cache.skipped, steps)
    return final


def _resume(run: SamplingRun, arithmetic: str, saved: Saved | None) -> RunState | None:
    """The state from which an interrupted run goes on; None if there is no usable one."""
    state = saved.open(arithmetic) if saved is not None else None
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
