"""Names of stored tensors, and what they are in the models built here."""

from __future__ import annotations

import re

# How transformers has stored Qwen2.5-VL over the years, as prefixes of its tensors' names. Its output head is
# left out: embeddings are what goes into it.
TEXT_ENCODER_PREFIXES = {
    "model.language_model.": "language_model.",
    "model.visual.": "visual.",
    "visual.": "visual.",
    "model.": "language_model.",
    "language_model.": "language_model.",
}
# What depends on the timestep alone: it is folded, see models/modulation.py.
FOLDED = re.compile(r"(transformer_blocks\.\d+\.(img|txt)_mod|norm_out|time_text_embed)\.")
BIG_MATRICES = {
    "transformer": re.compile(r"transformer_blocks\..*\.weight"),
    "text_encoder": re.compile(r"language_model\.layers\..*_proj\.weight"),
}


def model_name(role: str, stored: str) -> str | None:
    """A stored tensor's name in the model we build, or None for those we do without."""
    if role == "transformer":
        return None if FOLDED.match(stored) else stored
    if role == "text_encoder":
        for old, new in TEXT_ENCODER_PREFIXES.items():
            if stored.startswith(old):
                return new + stored.removeprefix(old)
        return None
    return stored


def is_big_matrix(role: str, name: str) -> bool:
    """Whether a precision's format applies to this weight (its name in the model)."""
    return role in BIG_MATRICES and BIG_MATRICES[role].fullmatch(name) is not None
