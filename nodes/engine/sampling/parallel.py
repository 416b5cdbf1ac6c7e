"""A worker that computes each step on several cards."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Sequence

import torch

from ..arithmetic import exact_fp32
from ..cards.kernels import CardError, is_out_of_memory, on_card
from ..cards.transfer import copy_to
from ..errors import first_line
from ..models.together import Forward, LayeredForward, SplitForward, run_together
from ..models.trace import Culprit, find_culprit
from .layout import LAYERS, Layout
from .workers import WHOLE, LocalWorker, Part

log = logging.getLogger("FireRed")


class ParallelWorker:
    """A transformer on several cards of this process, which share each step as the layout says.

    A card that fails is left out: the others compute the step again, and the rest of the run.
    """

    def __init__(self, cards: Sequence[LocalWorker], layout: Layout):
        """cards: a worker for each of the layout's replicas."""
        self._cards, self._layout = list(cards), layout

    @torch.inference_mode()
    @exact_fp32()
    def predict(self, latents: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        """As Worker.predict, on the device of the latents. Raises NonFiniteError that names the bad branch.

        Raises torch's error when the last card fails, for `layers` when any does, and when the one that holds
        the latents fails for another reason than its memory.
        """
        while True:
            try:
                return self._predict(latents, step)
            except CardError as error:
                self._leave_out(error, step, latents.device)

    def _predict(self, latents: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        groups = dict(self._layout.groups(self._cards[0].branches(step), self._cards))
        with contextlib.ExitStack() as contexts:
            peaks = {}
            for card in self._cards:
                contexts.enter_context(card.adapters.attached(card.model))
                peaks[card] = contexts.enter_context(card.guard.watch_clipping(card.model))
            forwards = {name: self._forward(name, latents, step, cards) for name, cards in groups.items()}
            run_together(list(forwards.values()))
            return {
                name: self._checked(forward, groups[name], name, latents, step, peaks[groups[name][0]])
                for name, forward in forwards.items()
            }

    def _forward(self, name: str, latents: torch.Tensor, step: int, cards: Sequence[LocalWorker]) -> Forward:
        """The forward of a branch on these cards."""
        layered, lanes = self._layout.mode == LAYERS, []
        for number, card in enumerate(cards):
            with on_card(card.replica.device):
                part = WHOLE if layered else Part(number, len(cards))
                lanes.append(card.lane(name, latents, step, part))
        return LayeredForward(lanes) if layered else SplitForward(lanes)

    def _checked(
        self,
        forward: Forward,
        cards: Sequence[LocalWorker],
        name: str,
        latents: torch.Tensor,
        step: int,
        peaks: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """The whole velocity on the device of the latents, checked by the guard."""
        parts = []
        for part in forward.parts:
            with on_card(part.device):
                parts.append(copy_to(part, latents.device))
        trace = functools.partial(self._trace, cards, name, latents, step)
        return cards[0].guard.check(torch.cat(parts, dim=1), cards[0].title(name, step), trace, peaks)

    def _trace(
        self, cards: Sequence[LocalWorker], name: str, latents: torch.Tensor, step: int
    ) -> Culprit | None:
        """The module that broke, with its card: found by a repeat of the branch on the same cards."""
        models = {card.replica.card.label: card.model for card in cards}
        forward = self._forward(name, latents, step, cards)
        return find_culprit(torch.nn.ModuleDict(models), functools.partial(run_together, [forward]))

    def _leave_out(self, error: CardError, step: int, holder: torch.device) -> None:
        """Go on without the card that failed. Raises torch's error where that is not possible."""
        failed = next(card for card in self._cards if card.replica.device == error.device)
        cause, label = error.__cause__, failed.replica.card
        assert isinstance(cause, RuntimeError)
        full = is_out_of_memory(cause)
        what = "ran out of memory" if full else f"failed ({first_line(cause)})"
        lost = failed.replica.device == holder and not full
        if self._layout.mode == LAYERS or len(self._cards) == 1 or lost:
            log.error("%s %s at step %d", label, what, step + 1)
            raise cause
        self._cards.remove(failed)
        log.error(
            "%s %s at step %d: this step is done again, and the run goes on without it (%d left)",
            label, what, step + 1, len(self._cards),
        )  # fmt: skip
