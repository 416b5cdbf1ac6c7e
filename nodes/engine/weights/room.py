"""Whether a component fits on its card, and the error when it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..errors import FireRedError
from ..units import GIB
from .components import Replica
from .estimates import RESERVED_BYTES, Edit, fits, workspace_bytes
from .precision import ROLE_PRECISIONS, Precision, resolve, runs_on


class DoesNotFitError(FireRedError):
    """A component is too big for its card. Raised before anything is loaded."""


def working_bytes(replica: Replica, edit: Edit = Edit()) -> int:  # noqa: B008 - it is frozen
    """The bytes that the component needs at least beside its weights, with those of the driver."""
    reserved = RESERVED_BYTES if replica.card.is_gpu else 0
    spec = replica.spec
    needed = workspace_bytes(
        spec.role, spec.checkpoint, spec.precision, edit, tiled=True, fused=replica.fused
    )
    return needed + reserved


def has_room(replica: Replica, working: float, room: float) -> bool:
    """Whether the weights and `working` bytes fit into `room` bytes, which is all the device can give."""
    return fits(replica.spec.nbytes(), working, room)


def require_room(replica: Replica, working: float, room: float, task: str, remedy: str) -> None:
    """Raise DoesNotFitError when a task does not fit into `room` bytes. See has_room.

    task: its name, such as "Sampling 1024x1024". remedy: a sentence that says what to do.
    """
    if not has_room(replica, working, room):
        scores = "" if replica.fused else " (no fused attention kernel runs there in this arithmetic)"
        raise DoesNotFitError(
            f"{task} takes {replica.spec.nbytes() / GIB:.1f} GiB for the {replica} and {working / GIB:.1f} "
            f"GiB to work with{scores}; {replica.card} can give {room / GIB:.1f} GiB. {remedy}"
        )


def require_fit(replica: Replica) -> None:
    """Raise DoesNotFitError, listing precisions that fit, when the card is too small for a usual edit."""
    if _fits_card(replica):
        return
    smaller = [
        f"{other.spec.precision.name} ({other.spec.nbytes() / GIB:.1f} GiB)"
        for other in alternatives(replica)
        if _fits_card(other)
    ]
    needs = f"{replica.spec.nbytes() / GIB:.1f} GiB and {working_bytes(replica) / GIB:.1f} GiB to work with"
    remedy = f"What fits: {', '.join(smaller)}." if smaller else "Choose a bigger card, or cpu."
    card = replica.card
    raise DoesNotFitError(f"{replica} needs {needs}; {card} has {card.memory / GIB:.1f} GiB. {remedy}")


def alternatives(replica: Replica) -> Iterator[Replica]:
    """The same component on the same card at each precision that errors may recommend there."""
    for row in ROLE_PRECISIONS[replica.spec.role].values():
        precision = resolve(row, replica.card)
        if not row.is_fp16 and runs_on(precision, replica.card):
            yield at_precision(replica, precision)


def at_precision(replica: Replica, precision: Precision) -> Replica:
    """The same component on the same card at another precision, which is resolved for the card."""
    return replace(replica, spec=replace(replica.spec, precision=precision))


def _fits_card(replica: Replica) -> bool:
    """Whether the component and its working memory fit on the empty card.

    The scores of unfused attention do not count: they grow with the square of the picture's size, so a
    smaller edit may fit. require_room counts them, because there the size is known.
    """
    fused = replace(replica, card=replace(replica.card, unfused=frozenset()))
    return has_room(replica, working_bytes(fused), replica.card.memory)
