"""Descriptions of machines, to test plans for hardware that the tests do not run on."""

from __future__ import annotations

import torch
from engine.cards.card import Card
from engine.cards.speeds import Speeds
from engine.planning.machine import Device, Machine
from engine.units import GIB

# One H100 80GB, 8442 tokens: TFLOPS from the seconds of products and attention in each mode's forward.
LINEAR_TFLOP, ATTENTION_TFLOP = 114.7, 52.6
H100 = Speeds(
    fp32=LINEAR_TFLOP / 2.19,
    fp32_attention=ATTENTION_TFLOP / 1.16,
    bf16=LINEAR_TFLOP / 0.16,
    bf16_attention=ATTENTION_TFLOP / 0.09,
    int8=LINEAR_TFLOP / 0.15,
    bandwidth=3000.0,
)
# Nobody measured one: matrix products at 85 % of the peak, the FP32 attention kernel at 45 %, our own kernels
# as docs/pascal.md projects them at the base clock, and the bandwidth of the data sheet.
P40 = Speeds(fp32=10.0, fp32_attention=5.3, int8=30.0, int8_attention=23.0, row_kernels=True, bandwidth=310.0)

COPY_RATE = 6.0  # GB/s between two P40s, assumed: PCIe 3.0 with 8 lanes, or 16 through the host


def cpu_machine() -> Machine:
    """One without accelerators."""
    return Machine(
        (), Device(Card("cpu", "cpu", torch.device("cpu"), False, 2**36, is_gpu=False), 2**36), False
    )


def gpu(
    index: int,
    name: str,
    gib: float,
    native_bf16: bool,
    speeds: Speeds | None = None,
    measured: bool = False,
) -> Device:
    memory = int(gib * GIB)
    return Device(
        Card(f"gpu:{index}", name, torch.device("cuda", index), native_bf16, memory), memory, speeds, measured
    )


def cpu(gib: int) -> Device:
    return Device(
        Card("cpu", "cpu", torch.device("cpu"), native_bf16=False, memory=gib * GIB, is_gpu=False), gib * GIB
    )


def machine_of(*cards: Device, unified: bool = False) -> Machine:
    return Machine(cards, cpu(64), unified)


def p40s(count: int, speeds: Speeds = P40, measured: bool = False) -> Machine:
    cards = (gpu(index, "Tesla P40", 23.9, False, speeds, measured) for index in range(count))
    return Machine(tuple(cards), cpu(64), copy_rate=COPY_RATE)


MACHINES = {
    "four P40": p40s(4),
    "two unequal cards": Machine((gpu(0, "RTX 3060", 11.9, True), gpu(1, "RTX 3090", 23.7, True)), cpu(64)),
    "one 24 GB card": Machine((gpu(0, "RTX 4090", 23.6, True),), cpu(64)),
    "one 16 GB card": Machine((gpu(0, "RTX 4080", 15.7, True),), cpu(32)),
    "one 80 GB card": Machine((gpu(0, "H100", 79.2, True, H100, measured=True),), cpu(256)),
    "96 GB of unified memory": Machine((gpu(0, "Radeon 8060S", 96, True),), cpu(96), unified=True),
    "64 GB and no GPU": Machine((), cpu(64)),
}
