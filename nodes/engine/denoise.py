"""The denoise loop: flow-match Euler with true CFG, in FP32 whatever the precision of the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .components import ComponentSpec
from .guard import STOP, Guard
from .schedule import Schedule
from .trace import find_culprit
from .workers import NEGATIVE, POSITIVE, Traceable, Worker


@dataclass(frozen=True)
class StepState:
    """After `step` (from 1) of `steps`. latents, denoised: packed (1, tokens, 64) FP32."""

    step: int
    steps: int
    latents: torch.Tensor
    denoised: torch.Tensor


def denoise(
    worker: Worker,
    spec: ComponentSpec,
    latents: torch.Tensor,
    schedule: Schedule,
    true_cfg_scale: float | None,
    on_step: Callable[[StepState], None] = lambda state: None,
    first_step: int = 0,
    guard: str = STOP,
) -> torch.Tensor:
    """Sample packed latents (1, tokens, 64) from `latents`, at the noise level `first_step` (from 0) starts
    at.

    true_cfg_scale: None to ask the worker for the positive branch alone. spec: the transformer's, named in
    errors.
    on_step: called after each step; what it raises stops the run. guard: what to do about NaN and infinity,
    one of guard.GUARDS. Raises NonFiniteError at the step and branch that went wrong. Returns FP32 on the
    worker's device.
    """
    watched = Guard(spec, guard)
    latents = latents.to(worker.device, torch.float32)
    for index in range(first_step, schedule.steps):
        sigma, next_sigma = schedule.sigmas[index].item(), schedule.sigmas[index + 1].item()
        velocity = _predict(worker, watched, latents, index, schedule.steps, POSITIVE)
        if true_cfg_scale is not None:
            unconditional = _predict(worker, watched, latents, index, schedule.steps, NEGATIVE)
            velocity = true_cfg(velocity, unconditional, true_cfg_scale)
        denoised = latents - sigma * velocity
        latents = latents + (next_sigma - sigma) * velocity
        on_step(StepState(index + 1, schedule.steps, latents, denoised))
    return latents


def true_cfg(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance, each token rescaled to the norm of its positive prediction (Qwen-Image's
    rule).

    All tensors (1, tokens, 64) FP32. https://huggingface.co/papers/2207.12598
    """
    guided = negative + scale * (positive - negative)
    norm = guided.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(guided.dtype).tiny)
    return guided * (positive.norm(dim=-1, keepdim=True) / norm)


def _predict(
    worker: Worker, guard: Guard, latents: torch.Tensor, index: int, steps: int, branch: str
) -> torch.Tensor:
    predict = functools.partial(worker.predict, latents, index, branch)
    model = worker.module(branch) if isinstance(worker, Traceable) else None
    trace = None if model is None else functools.partial(find_culprit, model, predict)
    with guard.watch_clipping(model) as peaks:
        prediction = predict()
    return guard.check(prediction, f"Step {index + 1} of {steps}: the {branch} prediction", trace, peaks)
