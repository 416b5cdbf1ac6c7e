"""Workers compute the predictions of the denoise loop, each with its model, device and conditions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch

from ..arithmetic import exact_fp32
from ..cards.transfer import copy_to
from ..latents import PATCH, pack, pad_to_patches
from ..models.attention import attention_on
from ..models.config import TransformerConfig
from ..models.guard import STOP, Guard
from ..models.modulation import StepModulation
from ..models.together import Lane
from ..models.transformer import (
    QwenImageTransformer,
    Transformer,
    attention_mask,
    rotary_embedding,
)
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


class Part(NamedTuple):
    """Which part of the tokens: the `number`th (from 0) of `of` equal ones."""

    number: int = 0
    of: int = 1

    def among(self, tokens: int) -> slice:
        """Where the part is among so many tokens."""
        return slice(tokens * self.number // self.of, tokens * (self.number + 1) // self.of)

    @property
    def all(self) -> list[Part]:
        return [Part(number, self.of) for number in range(self.of)]


WHOLE = Part()


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
        """Make the modulation of the schedule ready, and copy the LoRAs to the device.

        latent_size: height and width of the latents to sample, both even. conditions: by branch. guard: what
        to do about NaN and infinity, one of guard.GUARDS. on_modulation: the modulation's progress.
        """
        self.model, self.replica = transformer.model, transformer.replica
        self.guard = Guard(self.replica, guard, options.adapters)
        self.adapters = Adapters(options.adapters, self.replica.device, self.replica.spec.held)
        self._steps, self._options = schedule.steps, options
        self._attend = attention_on(self.replica.device, options.attention)
        self._conditions, self._latent_size = conditions, latent_size
        self._modulation = transformer.modulation.of(schedule.timesteps, self.adapters, on_modulation)
        self._branches: dict[tuple[str, Part], _Branch] = {}

    def predict(self, latents: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        """As Worker.predict, on the worker's device. Raises NonFiniteError that names the bad branch."""
        return {name: self.predict_branch(name, latents, step) for name in self.branches(step)}

    @torch.inference_mode()
    @exact_fp32()
    def predict_branch(self, name: str, latents: torch.Tensor, step: int) -> torch.Tensor:
        """As predict, of one branch."""
        with self.adapters.attached(self.model):
            forward = self.lane(name, latents, step).predict
            return self.guard.run(forward, self.title(name, step), self.model).float()

    def branches(self, step: int) -> list[str]:
        """The names of those that the step computes."""
        guided = self._options.is_guided(step, self._steps)
        return [name for name in self._conditions if guided or name == POSITIVE]

    def title(self, name: str, step: int) -> str:
        """A prediction's name for errors."""
        return f"Step {step + 1} of {self._steps}: the {name} prediction"

    def lane(self, name: str, latents: torch.Tensor, step: int, part: Part = WHOLE) -> Lane:
        """What this worker computes of a branch: that part of the tokens."""
        if (name, part) not in self._branches:
            self._branches[name, part] = _Branch(
                self._conditions[name], self._latent_size, self.model.config, self.replica, part
            )
        latents = copy_to(latents, self.replica.device).to(self.replica.spec.math)
        lane = self._branches[name, part].lane(self.model, latents, self._modulation.at(step))
        return replace(lane, attend=self._attend)


class _Branch:
    """A part of the inputs from one branch's condition, on the device. They are the same at every step."""

    def __init__(
        self,
        condition: Condition,
        latent_size: tuple[int, int],
        config: TransformerConfig,
        replica: Replica,
        part: Part,
    ):
        self._device, compute = replica.device, replica.spec.math
        padded = [pad_to_patches(copy_to(raw, self._device)) for raw in condition.reference_latents]
        sizes = [latent_size, *(raw.shape[-2:] for raw in padded)]
        grids = [(height // PATCH, width // PATCH) for height, width in sizes]
        targets, *references = [rows * columns for rows, columns in grids]
        image_tokens, text_tokens = targets + sum(references), condition.prompt_embeds.shape[1]
        image, text = part.among(image_tokens), part.among(text_tokens)
        self._own = slice(min(image.start, targets), min(image.stop, targets))  # of the denoised tokens
        packed = [pack(condition.statistics.normalize(raw)).to(compute) for raw in padded]
        after = slice(max(image.start - targets, 0), max(image.stop - targets, 0))
        self._references = [torch.cat(packed, dim=1)[:, after]] if packed else []
        self._text = copy_to(condition.prompt_embeds, self._device).to(compute)[:, text]
        for_image, for_text = rotary_embedding(config, grids, text_tokens, self._device)
        self._rotary = for_image[image], for_text[text]
        self._mask = _joint_mask(condition.mask, image_tokens, part, self._device)

    def lane(self, model: QwenImageTransformer, latents: torch.Tensor, modulation: StepModulation) -> Lane:
        """latents: packed (1, tokens, 64), in the model's arithmetic on its device."""
        own = latents[:, self._own]
        image = torch.cat([own, *self._references], dim=1)
        return Lane(
            model, self._device, image, self._text, modulation, self._rotary, own.shape[1], self._mask
        )


def _joint_mask(
    mask: torch.Tensor | None, image_tokens: int, part: Part, device: torch.device
) -> torch.Tensor | None:
    """The mask of the tokens of all parts, in their order. mask: of all text tokens."""
    if mask is None:
        return None
    parts = [
        attention_mask(mask[:, each.among(mask.shape[1])], len(range(image_tokens)[each.among(image_tokens)]))
        for each in part.all
    ]
    return torch.cat([each for each in parts if each is not None], dim=-1).to(device)
