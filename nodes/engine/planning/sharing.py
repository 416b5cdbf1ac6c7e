"""Which cards share a transformer, and how: for FireRed Parallel, and for the loaders' auto."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..cards.card import Card
from ..errors import InputError
from ..files.checkpoint import Checkpoint
from ..sampling.layout import AUTO, BOTH, CFG, LAYERS, ROUNDS, SEQUENCE, Layout, dealt, refusal, split
from ..units import GIB
from ..weights.components import Replica
from ..weights.estimates import (
    FORWARDS,
    Edit,
    Shape,
    fits,
    forward_seconds,
    shared_bytes,
    transformer_bytes,
    weight_bytes,
)
from ..weights.precision import Precision
from ..weights.room import DoesNotFitError
from .machine import Device

# One thread queues the work of all cards. This is what it takes for a block on one of them: 2.0 ms with BF16
# weights and 3.4 with int8-fast, measured on a host with four H100s, whose cards are faster than that.
QUEUE_SECONDS = 0.002
WORTH = 0.9  # of the time of one card: what gains less is not chosen, it may be the estimate's error


@dataclass(frozen=True)
class Sharing:
    """Cards that share a transformer. seconds: of a step; None where speeds are not known.

    counts: for `layers`, how many blocks each card holds. The first card leads.
    """

    mode: str
    devices: tuple[Device, ...]
    seconds: float | None = None
    counts: tuple[int, ...] = ()

    def __str__(self) -> str:
        *front, last = (device.card.label for device in self.devices)
        return f"{self.mode} over {', '.join(front)} and {last}"

    def layout(self, replica: Replica) -> Layout:
        """The layout of this transformer's runs."""
        replicas = [replace(replica, card=device.card) for device in self.devices]
        if self.mode == LAYERS:
            hands = zip(replicas, dealt(self.counts), strict=True)
            replicas = [replica.holding(held) for replica, held in hands]
        return Layout(self.mode, tuple(replicas))


