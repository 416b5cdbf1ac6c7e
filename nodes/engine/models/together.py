"""Forwards of a transformer that use several cards at once.

One thread queues the work of all cards, a block on each in turn. A card computes what was queued while the
next card gets its work, so the cards run at the same time. Threads, one for each card, would wait for each
other in Python's interpreter: with BF16 arithmetic, that cost more than the second card gained.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ..cards.kernels import on_card
from ..cards.transfer import Arrival, start_exchange, start_moving
from .modulation import StepModulation
from .transformer import Attend, Attending, Block, QwenImageTransformer, Rotary, attend


@dataclass
class Lane:
    """What one card computes of a forward. The tensors are on that card; see QwenImageTransformer.forward.

    model: may have only some of the blocks. image, text: may be a part of the tokens; `targets` counts those
    of the part. mask: of all tokens to attend to, in the order of the lanes.
    """

    model: QwenImageTransformer
    device: torch.device
    image: torch.Tensor
    text: torch.Tensor
    modulation: StepModulation
    rotary: Rotary
    targets: int
    mask: torch.Tensor | None
    attend: Attend = attend

    def predict(self) -> torch.Tensor:
        """The velocity, by this lane alone."""
        with self.here():
            return self.model(
                self.image, self.text, self.modulation, self.rotary, self.targets, self.mask, self.attend
            )

    def here(self) -> AbstractContextManager[None]:
        """See on_card."""
        return on_card(self.device)


class Forward(Protocol):
    """A forward that goes on block by block. parts: the velocity, in the order of the tokens, at its end."""

    parts: list[torch.Tensor]

    @property
    def devices(self) -> set[torch.device]:
        """The cards of the next block."""
        ...

    def advance(self) -> bool:
        """Queue the next block. Returns whether it was the last."""
        ...


def run_together(forwards: Sequence[Forward]) -> None:
    """Do all of them, a block of each in turn. One whose cards are taken waits for those before it."""
    running = list(forwards)
    while running:
        busy: set[torch.device] = set()
        for forward in list(running):
            devices = forward.devices
            if busy.isdisjoint(devices):
                busy |= devices
                if forward.advance():
                    running.remove(forward)


class SplitForward:
    """A forward whose tokens are split over lanes, each with all blocks on a card of its own.

    In each block every lane gets the keys and values of all, while it computes its queries.
    """

    def __init__(self, lanes: Sequence[Lane]):
        self.lanes = [replace(lane) for lane in lanes]
        self._number = 0
        self.parts: list[torch.Tensor] = []

    @property
    def devices(self) -> set[torch.device]:
        return {lane.device for lane in self.lanes}

    def advance(self) -> bool:
        if self._number == 0:
            for lane in self.lanes:
                with lane.here():
                    lane.image, lane.text = lane.model.enter(lane.image, lane.text)
        if len(self.lanes) == 1:
            with self.lanes[0].here():
                _run_block(self.lanes[0], self._number)
        else:
            self._run_shared_block()
        self._number += 1
        if self._number < self.lanes[0].model.config.layers:
            return False
        for lane in self.lanes:
            with lane.here():
                self.parts.append(lane.model.leave(lane.image, lane.modulation, lane.targets))
        return True

    def _run_shared_block(self) -> None:
        begun = []
        for lane in self.lanes:
            with lane.here():
                begun.append(
                    _block(lane, self._number).begin(
                        lane.image, lane.text, _modulation(lane, self._number), lane.targets, lane.rotary
                    )
                )
        gathered = self._gathered(begun)
        del begun
        for lane in self.lanes:
            with lane.here():
                self._attend(lane, *gathered.pop(0))
                lane.image, lane.text = _block(lane, self._number).feed_forward(
                    lane.image, lane.text, _modulation(lane, self._number), lane.targets
                )

    def _gathered(self, begun: Sequence[Attending]) -> list[tuple[Attending, Arrival]]:
        """Each lane's own streams with the keys and values of all lanes, and when these are there."""
        sizes = [each.key.shape[1] for each in begun]
        whole, parts = [], []
        for lane, own in zip(self.lanes, begun, strict=True):
            with lane.here():
                shape = (1, sum(sizes), *own.key.shape[2:])
                key, value = own.key.new_empty(shape), own.value.new_empty(shape)
            whole.append(own._replace(key=key, value=value))
            parts.append(list(zip(key.split(sizes, dim=1), value.split(sizes, dim=1), strict=True)))
        arrivals = start_exchange([(each.key, each.value) for each in begun], parts)
        return list(zip(whole, arrivals, strict=True))

    def _attend(self, lane: Lane, own: Attending, wait: Arrival) -> None:
        def attend_when_there(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
        ) -> torch.Tensor:
            wait()
            return lane.attend(query, key, value, mask)

        lane.image, lane.text = _block(lane, self._number).attention(
            lane.image, lane.text, own, _modulation(lane, self._number), lane.targets, lane.rotary,
            lane.mask, attend_when_there,
        )  # fmt: skip


class LayeredForward:
    """A forward whose blocks are on several cards: the tokens go from lane to lane.

    lanes: of all tokens, each with the blocks that its card holds.
    """

    def __init__(self, lanes: Sequence[Lane]):
        self.lanes = [replace(lane) for lane in lanes]
        self._owners = {int(number): lane for lane in self.lanes for number in lane.model.transformer_blocks}
        self._number = 0
        self._arrived: Arrival = lambda: None
        self.parts: list[torch.Tensor] = []

    @property
    def devices(self) -> set[torch.device]:
        return {self._owners[self._number].device}

    def advance(self) -> bool:
        lane = self._owners[self._number]
        with lane.here():
            if self._number == 0:
                lane.image, lane.text = lane.model.enter(lane.image, lane.text)
            self._arrived()
            _run_block(lane, self._number)
            self._number += 1
            if self._number == lane.model.config.layers:
                self.parts = [lane.model.leave(lane.image, lane.modulation, lane.targets)]
                return True
            following = self._owners[self._number]
            if following is not lane:  # before anything else is queued on this card
                moved, self._arrived = start_moving([lane.image, lane.text], following.device)
                following.image, following.text = moved
                lane.image = lane.text = lane.image.new_empty(0)
        return False


def _block(lane: Lane, number: int) -> Block:
    return lane.model.block(number)


def _modulation(lane: Lane, number: int) -> torch.Tensor:
    return lane.modulation.blocks[:, number]


def _run_block(lane: Lane, number: int) -> None:
    """Replace the lane's tokens by those after a block."""
    lane.image, lane.text = _block(lane, number)(
        lane.image, lane.text, _modulation(lane, number), lane.targets, lane.rotary, lane.mask, lane.attend
    )
