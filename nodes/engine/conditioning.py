"""ComfyUI's CONDITIONING to and from what the sampler needs of it.

A CONDITIONING is [[embeds (1, L, width), {"attention_mask": (1, L)?, "reference_latents": [raw latents]?}]],
as core's TextEncodeQwenImageEditPlus makes it; keys we do not know are left alone, as core leaves ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .errors import InputError
from .guard import require_finite
from .latents import require_latents


@dataclass(frozen=True)
class Condition:
    """What one branch of guidance is conditioned on.

    prompt_embeds: (1, L, width). mask: (1, L) bool, or None when every token counts.
    reference_latents: raw, (1, 16, 1, h, w) each, in the order of the pictures.
    """

    prompt_embeds: torch.Tensor
    mask: torch.Tensor | None
    reference_latents: tuple[torch.Tensor, ...]


def to_conditioning(prompt_embeds: torch.Tensor, reference_latents: list[torch.Tensor]) -> list[list[Any]]:
    """A CONDITIONING of one entry."""
    return [[prompt_embeds, {"reference_latents": reference_latents} if reference_latents else {}]]


def from_conditioning(conditioning: Any, branch: str, width: int) -> Condition:
    """Read a CONDITIONING of one entry, ours or core's.

    branch: its name in errors. width: what the transformer expects of embeddings. Raises InputError for
    several entries, another shape or width, and NonFiniteError for NaN.
    """
    if not isinstance(conditioning, list) or len(conditioning) != 1:
        count = len(conditioning) if isinstance(conditioning, list) else 0
        raise InputError(
            f"The {branch} conditioning has {count} entries; this sampler takes exactly one. Do not combine."
        )
    embeds, extras = conditioning[0]
    if embeds.ndim != 3 or embeds.shape[0] != 1 or embeds.shape[1] == 0:
        raise InputError(
            f"The {branch} conditioning has shape {tuple(embeds.shape)}; expected (1, tokens, {width})."
        )
    if embeds.shape[2] != width:
        raise InputError(
            f"The {branch} conditioning is {embeds.shape[2]} wide, this transformer takes {width}. "
            "Use the text encoder of the same checkpoint."
        )
    require_finite(embeds, f"The {branch} conditioning", "the node that made it")
    embeds, mask = _trim(embeds, extras.get("attention_mask"))
    references = tuple(
        require_latents(raw, f"Reference latent {number} of the {branch} conditioning")
        for number, raw in enumerate(extras.get("reference_latents") or (), start=1)
    )
    for number, raw in enumerate(references, start=1):
        require_finite(
            raw, f"Reference latent {number} of the {branch} conditioning", "the node that made it"
        )
    return Condition(embeds, mask, references)


def _trim(embeds: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cut padding off the end; a mask that then keeps every token is dropped, since masked attention is
    slower.
    """
    if mask is None:
        return embeds, None
    if mask.shape != embeds.shape[:2] or not bool(mask.any()):
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; expected {tuple(embeds.shape[:2])}, not all 0."
        )
    kept = mask.bool()
    length = int(kept[0].nonzero().max()) + 1
    embeds, kept = embeds[:, :length], kept[:, :length]
    return embeds, None if bool(kept.all()) else kept
