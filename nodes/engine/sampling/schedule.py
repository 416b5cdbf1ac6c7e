"""The noise levels of a sampling run, from the checkpoint's scheduler config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError
from ..limits import STEPS


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a run.

    sigmas: (steps + 1) FP32 on the CPU, from the level of the first step down to 0.
    timesteps: (steps) FP32 on the CPU, the transformer's inputs, 0 to 1.
    """

    sigmas: torch.Tensor
    timesteps: torch.Tensor

    @property
    def steps(self) -> int:
        return len(self.timesteps)


FULL_DENOISE = 0.9999  # above it, denoise counts as 1; core's KSampler.set_steps
LONGEST = 1e9  # steps of a whole schedule; of a longer one, the last steps have no noise


def make_schedule(
    config: dict[str, Any], steps: int, image_tokens: int, shift: float = 0.0, denoise: float = 1.0
) -> Schedule:
    """The flow-match schedule of `steps` steps for an image of `image_tokens` packed tokens.

    config: of the checkpoint's scheduler, from Component.config. shift: one for all sizes, used as ComfyUI's
    ModelSamplingAuraFlow does; 0 for the checkpoint's own schedule. denoise: above 0; below 1 these are the
    last steps of a schedule that is longer by this factor, as core's KSampler does. Raises InputError for
    `steps` out of bounds and CheckpointError for a config that diffusers refuses.
    """
    import diffusers  # takes seconds, which a process that is given its schedule does not spend

    steps = STEPS.require(steps)
    if shift:
        config = config | {"use_dynamic_shifting": False, "shift": shift, "shift_terminal": None}
    total = steps if denoise > FULL_DENOISE else int(min(steps / denoise, LONGEST))
    if total == 1:  # shift_terminal stretches a schedule to its last level: 0 / 0 with one step
        config = config | {"shift_terminal": None}
    try:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
        sigmas, mu = np.linspace(steps / total, 1 / total, steps), dynamic_shift(config, image_tokens)
        scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    except (ValueError, TypeError, ArithmeticError, ImportError) as error:
        raise CheckpointError(
            f"The checkpoint's scheduler_config.json cannot be used ({error}). Download this file again."
        ) from error
    return Schedule(scheduler.sigmas, scheduler.timesteps / scheduler.config.num_train_timesteps)


def dynamic_shift(config: dict[str, Any], image_tokens: int) -> float:
    """The resolution-dependent shift mu, linear in the token count. config: from Component.config."""
    base_tokens, max_tokens = config["base_image_seq_len"], config["max_image_seq_len"]
    base_shift, max_shift = config["base_shift"], config["max_shift"]
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return image_tokens * slope + base_shift - slope * base_tokens
