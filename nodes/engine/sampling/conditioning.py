"""Convert between ComfyUI's CONDITIONING and the sampler's Condition.

A CONDITIONING is [[embeds (1, L, width), {"attention_mask": (1, L)?, "reference_latents": [raw latents]?}]],
as core's TextEncodeQwenImageEditPlus makes it. Ours adds "image_size", the first picture's exact (width,
height), "native_size", the same where the output shall have that size, and "latent_statistics" of the VAE
that made the reference latents.

The lists below name the known keys. Any other key is logged once: nothing that changes the picture in core's
sampler is dropped silently.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from ..errors import InputError
from ..images import require_picture_count
from ..latents import (
    LATENT_CHANNELS,
    NATIVE_SIZE,
    PATCH,
    QWEN_STATISTICS,
    VAE_SCALE,
    LatentStatistics,
    read_size,
    require_latents,
    require_tensor,
)
from ..limits import as_number, shown
from ..masks import is_all_ones
from ..models.guard import require_finite_input
from ..notices import first_time

log = logging.getLogger("FireRed")

MAX_STATISTIC = 1e6  # of a latent channel
OBEYED = {
    "attention_mask",
    "reference_latents",
    "reference_latents_method",
    "image_size",
    NATIVE_SIZE,
    "latent_statistics",
}
# Keys that change nothing in core either, for this model and one entry. Core's text encoders set the first.
# The others only have an effect together with keys that are refused below.
WITHOUT_EFFECT = {
    "pooled_output",
    "default",
    "set_area_to_bounds",
    "control_apply_to_uncond",
}


@dataclass(frozen=True)
class Refusal:
    """A key that core's sampler obeys for this model and ours does not.

    setters: the nodes that set it. is_neutral: whether this value changes nothing in core.
    """

    setters: str
    is_neutral: Callable[[Any], bool] = lambda value: value is None


def _is_number(value: Any, lowest: float, highest: float) -> bool:
    number = as_number(value)
    return number is not None and lowest <= number <= highest


PROPERTIES = "ConditioningSetProperties and its relatives"
TIMESTEPS = f"ConditioningSetTimestepRange, {PROPERTIES}"
HOOKS = f"SetClipHooks, SetModelHooksOnCond, {PROPERTIES}"
REFUSED = {
    "start_percent": Refusal(TIMESTEPS, lambda value: _is_number(value, -math.inf, 0)),
    "end_percent": Refusal(TIMESTEPS, lambda value: _is_number(value, 1, math.inf)),
    "timestep_start": Refusal("a node that sets it directly"),
    "timestep_end": Refusal("a node that sets it directly"),
    "clip_start_percent": Refusal(HOOKS, lambda value: _is_number(value, -math.inf, 0)),
    "clip_end_percent": Refusal(HOOKS, lambda value: _is_number(value, 1, math.inf)),
    "area": Refusal(
        "ConditioningSetArea, ConditioningSetAreaPercentage and ConditioningSetAreaPercentageVideo"
    ),
    "strength": Refusal(
        "ConditioningSetAreaStrength and ConditioningSetArea", lambda value: _is_number(value, 1, 1)
    ),
    "mask": Refusal(f"ConditioningSetMask, {PROPERTIES}", is_all_ones),
    # With one entry, core's result is the same for any strength above 0.
    "mask_strength": Refusal("ConditioningSetMask", lambda value: _is_number(value, 1e-6, math.inf)),
    "control": Refusal("ControlNetApply and ControlNetApplyAdvanced"),
    "hooks": Refusal(HOOKS, lambda value: not getattr(value, "hooks", value)),
    "gligen": Refusal("GLIGENTextBoxApply"),
    "noise_concat": Refusal("a node for another model"),
    "model_conds": Refusal("a node that changes what the model is given", lambda value: not value),
}


class ReferenceMethod(Enum):
    """How a checkpoint's transformer was trained to tell reference latents apart. Values: core's names."""

    INDEX = "index"
    INDEX_TIMESTEP_ZERO = "index_timestep_zero"

    @classmethod
    def of(cls, transformer_config: Mapping[str, Any]) -> ReferenceMethod:
        """The method in the transformer's config.json. Core reads it from a marker in the weights."""
        return cls.INDEX_TIMESTEP_ZERO if transformer_config.get("zero_cond_t") else cls.INDEX


