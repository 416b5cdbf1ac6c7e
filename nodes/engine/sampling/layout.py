"""How several cards share one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..errors import InputError
from ..limits import Choice
from ..weights.components import Replica

AUTO, CFG, SEQUENCE, BOTH, LAYERS = MODES = ("auto", "cfg", "sequence", "cfg+sequence", "layers")
PICTURES = "pictures"  # of a cluster: a picture each
MODE = Choice("mode", (*MODES, PICTURES))
T = TypeVar("T")
ROUNDS = 6  # in which blocks are dealt to cards


def refusal(mode: str, cards: int, math: torch.dtype) -> str:
    """Why so many cards cannot share a transformer of that arithmetic in this mode; empty where they can."""
    if mode == CFG and cards != 2:
        return f"Mode cfg takes two cards, one for each branch of guidance, not {cards}."
    if mode == BOTH and cards % 2:
        return f"Mode cfg+sequence takes an even number of cards, not {cards}."
    if math is torch.float16 and mode != CFG:
        return f"Mode {mode} takes no fp16 arithmetic, which overflows. Choose int8."
    return ""


def split(mode: str, cards: int, branches: int) -> int:
    """Over how many cards the tokens of a branch are split, in a step that computes so many branches."""
    if mode in (CFG, LAYERS):
        return 1
    return cards // branches if mode == BOTH and cards % branches == 0 else cards


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
        first = self.replicas[0]
        if reason := refusal(self.mode, len(self.replicas), first.spec.math):
            raise InputError(reason)
        for other in self.replicas[1:]:
            if other.spec.precision != first.spec.precision:
                raise InputError(
                    f"{other} and {first} compute differently, so they cannot share an image. Set math of "
                    "FireRed Load Transformer to fp32, or name cards of one kind."
                )

    def groups(self, branches: Sequence[str], cards: Sequence[T]) -> list[tuple[str, Sequence[T]]]:
        """The cards that compute each branch of a step. Branches with the same cards come one after another.

        cards: those that still work, the first one leading.
        """
        if self.mode == LAYERS:
            return [(branch, cards) for branch in branches]
        each = split(self.mode, len(cards), len(branches))
        starts = (number * each % len(cards) for number in range(len(branches)))
        return [(branch, cards[start : start + each]) for branch, start in zip(branches, starts, strict=True)]

    def used(self, guided: bool) -> Layout | None:
        """The layout of a run with or without guidance; None where one card does all."""
        return self if self.mode != CFG or guided else None

    def sharing(self, guided: Sequence[bool]) -> list[int]:
        """Over how many cards the tokens of a branch are split, in the kinds of steps that a run has.

        guided: for each step, whether it computes the negative branch too.
        """
        kinds = {2 if both else 1 for both in guided}
        return sorted({split(self.mode, len(self.replicas), branches) for branches in kinds})

    def identity(self, guided: Sequence[bool]) -> list[object]:
        """What a run's bits depend on; nothing where equal cards compute whole branches, as one would."""
        cards = [(replica.card.name, replica.spec.held) for replica in self.replicas]
        alike = len({name for name, _ in cards}) == 1 and self.sharing(guided) == [1]
        return [] if alike else [self.mode, *cards]


def dealt(counts: Sequence[int]) -> list[tuple[int, ...]]:
    """The blocks of each card for `layers`. counts: how many each gets, of all there are.

    They are dealt in ROUNDS. While one branch is on one card, the other branch is on the next one: with a
    single round, two cards would be idle a third of the time.
    """
    hands: list[list[int]] = [[] for _ in counts]
    number = 0
    for turn in range(ROUNDS):
        for hand, count in zip(hands, counts, strict=True):
            taken = count * (turn + 1) // ROUNDS - count * turn // ROUNDS
            hand += range(number, number + taken)
            number += taken
    return [tuple(hand) for hand in hands]
