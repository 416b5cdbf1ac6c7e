"""Which cards share a transformer, and how: for FireRed Parallel, and for the loaders' auto."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..cards.card import Card
from ..errors import InputError
from ..files.checkpoint import Checkpoint
from ..sampling.layout import AUTO, BOTH, CFG, LAYERS, SEQUENCE, TURNS, Layout, dealt
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
            replicas = [
                replace(each, spec=replace(each.spec, held=held))
                for each, held in zip(replicas, dealt(self.counts), strict=True)
            ]
        return Layout(self.mode, tuple(replicas))


@dataclass(frozen=True)
class Sharer:
    """What can share a transformer at a precision that is resolved for its first card.

    copy_rate: GB/s between two cards, in one direction; None where it is not known. runs: whether the
    precision's library and kernels run on a card.
    """

    checkpoint: Checkpoint
    precision: Precision
    runs: Callable[[Precision, Card], bool]
    edit: Edit = Edit()  # noqa: RUF009 - it is frozen
    copy_rate: float | None = None

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
        if mode == LAYERS or (mode == AUTO and len(whole) < (len(able) if named else 2)):
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
                split = self._split(mode, count)
                if self._takes(mode, count) and all(self._fits_whole(card, split) for card in cards):
                    yield Sharing(mode, cards, self.seconds(mode, cards))

    def is_worth(self, sharing: Sharing) -> bool:
        """Whether it is clearly faster than its first card, or holds what that one cannot."""
        alone = self._forward(sharing.devices[0])
        known = sharing.mode != LAYERS and alone is not None and sharing.seconds is not None
        return not known or (sharing.seconds or 0.0) <= WORTH * FORWARDS * (alone or 0.0)

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
        if mode == CFG:
            return max(known)
        if mode == LAYERS:
            layers, turns = sum(counts), TURNS * len(devices)
            parts = [seconds * count / layers for seconds, count in zip(known, counts, strict=True)]
            return max(FORWARDS * max(parts), sum(parts) * (turns + 1) / turns)
        split = self._split(mode, len(devices))
        copies = 0.0
        if split > 1:
            if self.copy_rate is None:
                return None
            received = shared_bytes(self.checkpoint, self.precision, self.edit.tokens, split)
            copies = received / (self.copy_rate * 1e9)
        rounds, queued = FORWARDS * split / len(devices), FORWARDS * split * Shape.of(self.checkpoint).layers
        return max(rounds * (max(known) / split + copies), queued * QUEUE_SECONDS)

    def _of_named(self, devices: Sequence[Device], mode: str) -> Sharing:
        if mode == AUTO:
            mode = SEQUENCE if len(devices) % 2 else BOTH
        count = len(devices)
        split = self._split(mode, count)
        for device in devices:
            if not self._fits_whole(device, split):
                raise DoesNotFitError(
                    f"Mode {mode} takes {self._weights() / GIB:.1f} GiB for the transformer "
                    f"{self.precision.name} and {self._working(split) / GIB:.1f} GiB to work with on every "
                    f"card; {device.card} has {device.usable / GIB:.1f} GiB. Choose mode layers, or a "
                    "precision that takes less."
                )
        return Sharing(
            mode, tuple(devices), self.seconds(mode, devices) if self._takes(mode, count) else None
        )

    def _layers(self, devices: Sequence[Device]) -> Sharing:
        """Blocks by free memory. Raises DoesNotFitError."""
        layers, working = Shape.of(self.checkpoint).layers, self._working(1)
        outer = weight_bytes("transformer", self.checkpoint, self.precision, ())
        block = (self._weights() - outer) / layers
        rooms = [max(0, int((device.usable - outer - working) / block)) for device in devices]
        if sum(rooms) < layers:
            raise DoesNotFitError(
                f"Mode layers takes {self._weights() / GIB:.1f} GiB for the transformer "
                f"{self.precision.name}, and {working / GIB:.1f} GiB to work with on every card; the "
                f"{len(devices)} cards have {sum(device.usable for device in devices) / GIB:.1f} GiB in all. "
                "Choose a precision that takes less."
            )
        counts = _shared_out(layers, rooms)
        return Sharing(LAYERS, tuple(devices), self.seconds(LAYERS, devices, counts), counts)

    @staticmethod
    def _takes(mode: str, count: int) -> bool:
        return {CFG: count == 2, SEQUENCE: True, BOTH: count % 2 == 0}[mode]

    @staticmethod
    def _split(mode: str, count: int) -> int:
        """Over how many cards the tokens of a branch are split in a step with guidance."""
        return {CFG: 1, SEQUENCE: count, BOTH: max(count // 2, 1)}[mode]

    def _forward(self, device: Device) -> float | None:
        return forward_seconds(device.speeds, Shape.of(self.checkpoint), self.edit.tokens, self.precision)

    def _weights(self) -> int:
        return weight_bytes("transformer", self.checkpoint, self.precision)

    def _working(self, split: int, fused: bool = True) -> int:
        return transformer_bytes(self.checkpoint, self.precision, self.edit.tokens, fused, split)

    def _fits_whole(self, device: Device, split: int) -> bool:
        fused = ("transformer", self.precision.math) not in device.card.unfused
        return fits(self._weights(), self._working(split, fused), device.usable)


def _shared_out(total: int, rooms: Sequence[int]) -> tuple[int, ...]:
    """`total` things over places in proportion to their rooms, no more than fit into each."""
    counts = [total * room // sum(rooms) for room in rooms]
    for number in sorted(range(len(rooms)), key=lambda number: counts[number] - rooms[number]):
        counts[number] += min(rooms[number] - counts[number], total - sum(counts))
    return tuple(counts)
