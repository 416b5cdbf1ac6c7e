"""Decide which cards, of this machine or of a cluster, share a transformer's runs, and how."""

from __future__ import annotations

import logging
import re

from ..engine.errors import InputError
from ..engine.limits import require_text, shown
from ..engine.planning.sharing import Sharer, Sharing
from ..engine.sampling.layout import AUTO, MODE
from ..engine.weights.precision import runs_on
from . import cluster
from .cluster import cluster_use
from .devices import machine
from .memory import Handle

log = logging.getLogger("FireRed")

LABEL = re.compile(rf"gpu:\d+|{cluster.LABEL.pattern}")


def share(handle: Handle, devices: str, mode: str) -> Handle:
    """The transformer on the named cards, or on those that help. Loads nothing.

    devices: `auto`, labels with commas between them, or `ray`. mode: one of layout.MODE. Cards that this
    machine lacks are left out with a log line; where one is left, the handle is returned as it is. Raises
    InputError, DoesNotFitError, and FireRedError where Ray is not installed.
    """
    wanted = _labels(devices)
    if (use := cluster_use(wanted, mode)) is not None:
        log.info("the transformer goes to a Ray cluster: %s", use.card.name)
        return handle.on_cluster(use)
    handle = handle.off_cluster()
    mode, here, lead = MODE.require(mode), machine(), handle.replica.card
    if wanted is None and not lead.is_gpu:
        log.info("the transformer stays on %s, as its loader says", lead)
        return handle
    cards = [card for card in here.gpus if wanted is None or card.card.label in wanted]
    if wanted is not None:
        cards.sort(key=lambda card: wanted.index(card.card.label))
        if missing := [label for label in wanted if label not in {card.card.label for card in cards}]:
            log.info("this machine has no %s: the others share the transformer", ", ".join(missing))
    else:
        cards.sort(key=lambda card: card.card.label != lead.label)
    spec = handle.replica.spec
    sharer = Sharer(spec.checkpoint, spec.precision, runs_on, copy_rate=here.copy_rate)
    sharing = sharer.choose(cards, mode, named=wanted is not None)
    if sharing is None:
        if wanted is not None and len(cards) == len(wanted) == 1 and mode != AUTO:
            raise InputError(f"Mode {mode} takes several cards, and devices names one. Name more, or auto.")
        log.info("one card computes alone: no other one can share the transformer and make it faster")
        return handle.alone(cards[0].card) if wanted is not None and cards else handle
    return share_among(handle, sharing)


def share_among(handle: Handle, sharing: Sharing) -> Handle:
    """The transformer on these cards, told in the log."""
    log.info("the transformer is shared: %s", sharing)
    return handle.shared_by(sharing.layout(handle.replica.holding(None)))


def _labels(devices: str) -> list[str] | None:
    """The labels in the text; None for auto. Raises InputError."""
    labels = [label for label in re.split(r"[,;\s]+", require_text(devices, "devices")) if label]
    if labels in ([], [AUTO]):
        return None
    wrong = [label for label in labels if not LABEL.fullmatch(label)]
    if wrong:
        raise InputError(
            f"devices names {shown(wrong[0])}. Write auto, cards such as gpu:0, gpu:1, or ray for a cluster."
        )
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise InputError(f"devices names {twice[0]} twice. Name every card once.")
    return labels
