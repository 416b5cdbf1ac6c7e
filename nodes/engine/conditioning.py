"""ComfyUI's CONDITIONING to and from what the sampler needs of it.

A CONDITIONING is [[embeds (1, L, width), {"attention_mask": (1, L)?, "reference_latents": [raw latents]?}]],
as core's TextEncodeQwenImageEditPlus makes it. Ours also says "image_size": (width, height) of the first
picture, which a reference latent only holds rounded; keys one side does not know it leaves alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .errors import InputError
from .guard import require_finite_input
from .latents import PATCH, VAE_SCALE, require_latents

POSITIVE, NEGATIVE = "positive", "negative"  # the branches of guidance


@dataclass(frozen=True)
class Condition:
    """What one branch of guidance is conditioned on.

    prompt_embeds: (1, L, width). mask: (1, L) bool, or None when every token counts.
    reference_latents: raw, (1, 16, 1, h, w) each, in the order of the pictures.
    image_size: width and height in pixels of the first picture, as far as known.
    """

    prompt_embeds: torch.Tensor
    mask: torch.Tensor | None
    reference_latents: tuple[torch.Tensor, ...]
    image_size: tuple[int, int] | None = None

    @property
    def tokens(self) -> int:
        """What it adds to what the transformer attends over."""
        references = (latent.shape[-2] * latent.shape[-1] // PATCH**2 for latent in self.reference_latents)
        return self.prompt_embeds.shape[1] + sum(references)


def to_conditioning(
    prompt_embeds: torch.Tensor, reference_latents: list[torch.Tensor], image_size: tuple[int, int]
) -> list[list[Any]]:
    """A CONDITIONING of one entry. image_size: width and height in pixels of the first picture."""
    extras: dict[str, Any] = {"image_size": image_size}
    if reference_latents:
        extras["reference_latents"] = reference_latents
    return [[prompt_embeds, extras]]


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
    require_finite_input(embeds, f"The {branch} conditioning")
    embeds, mask = _trim(embeds, extras.get("attention_mask"))
    references: list[torch.Tensor] = []
    for number, raw in enumerate(extras.get("reference_latents") or (), start=1):
        what = f"Reference latent {number} of the {branch} conditioning"
        # A batch of pictures is several references, as it is several pictures to the text encoder.
        references += require_finite_input(require_latents(raw, what), what).split(1)
    size = extras.get("image_size")
    if size is None and references:
        size = (references[0].shape[-1] * VAE_SCALE, references[0].shape[-2] * VAE_SCALE)
    return Condition(embeds, mask, tuple(references), size)


def _trim(embeds: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cut padding off the end, and drop a mask that then keeps all: masked attention is slower."""
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
