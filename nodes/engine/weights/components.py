"""What a loader node chooses, as frozen descriptions: the component, and the card it runs on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..cards.card import Card
from ..errors import CheckpointError
from ..files.checkpoint import Checkpoint
from ..files.encodings import Stored
from .estimates import weight_bytes
from .names import is_held, model_name
from .precision import Precision


@dataclass(frozen=True)
class ComponentSpec:
    """A component of a checkpoint at a precision that is resolved for a card.

    role: the component's folder in the checkpoint: `transformer`, `text_encoder` or `vae`.
    identity: a hash of the files in that folder. When they change, they are loaded again.
    processor: for a text encoder, the same hash of the processor's folder.
    held: of a transformer that is shared out over cards, the numbers of the blocks in this part.
    """

    role: str
    checkpoint: Checkpoint
    precision: Precision
    identity: str
    processor: str = ""
    held: tuple[int, ...] | None = None

    @classmethod
    def of(cls, role: str, checkpoint: Checkpoint, precision: Precision) -> ComponentSpec:
        """The component in the files as they are now. Raises CheckpointError when they cannot be read."""
        return cls(role, checkpoint, precision, *identities(role, checkpoint))

    @property
    def math(self) -> torch.dtype:
        """The dtype of its arithmetic."""
        return self.precision.math

    def nbytes(self) -> int:
        """About how many bytes the loaded weights take, from the headers of the files."""
        return weight_bytes(self.role, self.checkpoint, self.precision, self.held)

    def name_in_model(self, stored: str) -> str | None:
        """The name in the built model of a stored tensor; None for a tensor that it does not have."""
        name = model_name(self.role, stored)
        return name if name is not None and is_held(name, self.held) else None

    def stored(self) -> dict[str, Stored]:
        """The stored tensors that the built model has, by their names there."""
        stored = self.checkpoint.component(self.role).stored()
        return {new: each for name, each in stored.items() if (new := self.name_in_model(name)) is not None}

    def require_unchanged(self) -> None:
        """Raise CheckpointError when the files have changed since this description was made.

        Caches use the identities above as keys, so their content must come from the same files.
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
        """The text for logs and errors: "transformer int8, fp32 math, on gpu:0 (Tesla P40)"."""
        precision = self.spec.precision
        math = str(precision.math).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")
        if precision.fp16_inside:
            math += " and fp16"
        shown = precision.name if math == precision.name else f"{precision.name}, {math} math,"
        return f"{self.spec.role.replace('_', ' ')} {shown} on {self.card}"

    @property
    def device(self) -> torch.device:
        return self.card.device

    def holding(self, held: tuple[int, ...] | None) -> Replica:
        """The part of the transformer with these blocks, on the same card; None is the whole."""
        return replace(self, spec=replace(self.spec, held=held))

    @property
    def fused(self) -> bool:
        """Whether its attention runs in a fused kernel, which does not hold all scores in memory."""
        return (self.spec.role, self.spec.math) not in self.card.unfused


def identities(role: str, checkpoint: Checkpoint) -> tuple[str, str]:
    """ComponentSpec's `identity` and `processor`. Raises CheckpointError when files cannot be read."""
    beside = checkpoint.component("processor").identity() if role == "text_encoder" else ""
    return checkpoint.component(role).identity(), beside


def fingerprint(role: str, checkpoint: Checkpoint) -> str:
    """A text that changes whenever a result of this component may change.

    For the transformer it includes the schedule and the latents' statistics. They are not part of the spec,
    because the sampler reads them for each run and the weights stay loaded when they change.
    """
    try:
        parts: list[object] = list(identities(role, checkpoint))
        if role == "transformer":
            parts += [checkpoint.component("scheduler").config(), checkpoint.latent_statistics()]
        return repr(parts)
    except CheckpointError as error:
        return str(error)  # the node raises it when it runs
