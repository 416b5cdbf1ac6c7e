"""The denoise loop: flow-match Euler with true CFG, in FP32 whatever the precision of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .conditioning import NEGATIVE, POSITIVE
from .schedule import Schedule

# Packed latents (1, tokens, 64) FP32 and a step (from 0) to the velocity each branch predicts, so shaped.
Predict = Callable[[torch.Tensor, int], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class StepState:
    """After `step` (from 1) of `steps`. latents, denoised: packed (1, tokens, 64) FP32."""

    step: int
    steps: int
    latents: torch.Tensor
    denoised: torch.Tensor


def denoise(
    predict: Predict,
    latents: torch.Tensor,
    schedule: Schedule,
    true_cfg_scale: float,
    on_step: Callable[[StepState], None] = lambda state: None,
    first_step: int = 0,
) -> torch.Tensor:
    """Sample packed latents (1, tokens, 64) FP32 from the noise level that `first_step` (from 0) starts at.

    true_cfg_scale: used at steps where both branches are predicted. on_step: called after each step; what it
    raises stops the run. Flow matching with Euler steps: https://huggingface.co/papers/2403.03206
    """
    for index in range(first_step, schedule.steps):
        sigma, next_sigma = schedule.sigmas[index].item(), schedule.sigmas[index + 1].item()
        predictions = predict(latents, index)
        velocity = predictions[POSITIVE]
        if NEGATIVE in predictions:
            velocity = true_cfg(velocity, predictions[NEGATIVE], true_cfg_scale)
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
