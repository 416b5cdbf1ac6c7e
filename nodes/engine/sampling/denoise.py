"""The denoise loop: flow-match Euler with true CFG. It computes in FP32 at every precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .conditioning import NEGATIVE, POSITIVE
from .schedule import Schedule

# Packed latents (1, tokens, 64) FP32 and a step (from 0) to each branch's velocity, of the same shape.
Predict = Callable[[torch.Tensor, int], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class StepState:
    """The state after `step` (from 1) of `steps`. latents, denoised: packed (1, tokens, 64) FP32."""

    step: int
    steps: int
    latents: torch.Tensor
    denoised: torch.Tensor


@dataclass(frozen=True)
class Kept:
    """A picture that stays where its mask is 0, as ComfyUI's KSampler and DifferentialDiffusion mean it.

    picture, noise: packed (1, tokens, 64) FP32. mask: of the same shape; 1 is to change, 0 to keep.
    differential: 0 blends grey parts of the mask in every step. 1 keeps them in the first steps and changes
    them in the last: the lighter the grey, the more steps. Between, it mixes both.
    """

    picture: torch.Tensor
    noise: torch.Tensor
    mask: torch.Tensor
    differential: float = 0.0

    def mask_at(self, part: float) -> torch.Tensor:
        """The mask of a step. part: its noise level, as a part of the first step's."""
        changed = (self.mask >= part).to(self.mask) if self.differential else self.mask
        return torch.lerp(self.mask, changed, self.differential)


def add_noise(picture: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
    """The picture at a noise level of flow matching."""
    return sigma * noise + (1 - sigma) * picture


def denoise(
    predict: Predict,
    latents: torch.Tensor,
    schedule: Schedule,
    true_cfg_scale: float,
    on_step: Callable[[StepState], None] = lambda state: None,
    first_step: int = 0,
    kept: Kept | None = None,
) -> torch.Tensor:
    """Euler steps of flow matching (https://huggingface.co/papers/2403.03206).

    latents: packed (1, tokens, 64) FP32, at the noise level of `first_step` (from 0). true_cfg_scale: for
    steps that predict both branches. on_step: called after each step; an exception stops the run. kept: what
    stays outside of a mask.
    """
    for index in range(first_step, schedule.steps):
        sigma, next_sigma = schedule.sigmas[index].item(), schedule.sigmas[index + 1].item()
        shown, mask = latents, None
        if kept is not None:
            mask = kept.mask_at(sigma / schedule.sigmas[0].item())
            shown = torch.lerp(add_noise(kept.picture, kept.noise, sigma), latents, mask)
        predictions = predict(shown, index)
        velocity = predictions[POSITIVE]
        if NEGATIVE in predictions:
            velocity = true_cfg(velocity, predictions[NEGATIVE], true_cfg_scale)
        denoised = shown - sigma * velocity
        if kept is not None and mask is not None:
            denoised = torch.lerp(kept.picture, denoised, mask)
            velocity = (latents - denoised) / sigma
        latents = latents + (next_sigma - sigma) * velocity
        on_step(StepState(index + 1, schedule.steps, latents, denoised))
    return latents


def true_cfg(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance (https://huggingface.co/papers/2207.12598) with Qwen-Image's rescaling.

    Each token gets the norm of its positive prediction. All tensors are (1, tokens, 64) FP32.
    """
    guided = negative + scale * (positive - negative)
    norm = guided.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(guided.dtype).tiny)
    return guided * (positive.norm(dim=-1, keepdim=True) / norm)
