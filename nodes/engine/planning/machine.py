"""What a machine has to offer, as read off the hardware or only described."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..cards.card import Card
from ..cards.kernels import no_answer
from ..cards.speeds import Speeds
from ..errors import FireRedError, InputError
from ..weights.estimates import RESERVED_BYTES


@dataclass(frozen=True)
class Device:
    """A card as a place for components.

    free: bytes this process may use of it, what it can evict from there counted as free.
    speeds: None where nobody knows any. measured: whether they were measured on this very card.
    integrated: whether its memory is the host's. fault: why it cannot be used, in a sentence.
    """

    card: Card
    free: int
    speeds: Speeds | None = None
    measured: bool = False
    integrated: bool = False
    fault: str = ""

    @property
    def usable(self) -> int:
        """Bytes for weights and what they work with."""
        return self.free - (RESERVED_BYTES if self.card.is_gpu else 0)


@dataclass(frozen=True)
class Machine:
    """Its accelerators in the order of their labels, and the CPU with the host's memory.

    unified: whether the accelerator's memory is the host's.
    """

    gpus: tuple[Device, ...]
    cpu: Device
    unified: bool = False

    @property
    def automatic(self) -> tuple[Device, ...]:
        """Where `auto` may put something: the CPU only where there is nothing else.

        Never on a card with a fault, unless all have one: then whoever asks is told of it.
        """
        return tuple(gpu for gpu in self.gpus if not gpu.fault) or self.gpus or (self.cpu,)

    @property
    def memories(self) -> tuple[Device, ...]:
        """The devices whose memories are different ones."""
        return self.gpus if self.unified else (*self.gpus, self.cpu)

    def device(self, label: str) -> Device:
        """Raises InputError naming the devices there are."""
        everything = {device.card.label: device for device in (*self.gpus, self.cpu)}
        if label not in everything:
            raise InputError(f"This machine has no {label}. Choose {', '.join(everything)} or auto.")
        return everything[label]

    def shared(self, one: Device, other: Device) -> bool:
        """Whether both devices take from the same memory."""
        return one == other or self.unified


def unusable(label: str, device: torch.device, error: Exception) -> Device:
    """A card that raised `error` when it was asked something: a place without room, and why.

    Nothing else is said of it: the next question would fail as well.
    """
    told = error if isinstance(error, FireRedError) else no_answer(label, error)
    return Device(Card(label, label, device, native_bf16=False, memory=0), free=0, fault=str(told))
