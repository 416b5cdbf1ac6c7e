"""The sampler node: conditioning and noise to latents."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io

from . import host
from .engine.latents import (
    NATIVE_SIZE,
    REPORT,
    TOKEN_PIXELS,
    WIDTH,
    LatentInput,
    kept_keys,
    read_latent,
    require_latents,
)
from .engine.limits import RESUME, SEED, STEPS, TRUE_CFG_SCALE
from .engine.models.guard import GUARD, STOP
from .engine.notices import first_time
from .load import CATEGORY, Transformer, guard_input

if TYPE_CHECKING:
    from .engine.sampling.record import RunRecord
    from .engine.sampling.resume import SavedRun
    from .engine.sampling.sampling import SamplingRun

log = logging.getLogger("FireRed")

WIDTH_TIP = "Pixels; 0 follows the first image at about 1 megapixel, or FireRed Encode Prompt's native size."


class FireRedSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        size = dict(default=0, min=WIDTH.low, max=WIDTH.high, step=TOKEN_PIXELS, optional=True)
        return io.Schema(
            node_id="FireRedSampler",
            display_name="FireRed Sampler",
            category=CATEGORY,
            search_aliases=["KSampler", "image edit", "denoise"],
            description="Denoise with flow-match Euler and true CFG. Stops with an error where the image "
            "would turn black.",
            inputs=[
                Transformer.Input("transformer"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative", optional=True, tooltip="Needed for cfg above 1."),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Gives the size and how many pictures to sample. What it shows counts with a "
                    "noise mask, and with denoise below 1 on FireRed Schedule.",
                ),
                io.Int.Input("steps", default=40, min=STEPS.low, max=STEPS.high, optional=True),
                io.Float.Input(
                    "cfg",
                    default=4.0,
                    min=TRUE_CFG_SCALE.low,
                    max=TRUE_CFG_SCALE.high,
                    step=0.1,
                    optional=True,
                    tooltip="True CFG scale. 1 or less samples without guidance, in half the time.",
                ),
                io.Int.Input("width", **size, tooltip=WIDTH_TIP),
                io.Int.Input("height", **size, tooltip=WIDTH_TIP),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=SEED.low,
                    max=SEED.high,
                    optional=True,
                    control_after_generate=True,
                    tooltip="The same noise as torch.Generator('cpu').manual_seed(seed) in diffusers, on "
                    "every device.",
                ),
                io.Combo.Input(
                    "resume",
                    options=list(RESUME.options),
                    default="on",
                    optional=True,
                    advanced=True,
                    tooltip="on: after a crash or a cancel the same prompt goes on at the step it reached.",
                ),
                guard_input(),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="latent"),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="What happened: precision, kernels, cards, seconds a step, peak memory.",
                ),
            ],
            hidden=[io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls,
        transformer: host.Handle,
        positive: Any,
        negative: Any = None,
        latent: dict[str, Any] | None = None,
        steps: int = 40,
        cfg: float = 4.0,
        width: int = 0,
        height: int = 0,
        seed: int = 0,
        resume: str = "on",
        guard: str = STOP,
    ) -> io.NodeOutput:
        from .engine.sampling.record import RunRecord

        guard, resume = GUARD.require(guard), RESUME.require(resume)
        host.require_handle(transformer, "transformer")
        given, options = None if latent is None else read_latent(latent), transformer.options
        if given is not None and given.is_kept(options.denoise):
            log.warning("the latent stays as it is: denoise is 0, or its noise mask is empty (black)")
            samples = require_latents(given.samples, "The latent")
            return io.NodeOutput(kept_keys(latent or {}) | {"samples": samples}, "nothing was sampled")
        numbers: dict[str, Any] = {"steps": steps, "cfg": cfg, "width": width, "height": height, "seed": seed}
        prepare = functools.partial(_prepare, transformer, positive, negative, given, **numbers)
        run = prepare()
        _log_unused_inputs(negative is not None, cfg, given, run)
        saved = _saved(run, guard) if resume == "on" else None
        record = RunRecord()
        samples = _sample(transformer, run, saved, guard, record, prepare)
        report = record.describe(run)
        host.write_into_png(cls.hidden.extra_pnginfo, report)
        sampled = kept_keys(latent or {}) | {"samples": samples, REPORT: report}
        sampled[host.RUN_KEY] = saved.name if saved else None
        if run.native_size:
            sampled[NATIVE_SIZE] = run.native_size
        return io.NodeOutput({key: value for key, value in sampled.items() if value is not None}, report)


def _saved(run: SamplingRun, guard: str) -> SavedRun:
    """The run's file. Tells of unfinished runs with other seeds: `randomize` changes it after each Run."""
    saved = host.saved_run(run.name(guard), dataclasses.replace(run, seed=0).name(guard), run.seed)
    for seed, step in saved.other_seeds().items():
        log.info(
            "this edit was not finished with seed %d: set the seed to it, and it goes on at step %d/%d",
            seed, step + 1, run.schedule.steps,
        )  # fmt: skip
    return saved


