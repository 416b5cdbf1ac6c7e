"""What a graph lays over a transformer before it samples. None of it decides which weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError
from ..limits import EXACT, Real
from ..weights.adapters import Adapter

STRENGTH = Real("strength", -100.0, 100.0)
SHIFT = Real("shift", 0.0, 100.0)
GUIDANCE_FROM, GUIDANCE_TO = (Real(name, 0.0, 1.0) for name in ("guidance_from", "guidance_to"))
DENOISE, DIFFERENTIAL = (Real(name, 0.0, 1.0) for name in ("denoise", "differential"))
THRESHOLD = Real("threshold", 0.0, 10.0)
START, END = Real("start", 0.0, 1.0), Real("end", 0.0, 1.0)


def _require_order(first: Real, start: float, last: Real, end: float) -> None:
    if start > end:
        raise InputError(f"{first.name} ({start:g}) is after {last.name} ({end:g}). Exchange them.")


@dataclass(frozen=True)
class StepCacheOptions:
    """threshold: how far predictions may drift unseen, as a part of their size; 0 computes every step.

    start, end: the part of the steps, 0 to 1, in which steps may be skipped. The last is always computed.
    Raises InputError for a start after the end.
    """

    threshold: float = 0.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _require_order(START, self.start, END, self.end)


@dataclass(frozen=True)
class SamplingOptions:
    """adapters: LoRAs, in the order of the graph. shift: of the schedule; 0 keeps the checkpoint's own.

    guidance_from, guidance_to: the part of the steps, 0 to 1, that computes both branches of guidance.
    denoise: below 1, sampling starts from a picture, with less noise. differential: as in denoise.Kept.
    attention: EXACT or INT8.
    Raises InputError for a start after the end.
    """

    adapters: tuple[Adapter, ...] = ()
    shift: float = 0.0
    guidance_from: float = 0.0
    guidance_to: float = 1.0
    step_cache: StepCacheOptions = StepCacheOptions()
    denoise: float = 1.0
    differential: float = 0.0
    attention: str = EXACT

    def __post_init__(self) -> None:
        _require_order(GUIDANCE_FROM, self.guidance_from, GUIDANCE_TO, self.guidance_to)

    def is_guided(self, step: int, steps: int) -> bool:
        """Whether a step (from 0) computes the negative branch too."""
        return self.guidance_from <= step / steps < self.guidance_to

    def guides_any_of(self, steps: int) -> bool:
        """Whether any step of so many computes the negative branch."""
        return any(self.is_guided(step, steps) for step in range(steps))

    def identity(self, guided: bool) -> list[object]:
        """What a run's result depends on beside its schedule. guided: whether there are two branches."""
        parts: list[object] = [(each.lora.identity, each.strength) for each in self.adapters if each.strength]
        interval, cache = (self.guidance_from, self.guidance_to), self.step_cache
        if guided and interval != (0.0, 1.0):
            parts.append(interval)
        if self.attention != EXACT:
            parts.append(("attention", self.attention))
        return [*parts, *([cache.threshold, cache.start, cache.end] if cache.threshold else [])]


DEFAULT_OPTIONS = SamplingOptions()