POSITIVE, NEGATIVE = "positive", "negative"  # the branches of guidance


@dataclass(frozen=True)
class Condition:
    """The inputs of one branch of guidance.

    prompt_embeds: (1, L, width). mask: (1, L) bool, or None when every token counts.
    reference_latents: raw, (1, 16, 1, h, w) each, in the order of the pictures.
    image_size: width and height in pixels of the first picture, if known.
    statistics: of the VAE's latents: the reference latents and the sampled ones.
    native_size: the first picture's width and height, if the output shall have exactly that size.
    """

    prompt_embeds: torch.Tensor
    mask: torch.Tensor | None
    reference_latents: tuple[torch.Tensor, ...]
    image_size: tuple[int, int] | None = None
    statistics: LatentStatistics = QWEN_STATISTICS
    native_size: tuple[int, int] | None = None

    @property
    def tokens(self) -> int:
        """How many tokens the transformer attends to besides those of the sampled picture."""
        references = (latent.shape[-2] * latent.shape[-1] // PATCH**2 for latent in self.reference_latents)
        return self.prompt_embeds.shape[1] + sum(references)


def to_conditioning(
    prompt_embeds: torch.Tensor,
    reference_latents: list[torch.Tensor],
    image_size: tuple[int, int],
    statistics: LatentStatistics | None = None,
    native: bool = False,
) -> list[list[Any]]:
    """A CONDITIONING of one entry.

    The arguments are as in Condition. statistics: of the VAE, if there is one. native: whether the output
    shall have the image's size.
    """
    extras: dict[str, Any] = {"image_size": image_size} | ({NATIVE_SIZE: image_size} if native else {})
    if statistics is not None:
        extras["latent_statistics"] = tuple(statistics)  # plain numbers, which any node can save
    if reference_latents:
        extras["reference_latents"] = reference_latents
    return [[prompt_embeds, extras]]


def from_conditioning(
    conditioning: Any,
    branch: str,
    width: int,
    method: ReferenceMethod = ReferenceMethod.INDEX,
    statistics: LatentStatistics = QWEN_STATISTICS,
) -> Condition:
    """Read a CONDITIONING of one entry, ours or core's.

    branch: its name for errors. width: of the embeddings that the transformer takes. method: how the
    transformer was trained to take reference latents. statistics: used if the conditioning has none. Raises
    InputError for several entries, another shape or width, too many pictures, and a key that core's sampler
    obeys and ours does not; NonFiniteError for NaN and infinity.
    """
    embeds, extras = _only_entry(conditioning, branch)
    if embeds.ndim != 3 or embeds.shape[0] != 1 or embeds.shape[1] == 0:
        raise InputError(
            f"The {branch} conditioning has shape {tuple(embeds.shape)}; expected (1, tokens, {width})."
        )
    if embeds.shape[2] != width:
        raise InputError(
            f"The {branch} conditioning is {embeds.shape[2]} wide, this transformer takes {width}. "
            "Use the text encoder of the same checkpoint."
        )
    _require_obeyed(extras, branch)
    require_finite_input(embeds, f"The {branch} conditioning")
    embeds, mask = _trim(embeds, extras.get("attention_mask"), branch)
    references = _references(extras, branch)
    asked = extras.get("reference_latents_method")
    if references and asked is not None and asked != method.value:
        raise InputError(
            f"The {branch} conditioning asks for the reference method {shown(asked)}; this checkpoint was "
            f"trained with {method.value!r} and knows no other. Set FluxKontextMultiReferenceLatentMethod "
            f"(Edit Model Reference Method) to {method.value}, or take it out."
        )
    size, native = read_size(extras.get("image_size")), read_size(extras.get(NATIVE_SIZE))
    if size is None and references:
        size = (references[0].shape[-1] * VAE_SCALE, references[0].shape[-2] * VAE_SCALE)
    made_with = _statistics(extras.get("latent_statistics"), statistics)
    return Condition(embeds, mask, references, size, made_with, native)


def _only_entry(conditioning: Any, branch: str) -> tuple[torch.Tensor, Mapping[str, Any]]:
    """The embeddings and the other keys of a CONDITIONING. Raises InputError unless it has one entry."""
    what = f"The {branch} conditioning"
    if not isinstance(conditioning, list | tuple):
        raise InputError(
            f"{what} is {shown(conditioning)}. Connect FireRed Encode Prompt, or core's "
            "TextEncodeQwenImageEditPlus."
        )
    if len(conditioning) != 1:
        raise InputError(
            f"{what} has {len(conditioning)} entries; this sampler takes exactly one. Do not combine."
        )
    (entry,) = conditioning
    if not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[1], Mapping):
        raise InputError(
            f"{what} is damaged: its entry is {shown(entry)}, not a pair of embeddings and their settings. "
            "Check the node that made it."
        )
    embeds, extras = entry
    embeds = require_tensor(embeds, what)
    return embeds if embeds.is_floating_point() and embeds.itemsize > 1 else embeds.float(), extras


