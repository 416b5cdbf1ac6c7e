"""The names of stored tensors, and their names in the models built here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

# Prefixes of tensor names in Qwen2.5-VL files of several transformers releases, with those of the model built
# here. That model has no output head, so its tensors are left out.
TEXT_ENCODER_PREFIXES = {
    "model.language_model.": "language_model.",
    "model.visual.": "visual.",
    "visual.": "visual.",
    "model.": "language_model.",
    "language_model.": "language_model.",
}
# Tensors whose results depend on the timestep alone. See models/modulation.py.
FOLDED = re.compile(r"(transformer_blocks\.\d+\.(img|txt)_mod|norm_out|time_text_embed)\.")
BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")
BIG_MATRICES = {
    "transformer": re.compile(r"transformer_blocks\..*\.weight"),
    "text_encoder": re.compile(r"language_model\.layers\..*_proj\.weight"),
}
EMBEDDING = "language_model.embed_tokens.weight"  # the only matrix of no linear layer


def model_name(role: str, stored: str) -> str | None:
    """The name in the built model of a stored tensor; None for a tensor that the model does not have."""
    if role == "transformer":
        return None if FOLDED.match(stored) else stored
    if role == "text_encoder":
        for old, new in TEXT_ENCODER_PREFIXES.items():
            if stored.startswith(old):
                return new + stored.removeprefix(old)
        return None
    return stored


def by_model_name(role: str, stored: Mapping[str, T]) -> dict[str, T]:
    """What the built model has of stored tensors, by its names there."""
    return {new: each for name, each in stored.items() if (new := model_name(role, name)) is not None}


def is_held(name: str, held: Sequence[int] | None) -> bool:
    """Whether a part of the transformer has this tensor. held: its blocks; None for the whole model.

    Every part has the few tensors outside of the blocks.
    """
    block = BLOCK.match(name)
    return held is None or block is None or int(block[1]) in held


def is_big_matrix(role: str, name: str) -> bool:
    """Whether a precision's format applies to this weight. name: in the model."""
    return role in BIG_MATRICES and BIG_MATRICES[role].fullmatch(name) is not None
