"""No NaN or infinity passes a component unnoticed: a black image always has a named cause."""

from __future__ import annotations

import torch

from .errors import NonFiniteError

REMEDY = "Set this component's precision to fp32 (safe on every card), or to bf16 where the card has it."


def require_finite(tensor: torch.Tensor, what: str, component: object) -> torch.Tensor:
    """Return `tensor` unchanged, or raise NonFiniteError saying what held how many bad values and what to
    change.

    what: the tensor in words, with the step if there is one. component: the spec that computed it, printed as
    is.
    """
    finite = tensor.isfinite()
    if bool(finite.all()):
        return tensor
    bad = tensor[~finite]
    nans = int(bad.isnan().sum())
    raise NonFiniteError(
        f"{what} holds {nans} NaN and {bad.numel() - nans} infinite values of {tensor.numel()}; computed by "
        f"{component}. "
        f"Stopped here because the image would be black. {REMEDY}"
    )