@dataclass(frozen=True)
class Sharer:
    """What can share a transformer at a precision that is resolved for its first card.

    copy_rate: GB/s between two cards, in one direction; None where it is not known. runs: whether the
    precision's library and kernels run on a card. reload: seconds of each step that a copy on a card costs,
    because what else is there has to be loaded again in each edit.
    """

    checkpoint: Checkpoint
    precision: Precision
    runs: Callable[[Precision, Card], bool]
    edit: Edit = Edit()  # noqa: RUF009 - it is frozen
    copy_rate: float | None = None
    reload: Callable[[Device], float] = lambda device: 0.0

    def choose(self, devices: Sequence[Device], mode: str = AUTO, named: bool = False) -> Sharing | None:
        """How these cards share it, the first one leading; None where fewer than two can.

        named: whether the user named the cards: then all of them take part. Otherwise those that can and that
        make it faster do. Raises InputError and DoesNotFitError.
        """
        able = []
        for device in devices:
            reason = self.unlike(device)
            if reason and named:
                raise InputError(f"{device.card} cannot take part: {reason}.")
            if not reason:
                able.append(device)
        if len(able) < 2:
            return None
        whole = [device for device in able if self._fits_whole(device, 1)]
        if mode == LAYERS or (mode == AUTO and (whole != able if named else not whole)):
            return self._layers(able)
        if named:
            return self._of_named(able, mode)
        found = [each for each in self.ways(able) if mode in (AUTO, each.mode)]
        timed = [each for each in found if each.seconds is not None]
        if not timed:  # this machine was not measured
            return max(found, key=lambda each: len(each.devices), default=None)
        best = min(timed, key=lambda each: each.seconds or 0.0)
        return best if mode != AUTO or self.is_worth(best) else None

    def ways(self, devices: Sequence[Device]) -> Iterator[Sharing]:
        """Every way in which the first of these cards and some of the others share whole copies."""
        lead, *others = devices
        kinds = {device.card.name: self._forward(device) or 0.0 for device in reversed(devices)}
        others.sort(key=lambda device: kinds[device.card.name])  # equal cards stay in their order
        for count in range(2, len(devices) + 1):
            cards = (lead, *others[: count - 1])
            for mode in (BOTH, CFG, SEQUENCE):
                parts = split(mode, count, FORWARDS)
                taken = not refusal(mode, count, self.precision.math)
                if taken and all(self._fits_whole(card, parts) for card in cards):
                    yield Sharing(mode, cards, self.seconds(mode, cards))

    def is_worth(self, sharing: Sharing) -> bool:
        """Whether it is clearly faster than its first card alone, or one of the times is not known."""
        alone = self._forward(sharing.devices[0])
        if alone is None or sharing.seconds is None:
            return True
        return sharing.seconds <= WORTH * FORWARDS * alone

    def unlike(self, device: Device) -> str:
        """Why a card cannot compute what the first one does; empty where it can."""
        card = device.card
        if device.fault:
            return device.fault.rstrip(".")
        if self.precision.math is torch.bfloat16 and not card.native_bf16:
            return "it has no native BF16. Set math of FireRed Load Transformer to fp32"
        if not self.runs(self.precision, card):
            return f"{self.precision.name} does not run there"
        return ""

    def seconds(self, mode: str, devices: Sequence[Device], counts: Sequence[int] = ()) -> float | None:
        """Seconds of a step with guidance; None where speeds are not known."""
        forwards = [self._forward(device) for device in devices]
        known = [seconds for seconds in forwards if seconds is not None]
        if len(known) < len(forwards):
            return None
        reloads = sum(map(self.reload, devices[1:]))
        if mode == LAYERS:
            layers, rounds = sum(counts), ROUNDS * len(devices)
            held = [seconds * count / layers for seconds, count in zip(known, counts, strict=True)]
            return reloads + max(FORWARDS * max(held), sum(held) * (rounds + 1) / rounds)
        parts = split(mode, len(devices), FORWARDS)
        copies = 0.0
        if parts > 1:
            if self.copy_rate is None:
                return None
            received = shared_bytes(self.checkpoint, self.precision, self.edit.tokens, parts)
            copies = received / (self.copy_rate * 1e9)
        in_turn = FORWARDS * parts / len(devices)  # forwards that a card takes part in, one after the other
        queued = FORWARDS * parts * self._shape.layers * QUEUE_SECONDS
        return reloads + max(in_turn * (max(known) / parts + copies), queued)

    def _of_named(self, devices: Sequence[Device], mode: str) -> Sharing:
        count, math = len(devices), self.precision.math
        if mode == AUTO:
            mode = next((each for each in (BOTH, CFG, SEQUENCE) if not refusal(each, count, math)), SEQUENCE)
        if reason := refusal(mode, count, math):
            raise InputError(reason)
        parts = split(mode, count, FORWARDS)
        for device in devices:
            if not self._fits_whole(device, parts):
                raise DoesNotFitError(
                    f"Mode {mode} takes {self._weights / GIB:.1f} GiB for the transformer "
                    f"{self.precision.name} and {self._working(device, parts) / GIB:.1f} GiB to work with; "
                    f"{device.card} has {device.usable / GIB:.1f} GiB. Choose mode layers, or a precision "
                    "that takes less."
                )
        return Sharing(mode, tuple(devices), self.seconds(mode, devices))

    def _layers(self, devices: Sequence[Device]) -> Sharing | None:
        """Blocks by free memory; None where one card has room for nearly all. Raises DoesNotFitError."""
        layers = self._shape.layers
        outer = weight_bytes("transformer", self.checkpoint, self.precision, ())
        block = (self._weights - outer) / layers
        rooms = {
            device: int((device.usable - outer - self._working(device, 1)) / block) for device in devices
        }
        rooms = {device: room for device, room in rooms.items() if room > 0}
        if sum(rooms.values()) < layers:
            raise DoesNotFitError(
                f"Mode layers takes {self._weights / GIB:.1f} GiB for the transformer "
                f"{self.precision.name}, and {self._working(devices[0], 1) / GIB:.1f} GiB to work with on "
                f"each card; the {len(devices)} cards have {sum(each.usable for each in devices) / GIB:.1f} "
                "GiB in all. Choose a precision that takes less."
            )
        counts = dict(zip(rooms, _shared_out(layers, list(rooms.values())), strict=True))
        used = tuple(device for device, count in counts.items() if count)
        held = tuple(counts[device] for device in used)
        return Sharing(LAYERS, used, self.seconds(LAYERS, used, held), held) if len(used) > 1 else None

    def _forward(self, device: Device) -> float | None:
        return forward_seconds(device.speeds, self._shape, self.edit.tokens, self.precision)

    @functools.cached_property
    def _shape(self) -> Shape:
        return Shape.of(self.checkpoint)

    @functools.cached_property
    def _weights(self) -> int:
        return weight_bytes("transformer", self.checkpoint, self.precision)

    def _working(self, device: Device, parts: int) -> int:
        """Bytes to work with on that card, where tokens are split into so many parts."""
        fused = ("transformer", self.precision.math) not in device.card.unfused
        return transformer_bytes(self.checkpoint, self.precision, self.edit.tokens, fused, parts)

    def _fits_whole(self, device: Device, parts: int) -> bool:
        return fits(self._weights, self._working(device, parts), device.usable)


def _shared_out(total: int, rooms: Sequence[int]) -> tuple[int, ...]:
    """`total` things over places in proportion to their rooms, no more than fit into each."""
    edges = [int(total * sum(rooms[:number]) / sum(rooms) + 0.5) for number in range(len(rooms) + 1)]
    return tuple(after - before for before, after in itertools.pairwise(edges))
