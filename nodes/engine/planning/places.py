"""What goes where: a placement as the log, the plan's picture and the loaders read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import CheckpointError
from ..units import GIB
from ..weights.estimates import Edit, fits
from ..weights.precision import Precision
from .machine import Device, Machine


@dataclass(frozen=True)
class Place:
    """One component on one device. weights, workspace: bytes. tiled: the VAE decodes in tiles.

    fused: attention runs without holding all its scores.
    """

    role: str
    device: Device
    precision: Precision
    weights: int
    workspace: int
    reason: str = ""
    tiled: bool = False
    fused: bool = True

    def __str__(self) -> str:
        return f"{self.name} {self.precision.name} on {self.device.card.label}"

    @property
    def name(self) -> str:
        return "VAE" if self.role == "vae" else self.role.replace("_", " ")

    @property
    def size(self) -> str:
        return f"{self.weights / GIB:.1f} GiB + {self.workspace / GIB:.1f} GiB to work with"

    @property
    def description(self) -> str:
        """In one line: what, where, how much, why."""
        scores = "attention has no fused kernel there and holds its scores" * (not self.fused)
        why = (self.reason, scores, "in tiles" * self.tiled, "does not fit" * (not self.fits))
        return ", ".join(part for part in (f"{self}: {self.size}", *why) if part)

    @property
    def fits(self) -> bool:
        """With nothing else there."""
        return fits(self.weights, self.workspace, self.device.usable)


@dataclass(frozen=True)
class Placement:
    """Where everything goes; in mode `cfg` the transformer has a second place.

    step_seconds: None where a card's speeds are not known. rejected: what was not chosen, each with why.
    problems: by component, what is wrong with its files or with those beside it that it needs.
    """

    machine: Machine
    edit: Edit
    places: tuple[Place, ...]
    mode: str
    step_seconds: float | None
    rejected: tuple[str, ...]
    problems: Mapping[str, str] = field(default_factory=dict)

    def place(self, role: str) -> Place:
        """Raises CheckpointError for a component that cannot be used, with the file and what is wrong."""
        if role in self.problems:
            raise CheckpointError(self.problems[role])
        return next(place for place in self.places if place.role == role)

    def on(self, device: Device) -> tuple[Place, ...]:
        """What takes from that device's memory."""
        return tuple(place for place in self.places if self.machine.shared(place.device, device))

    def turns(self) -> list[tuple[Place, ...]]:
        """The groups of components that their device does not hold together."""
        groups = (self.on(device) for device in self.machine.memories)
        return [group for group in groups if take_turns(group)]

    @property
    def measured(self) -> bool:
        """Whether step_seconds comes from these cards' own speeds."""
        return all(place.device.measured for place in self.places if place.role == "transformer")

    @property
    def total_seconds(self) -> float | None:
        """Of sampling."""
        return None if self.step_seconds is None else self.step_seconds * self.edit.steps

    @property
    def speed(self) -> str:
        """How long sampling takes, in one line."""
        if self.step_seconds is None or self.total_seconds is None:
            return "time unknown: no speed is known for this card at this precision"
        source = "measured speeds" if self.measured else "projected from assumed speeds"
        minutes = self.total_seconds / 60
        total = f"{minutes:.0f} min" if minutes >= 2 else f"{self.total_seconds:.0f} s"
        return f"about {self.step_seconds:.3g} s a step, {total} for {self.edit.steps} steps ({source})"

    def __str__(self) -> str:
        lines = [place.description for place in self.places]
        lines += [f"problem: {problem}" for problem in self.problems.values()]
        lines += [f"{names(turns)} take turns on {turns[0].device.card}" for turns in self.turns()]
        return "\n".join([*lines, self.speed, *(f"not {alternative}" for alternative in self.rejected)])


def names(places: Sequence[Place]) -> str:
    """As people read a list: "transformer and VAE"."""
    *front, last = (place.name for place in places)
    return f"{', '.join(front)} and {last}" if front else last


def occupied(places: Sequence[Place]) -> int:
    """Peak bytes of components that stay together: they work one after the other."""
    return sum(place.weights for place in places) + max((place.workspace for place in places), default=0)


def take_turns(places: Sequence[Place]) -> bool:
    """Whether components of one memory do not fit it together, so that each makes room for the next."""
    return len(places) > 1 and occupied(places) > min(place.device.usable for place in places)
