"""The devices of this machine, as ComfyUI lists them."""

from __future__ import annotations

import functools
import itertools
import logging
import re
import time
from collections.abc import Sequence

import torch
from comfy.cli_args import args

from ..engine.cards.card import Card
from ..engine.cards.preflight import preflight, unfused_attention
from ..engine.cards.transfer import copy_rate
from ..engine.cuda.speeds import kernel_rates, with_kernels
from ..engine.planning.machine import Device, Machine, unusable
from ..engine.units import GIB

log = logging.getLogger("FireRed")

DEVICE_LABEL = re.compile(r"auto|cpu|gpu:\d+")
RETRY_SECONDS = 60.0  # until a card with a fault is tested again


class DeviceLabels(list[str]):
    """The devices to choose from. `in` accepts labels of other machines too: they fall back to `auto`."""

    def __contains__(self, label: object) -> bool:
        return isinstance(label, str) and DEVICE_LABEL.fullmatch(label) is not None


def device_labels() -> DeviceLabels:
    """`auto`, `cpu`, and `gpu:N` for every accelerator of this machine."""
    return DeviceLabels(["auto", "cpu", *(f"gpu:{index}" for index in range(len(accelerators())))])


def machine() -> Machine:
    """This machine: its cards and CPU, each as the first call in this process found it.

    Later changes in free memory must not change the plan. The first call takes seconds: it tests each card.
    """
    import comfy.model_management as mm

    cpu, native_bf16 = torch.device("cpu"), mm.should_use_bf16(torch.device("cpu"))
    memory = mm.get_total_memory(cpu)
    gpus = tuple(_describe_device(f"gpu:{index}", device) for index, device in enumerate(accelerators()))
    answering = [gpu for gpu in gpus if not gpu.fault]
    unified = mm.cpu_state == mm.CPUState.MPS or (
        bool(answering) and all(gpu.integrated for gpu in answering)
    )
    card = Card("cpu", "cpu", cpu, native_bf16, memory, is_gpu=False, unfused=unfused_attention(cpu))
    return Machine(gpus, Device(card, memory), unified, _copy_rate(answering))


def _copy_rate(gpus: Sequence[Device]) -> float | None:
    """GB/s between the two cards that are the slowest at it, in one direction."""
    cards = [gpu.card.device for gpu in gpus if gpu.card.device.type == "cuda"]
    try:
        return min((copy_rate(*pair) for pair in itertools.permutations(cards, 2)), default=None)
    except RuntimeError:  # a card is full now
        return None


_faulty: dict[torch.device, tuple[float, Device]] = {}  # when tested, on the monotonic clock


def _describe_device(label: str, device: torch.device) -> Device:
    """The accelerator with its memory and speeds, or with the fault that makes it unusable now.

    A card with a fault is tested again after RETRY_SECONDS: another program may have filled it.
    """
    since, described = _faulty.get(device, (0.0, None))
    if described is not None and time.monotonic() - since < RETRY_SECONDS:
        return described
    try:
        return _measure_device(label, device)
    except Exception as error:  # drivers raise many types
        faulty = unusable(label, device, error)
    if described != faulty:
        log.warning("%s is not used: %s", label, faulty.fault)
    _faulty[device] = time.monotonic(), faulty
    return faulty


@functools.cache
def _measure_device(label: str, device: torch.device) -> Device:
    import comfy.model_management as mm

    report, memory = preflight(device), mm.get_total_memory(device)
    speeds = with_kernels(report.speeds, kernel_rates(device))
    native_bf16, unfused = report.speeds.bf16 is not None, unfused_attention(device)
    card = Card(label, _card_model(device), device, native_bf16, memory, unfused=unfused)
    free = min(memory, free_memory(device, evicting=True)) - int((args.reserve_vram or 0) * GIB)
    return Device(card, free, speeds, measured=True, integrated=_is_integrated(device))


def _card_model(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _is_integrated(device: torch.device) -> bool:
    return device.type == "cuda" and bool(torch.cuda.get_device_properties(device).is_integrated)


def accelerators() -> list[torch.device]:
    """Every device that ComfyUI lists but the CPU. `gpu:N` counts them."""
    import comfy.model_management as mm

    return [device for device in mm.get_all_torch_devices() if device.type != "cpu"]


def free_memory(device: torch.device, evicting: bool = False) -> int:
    """Bytes free on the device. evicting: count the models that ComfyUI could unload as free."""
    import comfy.model_management as mm

    mm.cleanup_models_gc()
    ours = [model for model in mm.current_loaded_models if model.device == device and model.model is not None]
    evictable = sum(model.model_loaded_memory() for model in ours) if evicting else 0
    return int(mm.get_free_memory(device)) + evictable