def _require_obeyed(extras: Mapping[str, Any], branch: str) -> None:
    """Raise InputError for a key that only core's sampler obeys. Log keys that are not known."""
    for key, value in extras.items():
        refusal = REFUSED.get(key)
        if refusal is not None and value is not None and not refusal.is_neutral(value):
            said = f"{key} {value}" if as_number(value) is not None else key
            raise InputError(
                f"The {branch} conditioning has {said}, set by {refusal.setters}. This sampler does not obey "
                "that: the whole prompt guides the whole picture in every step. Take that node out."
            )
        known = refusal is not None or key in OBEYED | WITHOUT_EFFECT
        if not known and first_time("conditioning", key):
            log.warning("%s in a conditioning is not used by this sampler: it changes nothing", key)


def _references(extras: Mapping[str, Any], branch: str) -> tuple[torch.Tensor, ...]:
    """The reference latents, raw (1, 16, 1, h, w) each."""
    listed = extras.get("reference_latents")
    if listed is None:
        return ()
    if not isinstance(listed, list | tuple):
        raise InputError(
            f"reference_latents of the {branch} conditioning is {shown(listed)}; it must be a list of "
            "latents. Check the node that made it."
        )
    # A batch counts as several references, as it counts as several pictures for the text encoder.
    batches = [
        require_latents(raw, f"Reference latent {number} of the {branch} conditioning")
        for number, raw in enumerate(listed, start=1)
    ]
    require_picture_count(sum(map(len, batches)), f"reference latents in the {branch} conditioning")
    references: list[torch.Tensor] = []
    for number, batch in enumerate(batches, start=1):
        what = f"Reference latent {number} of the {branch} conditioning"
        references += require_finite_input(batch, what).split(1)
    return tuple(references)


def _statistics(given: Any, default: LatentStatistics) -> LatentStatistics:
    """The given statistics, or the default if there are none or another pack uses this key differently."""
    if not isinstance(given, list | tuple) or len(given) != 2:
        return default
    for values, lowest in zip(given, (-MAX_STATISTIC, 1 / MAX_STATISTIC), strict=True):
        numbers = isinstance(values, list | tuple) and len(values) == LATENT_CHANNELS
        if not numbers or not all(_is_number(value, lowest, MAX_STATISTIC) for value in values):
            return default
    mean, std = given
    return LatentStatistics(tuple(mean), tuple(std))


def _trim(embeds: torch.Tensor, given: Any, branch: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cut padding off the end. Drop a mask that then keeps every token: masked attention is slower."""
    if given is None:
        return embeds, None
    mask = require_tensor(given, f"attention_mask of the {branch} conditioning")
    if mask.shape != embeds.shape[:2] or not bool(mask.any()):
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; expected {tuple(embeds.shape[:2])}, not all 0."
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError(
            f"attention_mask of the {branch} conditioning weighs tokens; this sampler takes a token (1) or "
            "leaves it (0). Take out the node that sets it, such as StyleModelApply."
        )
    kept = mask.bool()
    length = int(kept[0].nonzero().max()) + 1
    embeds, kept = embeds[:, :length], kept[:, :length]
    return embeds, None if bool(kept.all()) else kept
