"""No NaN or infinity passes a component unnoticed: a black image always has a named cause."""

from __future__ import annotations

import torch

from .components import ComponentSpec
from .errors import NonFiniteError


def require_finite(tensor: torch.Tensor, what: str, spec: ComponentSpec) -> torch.Tensor:
    """Return what a component computed unchanged, or raise NonFiniteError.

    what: the tensor in words, with the step if there is one. The error says what held how many bad values,
    which component made them at which precision on which card, and what to change.
    """
    if bool(tensor.isfinite().all()):
        return tensor
    remedy = "Check the checkpoint: even FP32 arithmetic overflowed."
    if spec.math is not torch.float32 or spec.precision.fp16_inside:
        remedy = "Set its precision to fp32 or int8, and math to fp32 where it has one: safe on every card."
    raise NonFiniteError(
        f"{_count(tensor, what)}, computed by the {spec}. Stopped because the image would be black. {remedy}"
    )


def require_finite_input(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """Return what another node made unchanged, or raise NonFiniteError saying how many bad values it held."""
    if bool(tensor.isfinite().all()):
        return tensor
    raise NonFiniteError(f"{_count(tensor, what)}. The image would be black: check the node that made it.")


def _count(tensor: torch.Tensor, what: str) -> str:
    bad = tensor[~tensor.isfinite()]
    nans = int(bad.isnan().sum())
    return f"{what} holds {nans} NaN and {bad.numel() - nans} infinite values of {tensor.numel()}"
