"""Which card each component runs on, at which precision, and what that costs: the one engine behind `auto`.

It sees descriptions only (a machine, the headers of a checkpoint, an edit), so that it can plan for machines
that are elsewhere, and gives every loader of a graph the same answer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..cards.card import Card
from ..errors import CheckpointError
from ..files.checkpoint import Checkpoint
from ..units import GIB
from ..weights.checks import require_beside, require_usable
from ..weights.estimates import Edit, Shape, step_seconds, weight_bytes, workspace_bytes
from ..weights.precision import ROLE_PRECISIONS, Precision, preferences, resolve
from .machine import Device, Machine
from .places import Place, Placement, names, take_turns

ROLES = ("transformer", "text_encoder", "vae")  # in the order they choose a device
LOSS = {"bf16": 0, "fp32": 0, "int8": 1, "nf4": 3}  # what storing it so costs the picture, in order
TURNS = 2  # the cost, in the same order, of taking turns on a card: a reload in each edit
CLEARLY_FASTER = 0.8  # of the time, for rounding activations too to be worth it

# Whether libraries and kernels let a role's component run at that precision on that card.
Runs = Callable[[str, Precision, Card], bool]


@dataclass(frozen=True)
class Fixed:
    """What is settled for one component; None where it is free. reason: such as "--force-fp32"."""

    device: str | None = None
    precision: str | None = None
    math: str = "auto"
    reason: str = ""


def place(
    machine: Machine,
    checkpoint: Checkpoint,
    edit: Edit = Edit(),  # noqa: B008 - it is frozen
    fixed: Mapping[str, Fixed] | None = None,
    *,
    runs: Runs = lambda role, precision, card: True,
    modes: Sequence[str] = ("none",),
) -> Placement:
    """Choose a device and a precision for every component, where `fixed` leaves them free.

    On each device the first of `preferences` that fits alone is the precision. Among devices: what loses
    least, then what need not share. A component that fits nowhere still gets a place, which says so (`fits`).
    modes: the ways to spread the transformer that can run here. Components that are missing or damaged are
    left out; `problems` says why.
    Raises InputError for a device this machine has not.
    """
    planner = _Planner(machine, checkpoint, edit, runs)
    places: list[Place] = []
    rejected = [f"{device.card}: {device.fault}" for device in machine.gpus if device.fault]
    problems: dict[str, str] = {}
    for role in ROLES:
        try:
            require_usable(role, checkpoint)
            chosen, against = planner.choose(role, (fixed or {}).get(role, Fixed()), places)
        except CheckpointError as error:  # whoever asks for this one is told; the others can do without
            problems[role] = str(error)
            continue
        places.append(chosen)
        rejected += against
        try:
            require_beside(role, checkpoint)
        except CheckpointError as error:
            problems[role] = str(error)
    if not places or places[0].role != "transformer":
        return Placement(machine, edit, tuple(places), "none", None, tuple(rejected), problems)
    wish = (fixed or {}).get("transformer", Fixed())
    replica, against = planner.replica(places, wish, available="cfg" in modes)
    transformers = [places[0], *([replica] if replica else [])]
    return Placement(
        machine,
        edit,
        (*places, *transformers[1:]),
        "cfg" if replica else "none",
        planner.step_seconds(transformers),
        (*rejected, *against),
        problems,
    )


@dataclass(frozen=True)
class _Planner:
    """What does not change while the components choose one after the other."""

    machine: Machine
    checkpoint: Checkpoint
    edit: Edit
    runs: Runs
    sizes: dict[tuple[str, Precision], int] = field(default_factory=dict)

    def choose(self, role: str, wish: Fixed, others: Sequence[Place]) -> tuple[Place, list[str]]:
        """The role's place beside the others', and what speaks against the alternatives."""
        devices = [self.machine.device(wish.device)] if wish.device else self.machine.automatic
        options = [self._best(role, device, wish) for device in devices]
        chosen = min(options, key=lambda option: self._cost(option, others))
        against = [] if wish.precision or chosen.device.fault else list(self._against(chosen, wish))
        for option in options:
            if option.fits and LOSS.get(option.precision.name, 0) < LOSS.get(chosen.precision.name, 0):
                others_there = names(self._beside(option, others))
                against.append(f"{option}: would take turns with the {others_there}")
        return chosen, against

    def replica(
        self, places: Sequence[Place], wish: Fixed, available: bool
    ) -> tuple[Place | None, list[str]]:
        """A second place for the transformer, for the two halves of true CFG, or why there is none."""
        first = places[0]
        wish = replace(wish, precision=first.precision.name, reason="the other half of true CFG")
        others = [device for device in self.machine.gpus if device != first.device]
        if not self.edit.guided or not first.device.card.is_gpu or not others:
            return None, []
        options = [self._best("transformer", device, wish) for device in others]
        # Halves computed in different arithmetic would differ by its rounding, which guidance multiplies.
        alike = [option for option in options if option.fits and option.precision == first.precision]
        if not alike:
            return None, [f"cfg: no second card holds the {first.precision.name} transformer"]
        second = min(alike, key=lambda option: self._cost(option, places))
        alone, both = self.step_seconds([first]), self.step_seconds([first, second])
        cards = f"cfg over {first.device.card.label} and {second.device.card.label}"
        times = f"{both:.3g} s a step instead of {alone:.3g}" if alone and both else "about half the time"
        if alone and both and both >= alone:
            return None, [f"{cards}: {times}"]
        return (second, []) if available else (None, [f"{cards}: {times}, but not available yet"])

    def step_seconds(self, transformers: Sequence[Place]) -> float | None:
        """Seconds a step takes, one forward on each of two places."""
        speeds = [place.device.speeds for place in transformers]
        known = tuple(card for card in speeds if card is not None)
        if len(known) < len(speeds):
            return None
        layout = "cfg" if len(known) > 1 else "none"
        return step_seconds(known, Shape.of(self.checkpoint), self.edit, transformers[0].precision, layout)

    def _best(self, role: str, device: Device, wish: Fixed) -> Place:
        """The first precision that runs and fits the device alone; failing that, the smallest that runs."""
        wanted = (wish.precision,) if wish.precision else preferences(role, device.card)
        options = [self._option(role, device, name, wish) for name in wanted]
        best = next((option for option in options if option.fits and self._runs(option)), None)
        if best is None:
            best = ([option for option in options if self._runs(option)] or options)[-1]
        if wish.precision:
            return replace(best, reason=wish.reason)
        if device.fault:
            return replace(best, reason=device.fault)
        if not best.fits:
            room = max(device.usable, 0) / GIB
            return replace(best, reason=f"only {room:.1f} GiB were free, and nothing smaller runs there")
        if best.precision.name != wanted[0]:
            return replace(best, reason=f"{wanted[0]} does not fit")
        native = "native bf16" if device.card.native_bf16 else "no native bf16"
        return replace(best, reason=wish.reason or native)

    def _option(self, role: str, device: Device, name: str, wish: Fixed) -> Place:
        """The component there at that precision, the VAE in tiles where a whole picture does not fit."""
        precision = resolve(ROLE_PRECISIONS[role][name], device.card, wish.math)
        if (role, precision) not in self.sizes:
            self.sizes[role, precision] = weight_bytes(role, self.checkpoint, precision)
        assert precision.compute is not None
        fused = (role, precision.compute) not in device.card.unfused
        needs = functools.partial(workspace_bytes, role, self.checkpoint, precision, self.edit)
        workspace = needs(fused=fused)
        whole = Place(role, device, precision, self.sizes[role, precision], workspace, fused=fused)
        if whole.fits or role != "vae":
            return whole
        return replace(whole, workspace=needs(tiled=True, fused=fused), tiled=True)

    def _runs(self, option: Place) -> bool:
        return not option.device.fault and self.runs(option.role, option.precision, option.device.card)

    def _beside(self, option: Place, others: Sequence[Place]) -> list[Place]:
        return [other for other in others if self.machine.shared(other.device, option.device)]

    def _cost(self, option: Place, others: Sequence[Place]) -> tuple[float, ...]:
        """What makes one device worse than another, the worst first."""
        beside, card = self._beside(option, others), option.device.card
        seconds = self.step_seconds([option]) if option.role == "transformer" else None
        return (
            not option.fits,
            option.device.free <= 0,
            max(LOSS.get(option.precision.name, 0), TURNS * take_turns([*beside, option])),
            LOSS.get(option.precision.name, 0),
            any(other.role == "transformer" for other in beside),
            len(beside),
            not card.native_bf16,
            seconds or float("inf"),
            -option.device.free,
        )

    def _against(self, chosen: Place, wish: Fixed) -> Iterator[str]:
        """Why the better precisions, and the faster one, were not taken on the device."""
        card = chosen.device.card
        if chosen.role == "transformer" and card.is_gpu and not card.native_bf16:
            yield f"transformer bf16: no native BF16 on {card}"
        for name in preferences(chosen.role, card):
            if name == chosen.precision.name:
                break
            option = self._option(chosen.role, chosen.device, name, wish)
            needs = f"{option.size} do not fit {option.device.usable / GIB:.1f} GiB"
            yield f"{option}: {'does not run there' if option.fits else needs}"
        if chosen.role == "transformer" and chosen.precision.name != "int8-fast" and card.is_gpu:
            quick = self._option(chosen.role, chosen.device, "int8-fast", wish)
            seconds, usual = self.step_seconds([quick]), self.step_seconds([chosen])
            if seconds and usual and seconds < CLEARLY_FASTER * usual:
                yield f"{quick}: {seconds:.3g} s a step instead of {usual:.3g}, but rounds activations too"
