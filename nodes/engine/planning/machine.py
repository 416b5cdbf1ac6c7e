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
    """A card, or the CPU, as what can hold components.

    free: bytes that this process may use of it, including what it can evict from there.
    speeds: None where they are not known. measured: whether they were measured on this very card.
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
        """Bytes for weights and for what works beside them."""
        return self.free - (RESERVED_BYTES if self.card.is_gpu else 0)


@dataclass(frozen=True)
class Machine:
    """The accelerators in the order of their labels, and the CPU with the host's memory.

    unified: whether the accelerator's memory is the host's. copy_rate: GB/s of the slowest pair of cards, in
    one direction; None where it is not known.
    """

    gpus: tuple[Device, ...]
    cpu: Device
    unified: bool = False
    copy_rate: float | None = None

    @property
    def automatic(self) -> tuple[Device, ...]:
        """Where `auto` may put something: the cards without a fault, and the CPU only where there is no card.

        Where all cards have a fault it is all of them, so that the user is told why.
        """
        return tuple(gpu for gpu in self.gpus if not gpu.fault) or self.gpus or (self.cpu,)

    @property
    def memories(self) -> tuple[Device, ...]:
        """One device for each memory."""
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
    """A card that raised `error` when it was asked something: a device without memory, and why.

    Its name and memory are not asked for: the next question would fail as well.
    """
    told = error if isinstance(error, FireRedError) else no_answer(label, error)
    return Device(Card(label, label, device, native_bf16=False, memory=0), free=0, fault=str(told))