def _prepare(
    transformer: host.Handle,
    positive: Any,
    negative: Any,
    given: LatentInput | None,
    steps: int,
    cfg: float,
    width: int,
    height: int,
    seed: int,
    **others: Any,
) -> SamplingRun:
    """The checked run. others: inputs of the node that do not belong to it."""
    from .engine.sampling.conditioning import NEGATIVE, POSITIVE
    from .engine.sampling.sampling import prepare_run, read_conditions

    branches = {POSITIVE: positive} if negative is None else {POSITIVE: positive, NEGATIVE: negative}
    run = prepare_run(
        transformer.replica,
        read_conditions(transformer.replica, branches),
        steps=steps,
        true_cfg_scale=cfg,
        width=width,
        height=height,
        seed=seed,
        samples=None if given is None else given.samples,
        draws=None if given is None else given.draws,
        mask=None if given is None else given.mask,
        options=transformer.options,
        layout=transformer.layout,
    )
    return run if transformer.cluster is None else host.on_card(run, transformer.cluster)


def _log_unused_inputs(has_negative: bool, cfg: float, given: LatentInput | None, run: SamplingRun) -> None:
    """Log what the user set and this run does not use, and how much of the picture it may change."""
    if cfg > 1 and not has_negative:
        log.warning("cfg is %s but no negative conditioning is connected: sampling without guidance.", cfg)
    if run.mask is not None:
        log.info("the noise mask lets %.1f %% of the picture change", 100 * run.mask.mean().item())
    unused = given is not None and run.pictures is None and bool(given.samples.any())
    if unused and first_time("content of a latent"):
        log.info(
            "only the size and the batch of a latent count, not what it shows: sampling starts from noise. "
            "To start from the latent, set denoise below 1 on FireRed Schedule"
        )


def _sample(
    transformer: host.Handle,
    run: SamplingRun,
    saved: SavedRun | None,
    guard: str,
    record: RunRecord,
    prepare: Callable[..., SamplingRun],
) -> torch.Tensor:
    """The run's raw latents: from disk if an earlier prompt finished them, else sampled.

    prepare: the run for other numbers of the node, as queued prompts have them.
    """
    from .engine.sampling.sampling import sample

    samples = saved.result(run.batch) if saved else None
    if samples is None and transformer.cluster is not None:
        queued = lambda inputs: prepare(**inputs)  # noqa: E731
        samples = host.sample_on_cluster(transformer.cluster, run, saved, guard, record, queued)
    elif samples is None:
        cards = run.on_each_card()
        for card in cards:
            card.require_room(host.room(card.replica))
        with host.borrow_all({card.replica: card.working_bytes() for card in cards}) as models:
            modulation = host.progress_reporter(f"computing the modulation of {run.schedule.steps} steps")
            reporters = host.sampling_reporter(run.replica.device), modulation
            samples = sample(models, run, *reporters, saved, guard, record)
    if saved is not None:
        host.forget_run_after_prompt(saved)
    return samples
