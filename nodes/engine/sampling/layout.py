"""How several cards share one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..errors import InputError
from ..limits import Choice
from ..weights.components import Replica
from .conditioning import NEGATIVE, POSITIVE

AUTO, CFG, SEQUENCE, BOTH, LAYERS = MODES = ("auto", "cfg", "sequence", "cfg+sequence", "layers")
MODE = Choice("mode", MODES)
T = TypeVar("T")
TURNS = 6  # in which blocks are dealt to cards


@dataclass(frozen=True)
class Layout:
    """The cards of a run, and what each computes.

    mode: `cfg`: a branch of guidance each. `sequence`: a part of the tokens each. `cfg+sequence`: half of the
    cards a branch, and a part of its tokens each; all of them a part where a step has one branch. `layers`: a
    part of the blocks each. replicas: the transformer on each card; the first one leads. Raises InputError
    for cards that cannot share a run in this mode.
    """

    mode: str
    replicas: tuple[Replica, ...]

    def __post_init__(self) -> None:
        count = len(self.replicas)
        if self.mode == CFG and count != 2:
            raise InputError(f"Mode cfg takes two cards, one for each branch of guidance, not {count}.")
        if self.mode == BOTH and count % 2:
            raise InputError(f"Mode cfg+sequence takes an even number of cards, not {count}.")
        first = self.replicas[0]
        for other in self.replicas[1:]:
            if other.spec.precision != first.spec.precision:
                raise InputError(
                    f"{other} and {first} compute differently, so they cannot share an image. Set math of "
                    "FireRed Load Transformer to fp32, or name cards of one kind."
                )
        if first.spec.math is torch.float16 and self.mode in (SEQUENCE, BOTH):
            raise InputError(f"Mode {self.mode} takes no fp16 arithmetic, which overflows. Choose int8.")

    def groups(self, branches: Sequence[str], cards: Sequence[T]) -> list[tuple[str, Sequence[T]]]:
        """The cards that compute each branch of a step. Branches with the same cards come one after another.

        cards: those that still work, the first one leading.
        """
        if self.mode in (SEQUENCE, LAYERS):
            return [(branch, cards) for branch in branches]
        if self.mode == CFG:
            return [(branch, [cards[number % len(cards)]]) for number, branch in enumerate(branches)]
        if len(cards) % len(branches):
            return [(branch, cards) for branch in branches]
        each = len(cards) // len(branches)
        return [(branch, cards[number * each :][:each]) for number, branch in enumerate(branches)]

    def sharing(self, guided: Sequence[bool]) -> list[int]:
        """Over how many cards the tokens of a branch are split, in the kinds of steps that a run has."""
        if self.mode == LAYERS:
            return [1]
        kinds = [(POSITIVE, NEGATIVE) if with_negative else (POSITIVE,) for with_negative in set(guided)]
        sizes = (len(cards) for kind in kinds for _, cards in self.groups(kind, self.replicas))
        return sorted(set(sizes))

    def identity(self, guided: Sequence[bool]) -> list[object]:
        """What a run's bits depend on; nothing where equal cards compute whole branches, as one would."""
        names = [replica.card.name for replica in self.replicas]
        alike = len(set(names)) == 1 and self.sharing(guided) == [1]
        return [] if alike else [self.mode, *names]


def dealt(counts: Sequence[int]) -> list[tuple[int, ...]]:
    """The blocks of each card for `layers`. counts: how many each gets, of all there are.

    They are dealt in TURNS. While one branch is on one card, the other branch is on the next one: with a
    single turn, a card would be idle a quarter of the time.
    """
    hands: list[list[int]] = [[] for _ in counts]
    number = 0
    for turn in range(TURNS):
        for hand, count in zip(hands, counts, strict=True):
            taken = count * (turn + 1) // TURNS - count * turn // TURNS
            hand += range(number, number + taken)
            number += taken
    return [tuple(hand) for hand in hands]
