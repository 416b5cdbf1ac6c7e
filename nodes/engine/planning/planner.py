"""Which card each component runs on, at which precision, and what that costs: the one engine behind `auto`.

It sees descriptions only (a machine, the headers of a checkpoint, an edit). So it can plan for machines that
are elsewhere, and it gives every loader of a graph the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from ..cards.card import Card
from ..errors import CheckpointError
from ..files.checkpoint import Checkpoint
from ..limits import EXACT, INT8
from ..sampling.layout import CFG
from ..units import GIB
from ..weights.checks import require_beside, require_usable
from ..weights.estimates import Edit, Shape, step_seconds, weight_bytes, workspace_bytes
from ..weights.precision import ROLE_PRECISIONS, Precision, preferences, resolve
from .machine import Device, Machine
from .plan import Placement, Plan, names, take_turns
from .sharing import Sharer, Sharing

ROLES = ("transformer", "text_encoder", "vae")  # in the order they choose a device
READ_RATE = 1e9  # bytes a second that a component is loaded with again: a usual disk's, not measured
TURNS = 2  # what taking turns costs, a reload in each edit, measured against Precision.loss
CLEARLY_FASTER = 0.7  # of the time: less gain is not worth more rounding, or may be the estimate's error

# Whether libraries and kernels let a role's component run at that precision on that card.
Runs = Callable[[str, Precision, Card], bool]


@dataclass(frozen=True)
class Choice:
    """What the user settled for one component; None where it is free. reason: such as "--force-fp32"."""

    device: str | None = None
    precision: str | None = None
    math: str = "auto"
    reason: str = ""


def make_plan(
    machine: Machine,
    checkpoint: Checkpoint,
    edit: Edit = Edit(),  # noqa: B008 - it is frozen
    choices: Mapping[str, Choice] | None = None,
    *,
    runs: Runs = lambda role, precision, card: True,
) -> Plan:
    """Choose a device and a precision for every component, where `choices` leaves them free.

    On each device the precision is the first of `preferences` that fits alone. Among devices, what loses
    least comes first, then what need not share. A component that fits nowhere is placed too, and its
    placement says so (`fits`). Components that are missing or damaged are left out; `problems` says why.
    Raises InputError for a device that this machine does not have.
    """
    planner, choices = _Planner(machine, checkpoint, edit, runs), choices or {}
    placements: list[Placement] = []
    rejected = [f"{device.card}: {device.fault}" for device in machine.gpus if device.fault]
    problems: dict[str, str] = {}
    for role in ROLES:
        try:
            require_usable(role, checkpoint)
            chosen, against = planner.choose(role, choices.get(role, Choice()), placements)
            placements.append(chosen)
            rejected += against
            require_beside(role, checkpoint)
        except CheckpointError as error:  # told to whoever asks for this component
            problems[role] = str(error)
    seconds, sharing = None, None
    if placements and placements[0].role == "transformer":
        seconds = planner.step_seconds(placements[0])
        sharing, against = planner.sharing(placements)
        rejected += against
        if choices.get("transformer", Choice()).device is not None:
            sharing = None  # the user chose one card
        if sharing is not None:
            seconds = sharing.seconds
    return Plan(machine, edit, tuple(placements), seconds, tuple(rejected), problems, sharing)


@dataclass(frozen=True)
class _Planner:
    """What stays the same while the components choose one after the other."""

    machine: Machine
    checkpoint: Checkpoint
    edit: Edit
    runs: Runs
    sizes: dict[tuple[str, Precision], int] = field(default_factory=dict)

    def choose(self, role: str, choice: Choice, others: Sequence[Placement]) -> tuple[Placement, list[str]]:
        """The role's placement beside the others, and what speaks against the alternatives."""
        devices = [self.machine.device(choice.device)] if choice.device else self.machine.automatic
        options = [self._best(role, device, choice) for device in devices]
        chosen = min(options, key=lambda option: self._cost(option, others))
        against = [] if choice.precision or chosen.device.fault else list(self._against(chosen, choice))
        for option in options:
            if option.fits and option.precision.loss < chosen.precision.loss:
                against.append(f"{option}: would take turns with the {names(self._beside(option, others))}")
        return chosen, against

    def sharer(self, transformer: Placement, placements: Sequence[Placement]) -> Sharer:
        """What can share the transformer with the card it was placed on, beside the other components."""

        def reload(device: Device) -> float:
            copy = replace(transformer, device=device)
            beside = self._beside(copy, placements)
            if take_turns(beside) or not take_turns([*beside, copy]):
                return 0.0
            return sum(there.weights for there in beside) / READ_RATE / self.edit.steps

        return Sharer(
            self.checkpoint,
            transformer.precision,
            lambda precision, card: self.runs("transformer", precision, card),
            self.edit,
            self.machine.copy_rate,
            reload,
        )

    def sharing(self, placements: Sequence[Placement]) -> tuple[Sharing | None, list[str]]:
        """How several cards share the transformer, if that is worth it, and the other ways."""
        first = placements[0]
        others = [device for device in self.machine.gpus if device != first.device]
        if not first.device.card.is_gpu or not others or not first.fits:
            return None, []
        sharer, alone = self.sharer(first, placements), self.step_seconds(first)
        against = [
            f"sharing with {device.card}: {reason}" for device in others if (reason := sharer.unlike(device))
        ]
        able = [first.device, *(device for device in others if not sharer.unlike(device))]
        ways = list(sharer.ways(able))
        if len(able) > 1 and not ways:
            against.append(f"sharing: no second card holds the {first.precision.name} transformer")
        chosen = sharer.choose(able) if ways else None
        for way in ways:
            if way.mode != CFG and str(way) != str(chosen):  # two cards do cfg in cfg+sequence too
                times = f"{way.seconds:.3g} s a step" if way.seconds else "time unknown"
                against.append(f"{way}: {times}" + (f" instead of {alone:.3g}" if alone else ""))
        return chosen, against

    def step_seconds(self, transformer: Placement, attention: str = EXACT) -> float | None:
        """Seconds a step takes on its card alone."""
        speeds = transformer.device.speeds
        return step_seconds(speeds, Shape.of(self.checkpoint), self.edit, transformer.precision, attention)

    def _best(self, role: str, device: Device, choice: Choice) -> Placement:
        """The first precision that runs and fits the device alone; failing that, the smallest that runs."""
        wanted = (choice.precision,) if choice.precision else preferences(role, device.card)
        options = [self._option(role, device, name, choice) for name in wanted]
        best = next((option for option in options if option.fits and self._runs(option)), None)
        if best is None:
            best = ([option for option in options if self._runs(option)] or options)[-1]
        return replace(best, reason=self._reason(best, wanted[0], choice))

    def _reason(self, best: Placement, wanted: str, choice: Choice) -> str:
        device = best.device
        if choice.precision:
            return choice.reason
        if device.fault:
            return device.fault
        if not best.fits:
            return f"only {max(device.usable, 0) / GIB:.1f} GiB were free, and nothing smaller runs there"
        if best.precision.name != wanted:
            return f"{wanted} does not fit"
        return choice.reason or ("native bf16" if device.card.native_bf16 else "no native bf16")

    def _option(self, role: str, device: Device, name: str, choice: Choice) -> Placement:
        """The component there at that precision, the VAE in tiles where a whole picture does not fit."""
        precision = resolve(ROLE_PRECISIONS[role][name], device.card, choice.math)
        if (role, precision) not in self.sizes:
            self.sizes[role, precision] = weight_bytes(role, self.checkpoint, precision)
        fused = (role, precision.math) not in device.card.unfused
        needs = partial(workspace_bytes, role, self.checkpoint, precision, self.edit, fused=fused)
        whole = Placement(role, device, precision, self.sizes[role, precision], needs(), fused=fused)
        if whole.fits or role != "vae":
            return whole
        return replace(whole, workspace=needs(tiled=True), tiled=True)

    def _runs(self, option: Placement) -> bool:
        return not option.device.fault and self.runs(option.role, option.precision, option.device.card)

    def _beside(self, option: Placement, others: Sequence[Placement]) -> list[Placement]:
        return [other for other in others if self.machine.shared(other.device, option.device)]

    def _cost(self, option: Placement, others: Sequence[Placement]) -> tuple[float, ...]:
        """What makes one device worse than another, the worst first."""
        beside = self._beside(option, others)
        seconds = self.step_seconds(option) if option.role == "transformer" else None
        return (
            not option.fits,
            option.precision.loss + TURNS * take_turns([*beside, option]),
            any(other.role == "transformer" for other in beside),
            len(beside),
            not option.device.card.native_bf16,
            seconds or float("inf"),
            -option.device.free,
        )

    def _against(self, chosen: Placement, choice: Choice) -> Iterator[str]:
        """Why the better precisions, and faster ones, were not taken on the device."""
        role, card = chosen.role, chosen.device.card
        if role == "transformer" and card.is_gpu and not card.native_bf16:
            yield f"transformer bf16: no native BF16 on {card}"
        for name in preferences(role, card):
            if name == chosen.precision.name:
                break
            option = self._option(role, chosen.device, name, choice)
            needs = f"{option.size} do not fit {option.device.usable / GIB:.1f} GiB"
            yield f"{option}: {'does not run there' if option.fits else needs}"
        if role != "transformer" or not card.is_gpu:
            return
        for row in ROLE_PRECISIONS[role].values():
            option = self._option(role, chosen.device, row.name, choice)
            seconds, usual = self.step_seconds(option), self.step_seconds(chosen)
            rounds_more = row.integer_products and not row.fp16_inside
            if rounds_more and seconds and usual and seconds < CLEARLY_FASTER * usual:
                yield f"{option}: {seconds:.3g} s a step instead of {usual:.3g}, but rounds activations too"
            in_fp32 = option.precision.math == torch.float32
            faster = self.step_seconds(option, INT8) if rounds_more and in_fp32 else None
            if faster and usual and faster < CLEARLY_FASTER * (seconds or usual):
                yield f"{option} with attention int8: {faster:.3g} s a step, but rounds attention too"
