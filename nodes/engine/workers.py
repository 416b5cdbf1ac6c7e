"""Who computes predictions: the loop asks a worker, which knows a model, its device and conditioning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from .arithmetic import exact_fp32
from .components import ComponentSpec
from .conditioning import Condition
from .latents import PATCH, normalize, pack, pad_to_patches
from .progress import OnProgress, untold
from .schedule import Schedule
from .transfer import cross

POSITIVE, NEGATIVE = "positive", "negative"


class Worker(Protocol):
    """Computes predictions for the loop, which lives on `device`."""

    device: torch.device

    def predict(self, latents: torch.Tensor, step: int, branch: str) -> torch.Tensor:
        """The predicted velocity (1, tokens, 64) FP32 for packed latents so shaped, at `step`."""
        ...


@runtime_checkable
class Traceable(Protocol):
    """A worker whose model the guard can look into."""

    def module(self, branch: str) -> torch.nn.Module | None:
        """The model that computes this branch, if it is in this process."""
        ...


class LocalWorker:
    """One transformer on one device of this process."""

    def __init__(
        self,
        transformer: Any,
        spec: ComponentSpec,
        schedule: Schedule,
        latent_size: tuple[int, int],
        conditions: Mapping[str, Condition],
        on_fold: OnProgress = untold,
    ):
        """latent_size: height and width of the latents to sample, both even.

        transformer: as loading.load returns it; its folded modulation is made ready for the schedule.
        """
        self.device = spec.device
        transformer.modulation.use(schedule.timesteps, on_fold)
        self._transformer = transformer
        self._compute = spec.math
        self._timesteps = schedule.timesteps.to(self.device)
        mean, std = spec.checkpoint.latent_statistics()
        self._inputs = {
            branch: self._model_inputs(condition, latent_size, mean, std)
            for branch, condition in conditions.items()
        }

    def module(self, branch: str) -> torch.nn.Module:
        return self._transformer

    @torch.inference_mode()
    @exact_fp32()
    def predict(self, latents: torch.Tensor, step: int, branch: str) -> torch.Tensor:
        self._transformer.modulation.select(step)
        references, inputs = self._inputs[branch]
        hidden_states = torch.cat([latents.to(self._compute), *references], dim=1)
        timestep = self._timesteps[step].expand(1).to(self._compute)
        prediction = self._transformer(hidden_states, timestep=timestep, return_dict=False, **inputs)[0]
        return prediction[:, : latents.shape[1]].float()

    def _model_inputs(
        self, condition: Condition, latent_size: tuple[int, int], mean: torch.Tensor, std: torch.Tensor
    ) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """A branch's packed references and its other arguments, moved to the device once for all steps."""
        padded = [pad_to_patches(cross(raw, self.device)) for raw in condition.reference_latents]
        references = [pack(normalize(raw, mean, std)).to(self._compute) for raw in padded]
        grids = [latent_size, *(raw.shape[-2:] for raw in padded)]
        mask = condition.mask
        return references, {
            "encoder_hidden_states": cross(condition.prompt_embeds, self.device).to(self._compute),
            "encoder_hidden_states_mask": None if mask is None else mask.to(self.device),
            "img_shapes": [[(1, height // PATCH, width // PATCH) for height, width in grids]],
        }
