"""Workers compute the predictions of the denoise loop, each with its model, device and conditions."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Protocol

import torch

from ..arithmetic import exact_fp32
from ..cards.transfer import copy_to
from ..latents import PATCH, pack, pad_to_patches
from ..models.guard import STOP, Guard
from ..models.modulation import StepModulation
from ..models.transformer import QwenImageTransformer, Transformer, attention_mask, rotary_embedding
from ..progress import OnProgress, ignore_progress
from ..weights.adapters import Adapters
from ..weights.components import Replica
from .conditioning import POSITIVE, Condition
from .options import DEFAULT_OPTIONS, SamplingOptions
from .schedule import Schedule


class Worker(Protocol):
    """Computes the predictions of a step. It decides which branches, and where to compute each."""

    def predict(self, latents: torch.Tensor, step: int) -> Mapping[str, torch.Tensor]:
        """The velocity that each branch predicts, by the branch's name: (1, tokens, 64) FP32.

        latents: packed, of the same shape. step: from 0.
        """
        ...


class LocalWorker:
    """A transformer on one device of this process. It computes one branch after the other."""

    def __init__(
        self,
        transformer: Transformer,
        schedule: Schedule,
        latent_size: tuple[int, int],
        conditions: Mapping[str, Condition],
        guard: str = STOP,
        on_modulation: OnProgress = ignore_progress,
        options: SamplingOptions = DEFAULT_OPTIONS,
    ):
        """Make the modulation of the schedule ready, and copy the conditions and LoRAs to the device.

        latent_size: height and width of the latents to sample, both even. conditions: by branch. guard: what
        to do about NaN and infinity, one of guard.GUARDS. on_modulation: the modulation's progress.
        """
        self.model, self._steps = transformer.model, schedule.steps
        replica = transformer.replica
        self._device, self._compute = replica.device, replica.spec.math
        self._guard = Guard(replica, guard, options.adapters)
        self._options, self._adapters = options, Adapters(options.adapters, self._device)
        self._modulation = transformer.modulation.of(schedule.timesteps, self._adapters, on_modulation)
        self._branches = {
            name: _Branch(condition, latent_size, self.model, replica)
            for name, condition in conditions.items()
        }

    @torch.inference_mode()
    @exact_fp32()
    def predict(self, latents: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        """As Worker.predict, on the worker's device. Raises NonFiniteError that names the bad branch."""
        latents = latents.to(self._device, self._compute)
        modulation = self._modulation.at(step)
        guided = self._options.is_guided(step, self._steps)
        with self._adapters.attached(self.model):
            return {
                name: self._guard.run(
                    functools.partial(branch.predict, self.model, latents, modulation),
                    f"Step {step + 1} of {self._steps}: the {name} prediction",
                    self.model,
                )
                for name, branch in self._branches.items()
                if guided or name == POSITIVE
            }


class _Branch:
    """The inputs from one branch's condition, on the device. They are the same at every step."""

    def __init__(
        self,
        condition: Condition,
        latent_size: tuple[int, int],
        model: QwenImageTransformer,
        replica: Replica,
    ):
        device, compute = replica.device, replica.spec.math
        padded = [pad_to_patches(copy_to(raw, device)) for raw in condition.reference_latents]
        sizes = [latent_size, *(raw.shape[-2:] for raw in padded)]
        grids = [(height // PATCH, width // PATCH) for height, width in sizes]
        self._references = [pack(condition.statistics.normalize(raw)).to(compute) for raw in padded]
        self._text = copy_to(condition.prompt_embeds, device).to(compute)
        image_tokens = sum(rows * columns for rows, columns in grids)
        mask = None if condition.mask is None else condition.mask.to(device)
        self._mask = attention_mask(mask, image_tokens)
        self._rotary = rotary_embedding(model.config, grids, self._text.shape[1], device)

    def predict(
        self, model: QwenImageTransformer, latents: torch.Tensor, modulation: StepModulation
    ) -> torch.Tensor:
        """The velocity (1, tokens, 64) FP32 for packed latents of that shape."""
        image = torch.cat([latents, *self._references], dim=1)
        targets = latents.shape[1]
        return model(image, self._text, modulation, self._rotary, targets, self._mask).float()
