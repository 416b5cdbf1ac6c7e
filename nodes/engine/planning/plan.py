"""What goes where, as the log, the picture and the loaders read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..errors import CheckpointError
from ..units import GIB
from ..weights.estimates import FORWARDS, Edit, fits
from ..weights.precision import Precision
from .machine import Device, Machine
from .sharing import Sharing

LIGHTNING_STEPS = 8  # of the vendor's distilled LoRAs


@dataclass(frozen=True)
class Placement:
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
        """Whether the device holds it when nothing else is there."""
        return fits(self.weights, self.workspace, self.device.usable)


@dataclass(frozen=True)
class Plan:
    """Where everything goes.

    step_seconds: None where a card's speeds are not known. rejected: what was not chosen, each with why.
    problems: by component, what is wrong with its files or with those beside it that it needs. sharing: the
    cards that share the transformer; step_seconds is theirs. cluster: what a cluster would do, in a line.
    """

    machine: Machine
    edit: Edit
    placements: tuple[Placement, ...]
    step_seconds: float | None
    rejected: tuple[str, ...]
    problems: Mapping[str, str] = field(default_factory=dict)
    sharing: Sharing | None = None
    cluster: str = ""

    @property
    def copies(self) -> tuple[Placement, ...]:
        """The transformer on the other cards that share it."""
        if self.sharing is None:
            return ()
        whole = next(there for there in self.placements if there.role == "transformer")
        return tuple(replace(whole, device=device, reason="a copy") for device in self.sharing.devices[1:])

    def placement(self, role: str) -> Placement:
        """Raises CheckpointError for a component that cannot be used, with the file and what is wrong."""
        if role in self.problems:
            raise CheckpointError(self.problems[role])
        return next(there for there in self.placements if there.role == role)

    def on(self, device: Device) -> tuple[Placement, ...]:
        """What takes from that device's memory."""
        everything = (*self.copies, *self.placements)
        return tuple(there for there in everything if self.machine.shared(there.device, device))

    def turns(self) -> list[tuple[Placement, ...]]:
        """The groups of components that their device does not hold together."""
        groups = (self.on(device) for device in self.machine.memories)
        return [group for group in groups if take_turns(group)]

    @property
    def shared_line(self) -> str:
        """Which cards share the transformer, in one line; empty where one has it alone."""
        return f"the transformer is shared: {self.sharing}" if self.sharing else ""

    @property
    def speed(self) -> str:
        """How long sampling takes, in one line."""
        if self.step_seconds is None:
            return "time unknown: no speed is known for this card at this precision"
        measured = all(there.device.measured for there in self.placements if there.role == "transformer")
        source = "measured speeds" if measured else "projected from assumed speeds"
        total = _duration(self.step_seconds * self.edit.steps)
        return f"about {self.step_seconds:.3g} s a step, {total} for {self.edit.steps} steps ({source})"

    @property
    def shortcuts(self) -> str:
        """How long sampling takes with fewer forwards, in one line; empty where no speed is known."""
        if self.step_seconds is None:
            return ""
        lightning = LIGHTNING_STEPS * self.step_seconds / FORWARDS
        half_guided = 0.75 * self.step_seconds * self.edit.steps
        return (
            f"with a Lightning LoRA ({LIGHTNING_STEPS} steps, cfg 1) {_duration(lightning)}; with guidance "
            f"in half of the steps {_duration(half_guided)}; with FireRed Step Cache at 0.05 about half"
        )

    def __str__(self) -> str:
        lines = [placement.description for placement in self.placements]
        lines += [f"problem: {problem}" for problem in self.problems.values()]
        lines.append(self.shared_line)
        lines += [f"{names(turns)} take turns on {turns[0].device.card}" for turns in self.turns()]
        lines += [
            self.speed,
            self.shortcuts,
            self.cluster,
            *(f"not {alternative}" for alternative in self.rejected),
        ]
        return "\n".join(filter(None, lines))


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def names(placements: Sequence[Placement]) -> str:
    """As people read a list: "transformer and VAE"."""
    *front, last = (placement.name for placement in placements)
    return f"{', '.join(front)} and {last}" if front else last


def peak_bytes(placements: Sequence[Placement]) -> int:
    """Bytes of one memory that its components use at most. They work one after the other."""
    if take_turns(placements):
        return max(there.weights + there.workspace for there in placements)
    return _together(placements)


def take_turns(placements: Sequence[Placement]) -> bool:
    """Whether components of one memory do not fit it together, so that each makes room for the next."""
    usable = min((there.device.usable for there in placements), default=0)
    return len(placements) > 1 and _together(placements) > usable


def _together(placements: Sequence[Placement]) -> int:
    workspaces = (there.workspace for there in placements)
    return sum(there.weights for there in placements) + max(workspaces, default=0)
