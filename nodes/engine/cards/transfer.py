"""Copy tensors from one component's device to another's.

Text embeddings and latents pass between components as FP32. FP16 would overflow, and BF16 would round what
the next component computes in FP32.

With an IOMMU, ACS or a virtual machine, direct copies between cards may silently deliver zeros
(https://github.com/pytorch/pytorch/issues/84803). So each pair of cards is tested before its first copy. If
the test fails, copies go through host memory.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .kernels import device_label, on_card
from .timing import seconds_each

log = logging.getLogger("FireRed")

Copy = Callable[[torch.Tensor, torch.device], torch.Tensor]
Arrival = Callable[[], None]  # makes what the card computes from now on wait for a copy
# INT32 numbers: 64 MiB, and a size that is no multiple of any block size.
PATTERN_NUMBERS = (2**24, 1_000_003)
REPEATS = 3


@dataclass(frozen=True)
class Link:
    """A pair of cards, in one direction.

    peer_access: whether the driver offers direct copies. fault: what a direct copy got wrong, or None. With a
    fault, copy_to goes through host memory.
    """

    source: torch.device
    target: torch.device
    peer_access: bool
    fault: str | None


@functools.cache
def copy_fault(source: torch.device, target: torch.device) -> str | None:
    """What direct copies from one card to another get wrong, or None. Tested once per process."""
    try:
        fault = find_fault(source, target, _copy_directly)
    except torch.OutOfMemoryError:
        fault = "not enough free memory to test it"
    if fault:
        pair = device_label(source), device_label(target)
        log.warning("copies from %s to %s go through host memory: %s", *pair, fault)
    return fault


def needs_detour(
    source: torch.device,
    target: torch.device,
    find: Callable[[torch.device, torch.device], str | None] = copy_fault,
) -> bool:
    """Whether both devices are cards and direct copies have a fault. find: tests a pair of cards."""
    return _are_two_cards(source, target) and find(source, target) is not None


def copy_to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor in FP32 on `device`. The first copy between two cards tests them, which takes a second."""
    return moved(tensor, device).to(torch.float32)


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`, as copy_to but in its own dtype."""
    return (through_host if needs_detour(tensor.device, device) else torch.Tensor.to)(tensor, device)


def through_host(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`, copied through host memory, which is pinned for a tensor on a GPU."""
    pinned = tensor.device.type == "cuda"
    staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned).copy_(tensor)
    return staged.to(device)


def start_exchange(
    sent: Sequence[Sequence[torch.Tensor]], received: Sequence[Sequence[Sequence[torch.Tensor]]]
) -> list[Arrival]:
    """Queue copies of every card's tensors to all cards, an Arrival for each of them.

    sent: by card. received: by card, the tensors into which those of each sending card go. The cards compute
    on meanwhile. What a card computes with the copies has to be queued after its Arrival was called. All
    tensors may be dropped at any time. Between the CPU and a card the copies are done at once.
    """
    arrived: list[list[torch.cuda.Event]] = [[] for _ in sent]
    devices = [tensors[0].device for tensors in sent]
    ready = [_now(device) for device in devices]
    for source, tensors in enumerate(sent):
        for target, parts in enumerate(received):
            if not _are_two_cards(devices[source], devices[target]):
                for tensor, part in zip(tensors, parts[source], strict=True):
                    part.copy_(tensor)
                continue
            with on_card(devices[target]):
                _receiving(devices[target], devices[source]).wait_event(ready[target])
                arrived[target].append(_queue_copies(tensors, parts[source], ready[source]))
    return [
        functools.partial(_wait_for, events, device) for events, device in zip(arrived, devices, strict=True)
    ]


def start_moving(tensors: Sequence[torch.Tensor], device: torch.device) -> tuple[list[torch.Tensor], Arrival]:
    """Queue copies of tensors on one card to another one, beside what is queued there. As start_exchange."""
    source = tensors[0].device
    if not _are_two_cards(source, device):
        return [moved(tensor, device) for tensor in tensors], functools.partial(_wait_for, [], device)
    with on_card(device):
        with torch.cuda.stream(_receiving(device, source)):
            targets = [torch.empty_like(tensor, device=device) for tensor in tensors]
        for target in targets:
            target.record_stream(torch.cuda.current_stream(device))
        arrived = _queue_copies(tensors, targets, _now(source))
    return targets, functools.partial(_wait_for, [arrived], device)


def _queue_copies(
    sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], ready: Any
) -> torch.cuda.Event:
    """Copies between two cards on streams of their own, once the sources are ready."""
    source, target = sources[0].device, targets[0].device
    sending, receiving = _sending(source, target), _receiving(target, source)
    sending.wait_event(ready)
    detour = needs_detour(source, target)
    with torch.cuda.stream(sending), torch.cuda.stream(receiving):
        for tensor, copied in zip(sources, targets, strict=True):
            tensor.record_stream(sending)
            copied.record_stream(receiving)
            if detour:
                tensor = _staged(tensor, sending)
                receiving.wait_stream(sending)
            copied.copy_(tensor, non_blocking=True)
        return receiving.record_event()


def _now(device: torch.device) -> Any:
    """An event after all that the card was told to compute; None for the CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _staged(tensor: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
    """A copy in pinned host memory, queued on a stream of the tensor's card."""
    staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    with torch.cuda.stream(stream):
        return staged.copy_(tensor, non_blocking=True)


def _are_two_cards(source: torch.device, target: torch.device) -> bool:
    return source.type == target.type == "cuda" and source != target


def _wait_for(arrived: Sequence[torch.cuda.Event], device: torch.device) -> None:
    for event in arrived:
        torch.cuda.current_stream(device).wait_event(event)


@functools.cache
def _sending(source: torch.device, target: torch.device) -> torch.cuda.Stream:
    """The stream of a card for copies from it to another one, beside its computation."""
    return torch.cuda.Stream(source)


@functools.cache
def _receiving(target: torch.device, source: torch.device) -> torch.cuda.Stream:
    """The stream of a card for copies from another one. Copies to there have their own: both go at once."""
    return torch.cuda.Stream(target)


def find_fault(
    source: torch.device,
    target: torch.device,
    copy: Copy,
    numbers: Sequence[int] = PATTERN_NUMBERS,
    repeats: int = REPEATS,
) -> str | None:
    """Copy random INT32 numbers and compare them on the CPU. Describes the first difference, or None.

    Each attempt has new numbers, so that memory left from an earlier one cannot look like a copy.
    """
    generator = torch.Generator(source).manual_seed(0)
    for count, attempt in itertools.product(numbers, range(1, repeats + 1)):
        pattern = torch.randint(
            -(2**31), 2**31, (count,), dtype=torch.int32, device=source, generator=generator
        )
        sent, arrived = pattern.cpu(), copy(pattern, target).cpu()
        if torch.equal(sent, arrived):
            continue
        wrong = (sent != arrived).nonzero()
        first = int(wrong[0])
        return (
            f"{len(wrong)} of {count} numbers arrived wrong at attempt {attempt}, "
            f"number {first} as {int(arrived[first])} instead of {int(sent[first])}"
        )
    return None


@functools.cache
def copy_rate(source: torch.device, target: torch.device) -> float:
    """GB/s of copies from one card to another, as the forward does them."""
    tensor = torch.empty(PATTERN_NUMBERS[0], dtype=torch.int32, device=source)

    def copy() -> None:
        start_moving([tensor], target)[1]()
        torch.cuda.synchronize(target)

    copy()
    return tensor.nbytes / seconds_each(copy, target) / 1e9


def links(devices: Sequence[torch.device]) -> list[Link]:
    """A tested Link for every ordered pair of these cards."""
    return [
        Link(source, target, torch.cuda.can_device_access_peer(source, target), copy_fault(source, target))
        for source, target in itertools.permutations(devices, 2)
    ]


def _copy_directly(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Queue a direct copy, then wait for both cards, as fast code does."""
    copied = tensor.to(device, non_blocking=True)
    for card in (tensor.device, device):
        torch.cuda.synchronize(card)
    return copied
