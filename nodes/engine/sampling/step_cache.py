"""A step cache: steps whose predictions are predictable are not computed.

While sampling, the predictions change slowly. How much they change is estimated from how much the latents
moved, times the rate at which both moved between the last two computed steps. As long as the sum of these
estimates stays below a threshold, the step takes an extrapolation of the last two computed predictions. The
estimate is EasyCache's (https://github.com/H-EmbodVis/EasyCache); that one reuses the last prediction as it
is. On the edits of the demo model, going half of the linear way was closer to the full result by 3 to 6 dB.

All branches of a step share one decision, which depends on the latents alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from .conditioning import NEGATIVE, POSITIVE
from .denoise import Predict
from .options import StepCacheOptions
from .resume import STEP_CACHE
from .schedule import Schedule

EXTRAPOLATED = 0.5  # of the way that a straight line through the last two predictions goes

Predictions = Mapping[str, torch.Tensor]


@dataclass
class _Computed:
    """A computed step: its noise level, its latents, and the predictions of its branches."""

    sigma: float
    latents: torch.Tensor
    predictions: Predictions


@dataclass
class StepCache:
    """The predictions of one picture's steps, computed by `predict` or extrapolated.

    guided: the steps that want the negative branch too. kept: what `state` gave, for a run that goes on.
    """

    predict_step: Predict
    schedule: Schedule
    options: StepCacheOptions
    guided: Iterable[int] = ()
    kept: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.skipped = 0
        self._wanted = {step: (POSITIVE, NEGATIVE) for step in self.guided}
        self._last: _Computed | None = None
        self._before: _Computed | None = None
        self._seen: torch.Tensor | None = None  # the latents of the step before, computed or not
        self._drift = 0.0  # estimated since the last computed step
        self._restore()

    def predict(self, latents: torch.Tensor, step: int) -> Predictions:
        """As denoise.Predict."""
        if not self.options.threshold:
            return self.predict_step(latents, step)
        if self._may_skip(latents, step):
            self._seen, self.skipped = latents, self.skipped + 1
            return self._extrapolated(step)
        predictions = self.predict_step(latents, step)
        self._before = self._last
        self._last = _Computed(self.schedule.sigmas[step].item(), latents, predictions)
        self._seen, self._drift = latents, 0.0
        return predictions

    def _may_skip(self, latents: torch.Tensor, step: int) -> bool:
        """Whether the step's predictions have drifted little. Counts this step's drift."""
        last, before, steps = self._last, self._before, self.schedule.steps
        if last is None or before is None or self._seen is None:
            return False
        in_part = self.options.start <= step / steps < self.options.end and step < steps - 1
        if not in_part or not all(
            name in last.predictions and name in before.predictions for name in self._of(step)
        ):
            return False
        changed = _size(last.predictions[POSITIVE] - before.predictions[POSITIVE])
        rate = changed / max(_size(last.latents - before.latents), 1e-12)
        self._drift += rate * _size(latents - self._seen) / max(_size(last.predictions[POSITIVE]), 1e-12)
        return self._drift < self.options.threshold

    def _extrapolated(self, step: int) -> dict[str, torch.Tensor]:
        last, before = self._last, self._before
        assert last is not None and before is not None
        between, ahead = last.sigma - before.sigma, self.schedule.sigmas[step].item() - last.sigma
        part = EXTRAPOLATED * ahead / between if between else 0.0
        return {
            name: torch.lerp(last.predictions[name], before.predictions[name], -part)
            for name in self._of(step)
        }

    def _of(self, step: int) -> tuple[str, ...]:
        """The branches that the step wants."""
        return self._wanted.get(step, (POSITIVE,))

    def state(self) -> dict[str, torch.Tensor]:
        """All that the next steps depend on, as tensors of a saved run. None of them share memory."""
        if not self.options.threshold:
            return {}
        tensors = {"numbers": torch.tensor([self._drift, self.skipped], dtype=torch.float64)}
        if self._last is not None and self._seen is not None and self._seen is not self._last.latents:
            tensors["seen"] = self._seen
        for name, computed in (("last", self._last), ("before", self._before)):
            if computed is not None:
                tensors[f"{name}.sigma"] = torch.tensor(computed.sigma, dtype=torch.float64)
                tensors[f"{name}.latents"] = computed.latents
                tensors |= {f"{name}.of.{branch}": made for branch, made in computed.predictions.items()}
        return {STEP_CACHE + name: tensor for name, tensor in tensors.items()}

    def _restore(self) -> None:
        kept = {name.removeprefix(STEP_CACHE): tensor for name, tensor in self.kept.items()}
        if "numbers" not in kept:
            return
        self._drift, skipped = kept["numbers"].tolist()
        self.skipped = int(skipped)
        self._last, self._before = (_restored(kept, name) for name in ("last", "before"))
        self._seen = kept.get("seen", self._last.latents if self._last else None)


def _restored(kept: Mapping[str, torch.Tensor], name: str) -> _Computed | None:
    if f"{name}.sigma" not in kept:
        return None
    prefix = f"{name}.of."
    made = {key.removeprefix(prefix): tensor for key, tensor in kept.items() if key.startswith(prefix)}
    return _Computed(kept[f"{name}.sigma"].item(), kept[f"{name}.latents"], made)


def _size(tensor: torch.Tensor) -> float:
    """The mean magnitude."""
    return tensor.abs().mean().item()
