"""What a loader node chooses, as small frozen descriptions: what a component is, and where a replica runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..cards.card import Card
from ..errors import CheckpointError
from ..files.checkpoint import Checkpoint
from .estimates import weight_bytes
from .precision import Precision


@dataclass(frozen=True)
class ComponentSpec:
    """What a component is: part of a checkpoint at a precision whose arithmetic is decided.

    role: the component's folder in the checkpoint, `transformer`, `text_encoder` or `vae`.
    identity: of that folder's files, so that replaced files are loaded anew.
    processor: the identity of the files that a text encoder is loaded with, beside its own.
    """

    role: str
    checkpoint: Checkpoint
    precision: Precision
    identity: str
    processor: str = ""

    @classmethod
    def of(cls, role: str, checkpoint: Checkpoint, precision: Precision) -> ComponentSpec:
        """The component of the files that are there now. Raises CheckpointError where they cannot be read."""
        return cls(role, checkpoint, precision, *identities(role, checkpoint))

    @property
    def math(self) -> torch.dtype:
        """The dtype of its arithmetic."""
        return self.precision.math

    def nbytes(self) -> int:
        """About how many bytes the weights take once loaded, read off the files' headers."""
        return weight_bytes(self.role, self.checkpoint, self.precision)

    def require_unchanged(self) -> None:
        """Raise CheckpointError where the files are not those that this describes.

        What is made from them is kept under the identities above, and must not come from other files.
        """
        if (self.identity, self.processor) != identities(self.role, self.checkpoint):
            raise CheckpointError(
                f"The files of the {self.role.replace('_', ' ')} in {self.checkpoint.folder} changed while "
                f"they were in use. Run the prompt again."
            )


@dataclass(frozen=True)
class Replica:
    """A component on a card. Equal replicas share one copy in memory."""

    spec: ComponentSpec
    card: Card

    def __str__(self) -> str:
        """As people read it in logs and errors: "transformer int8, fp32 math, on gpu:0 (Tesla P40)"."""
        precision = self.spec.precision
        math = str(precision.math).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")
        if precision.fp16_inside:
            math += " and fp16"
        shown = precision.name if math == precision.name else f"{precision.name}, {math} math,"
        return f"{self.spec.role.replace('_', ' ')} {shown} on {self.card}"

    @property
    def device(self) -> torch.device:
        return self.card.device

    @property
    def fused(self) -> bool:
        """Whether its attention runs without holding all its scores."""
        return (self.spec.role, self.spec.math) not in self.card.unfused


def identities(role: str, checkpoint: Checkpoint) -> tuple[str, str]:
    """What ComponentSpec calls `identity` and `processor`."""
    beside = checkpoint.component("processor").identity() if role == "text_encoder" else ""
    return checkpoint.component(role).identity(), beside


def fingerprint(role: str, checkpoint: Checkpoint) -> str:
    """Changes when anything does that a result of this component depends on.

    For the transformer that includes the schedule and the latents' statistics. The sampler reads them anew
    for each run, so they are not part of its spec: its weights stay loaded when they change.
    """
    try:
        parts: list[object] = list(identities(role, checkpoint))
        if role == "transformer":
            parts += [checkpoint.component("scheduler").config(), checkpoint.latent_statistics()]
        return repr(parts)
    except CheckpointError as error:
        return str(error)  # the node itself says it
