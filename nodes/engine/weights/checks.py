"""Check a component's files before anything is loaded from them."""

from __future__ import annotations

from ..errors import CheckpointError
from ..files.checkpoint import Checkpoint
from ..files.configs import read_json
from ..files.encodings import Unknown
from .names import FOLDED, model_name


def require_usable(role: str, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError naming a file of the component that is missing, damaged or not readable here."""
    component = checkpoint.component(role)
    component.config()
    for name, stored in component.stored().items():
        needed = FOLDED.match(name) or model_name(role, name) is not None
        if needed and isinstance(stored.encoding, Unknown):
            raise CheckpointError(
                f"{component.path}: {name} is stored as {stored.encoding.dtype_name}, which these nodes do "
                "not read. Download the original with BF16 weights."
            )


def require_beside(role: str, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError naming a missing or damaged file that the component needs from other folders."""
    if role == "transformer":
        checkpoint.component("scheduler").config()
        checkpoint.latent_statistics()
    if role == "text_encoder":
        beside = checkpoint.component("processor")
        for names in beside.needed:
            if not any((beside.path / name).is_file() for name in names):
                raise CheckpointError(
                    f"{beside.path} has no {' or '.join(names)}. Download this folder again; the others "
                    "can stay."
                )
        for path in beside.path.glob("[!.]*config.json"):
            read_json(path)
