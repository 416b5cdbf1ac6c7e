"""The devices of this machine as ComfyUI sees them."""

from __future__ import annotations

import functools
import logging
import re
import time

import torch
from comfy.cli_args import args

from ..engine.cards.card import Card
from ..engine.cards.preflight import preflight, unfused_attention
from ..engine.planning.machine import Device, Machine, unusable
from ..engine.units import GIB

log = logging.getLogger("FireRed")

DEVICE_LABEL = re.compile(r"auto|cpu|gpu:\d+")
RETRY_SECONDS = 60.0  # after which a card that could not be used is asked again


class DeviceLabels(list[str]):
    """The devices to choose from; one that another machine has is among them, and falls back to `auto`."""

    def __contains__(self, label: object) -> bool:
        return isinstance(label, str) and DEVICE_LABEL.fullmatch(label) is not None


def device_labels() -> DeviceLabels:
    """`auto`, `cpu`, and `gpu:N` for every accelerator of this machine."""
    return DeviceLabels(["auto", "cpu", *(f"gpu:{index}" for index in range(len(accelerators())))])


def machine() -> Machine:
    """This machine as each part of it was when first asked: answers must not change with what is free then.

    Its cards are tested and measured, which takes seconds once.
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
    return Machine(gpus, Device(card, memory), unified)


_faulty: dict[torch.device, tuple[float, Device]] = {}  # since when, on the monotonic clock


def _describe_device(label: str, device: torch.device) -> Device:
    """An accelerator as a place for components; one that cannot be used now is one with a fault.

    A card with a fault is asked again after RETRY_SECONDS: it may have been full, or in somebody's hands.
    """
    since, described = _faulty.get(device, (0.0, None))
    if described is not None and time.monotonic() - since < RETRY_SECONDS:
        return described
    try:
        return _measure_device(label, device)
    except Exception as error:  # a driver raises whatever it likes
        faulty = unusable(label, device, error)
    if described != faulty:
        log.warning("%s is not used: %s", label, faulty.fault)
    _faulty[device] = time.monotonic(), faulty
    return faulty


@functools.cache
def _measure_device(label: str, device: torch.device) -> Device:
    import comfy.model_management as mm

    report, memory = preflight(device), mm.get_total_memory(device)
    native_bf16, unfused = report.speeds.bf16 is not None, unfused_attention(device)
    card = Card(label, _card_model(device), device, native_bf16, memory, unfused=unfused)
    free = min(memory, free_memory(device, evicting=True)) - int((args.reserve_vram or 0) * GIB)
    return Device(card, free, report.speeds, measured=True, integrated=_is_integrated(device))


def _card_model(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _is_integrated(device: torch.device) -> bool:
    return device.type == "cuda" and bool(torch.cuda.get_device_properties(device).is_integrated)


def accelerators() -> list[torch.device]:
    import comfy.model_management as mm

    return [device for device in mm.get_all_torch_devices() if device.type != "cpu"]


def free_memory(device: torch.device, evicting: bool = False) -> int:
    """Bytes free on the device now, or with every model `evicting` could remove."""
    import comfy.model_management as mm

    mm.cleanup_models_gc()
    ours = [model for model in mm.current_loaded_models if model.device == device and model.model is not None]
    evictable = sum(model.model_loaded_memory() for model in ours) if evicting else 0
    return int(mm.get_free_memory(device)) + evictable
