"""What this machine's cards can do, as a table to paste into an issue: speeds, memory, copies between cards,
and a projection of the seconds a step takes.

Usage: python hardware.py    (what `run.py bench` runs)
"""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import psutil
import torch
from engine.cards.card import Card
from engine.cards.kernels import device_label
from engine.cards.preflight import CardReport, Rate, preflight
from engine.cards.speeds import Speeds
from engine.cards.transfer import links
from engine.cuda.speeds import ATTENTION, PRODUCT, kernel_rates, with_kernels
from engine.errors import FireRedError
from engine.limits import EXACT, INT8
from engine.units import GIB
from engine.weights.estimates import Edit, Shape, step_seconds
from engine.weights.precision import PRECISIONS, resolve
from machines import P40

SHAPE = Shape(layers=60, width=3072)  # FireRed's transformer
PRECISIONS_SHOWN = ("fp32", "bf16", "int8", "int8-fast", "nf4")
LAYOUTS = {1: "1 card", 2: "CFG over 2 cards"}


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    reports = []
    for device in find_devices():
        try:
            reports.append(with_our_kernels(preflight(device)))
        except FireRedError as error:
            print(f"{device_label(device)} is left out. {error}\n")
    print(
        f"torch {torch.__version__}, driver {driver_version()}, Python {platform.python_version()}, "
        f"{platform.platform()}; host memory {memory_of(torch.device('cpu'))}\n"
    )
    if not reports:
        return 1
    for number, report in enumerate(reports, 1):
        print(f"{number}. {report.card}: {memory_of(report.device)}, measured in {report.seconds:.1f} s")
    print_table(
        "TFLOPS, copy in TB/s", [str(number) for number in range(1, len(reports) + 1)], speed_rows(reports)
    )
    print("".join(f"\n- {', '.join(names)}: {reason}" for reason, names in reasons(reports).items()))
    if any("P40" in report.card for report in reports):
        print(
            f"\nProjected for a P40 (docs/pascal.md): {PRODUCT} {P40.int8:g}, {ATTENTION} "
            f"{P40.int8_attention:g}. Please report this table: nobody has measured one."
        )
    cards = [report.device for report in reports if report.device.type == "cuda"]
    if len(cards) > 1:
        print_table("copies", ["bit for bit", "peer access"], copy_rows(cards))
    slowest = min((report.speeds for report in reports), key=lambda speeds: speeds.fp32)
    columns = [name for cards, name in LAYOUTS.items() if cards <= len(reports)]
    print_table("Projected s/step (not measured)", columns, projection_rows(slowest, len(reports)))
    return 0


def with_our_kernels(report: CardReport) -> CardReport:
    rates = kernel_rates(report.device)
    return replace(report, speeds=with_kernels(report.speeds, rates), rates=(*report.rates, *rates))


def find_devices() -> list[torch.device]:
    """Every accelerator, or the CPU where there is none."""
    if not torch.accelerator.is_available():
        return [torch.device("cpu")]
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())]


def memory_of(device: torch.device) -> str:
    """What is free of the device's memory, or of the host's for the CPU."""
    try:
        if device.type == "cpu":
            free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
        else:
            free, total = getattr(torch, device.type).mem_get_info(device)
    except (AttributeError, RuntimeError):  # MPS, and some integrated GPUs
        return "memory unknown"
    return f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"


def driver_version() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        return answer.split()[0]
    except (OSError, IndexError, subprocess.SubprocessError):
        return "none"


def speed_rows(reports: Sequence[CardReport]) -> list[list[str]]:
    """A row for each kind of work, a column for each card."""
    return [
        [row[0].name, *(shown(rate, report.speeds) for rate, report in zip(row, reports, strict=True))]
        for row in zip(*(report.rates for report in reports), strict=True)
    ]


def shown(rate: Rate, speeds: Speeds) -> str:
    if rate.tflops is None:
        return "-"
    dtype = rate.name.removeprefix("matmul ")
    emulated = dtype in ("bf16", "fp16") and getattr(speeds, dtype) is None
    return f"{rate.tflops:.4g}" + (" (not native)" if emulated else "")


def reasons(reports: Sequence[CardReport]) -> dict[str, list[str]]:
    """Why cells are empty: each reason once, with its rows."""
    told: dict[str, list[str]] = {}
    for report in reports:
        for rate in report.rates:
            if rate.reason and rate.name not in told.setdefault(rate.reason, []):
                told[rate.reason].append(rate.name)
    return told


def copy_rows(devices: Sequence[torch.device]) -> list[list[str]]:
    return [
        [
            f"{device_label(link.source)} to {device_label(link.target)}",
            f"no, goes through host memory: {link.fault}" if link.fault else "yes",
            "yes" if link.peer_access else "no",
        ]
        for link in links(devices)
    ]


def projection_rows(speeds: Speeds, cards: int) -> list[list[str]]:
    """Seconds a step takes at 1024x1024 with one 1 MP reference and true CFG, a column a layout."""
    card = Card("gpu:0", "", torch.device("cpu"), native_bf16=speeds.bf16 is not None, memory=0)
    rows = []
    for name, attention in (*((name, EXACT) for name in PRECISIONS_SHOWN), ("int8-fast", INT8)):
        row = resolve(PRECISIONS[name], card)
        alone = step_seconds(speeds, SHAPE, Edit(), row, attention)
        if alone:
            shown = f"{name}, attention int8" if attention == INT8 else name
            rows.append([shown, *(f"{alone / count:.3g}" for count in LAYOUTS if count <= cards)])
    return rows


def print_table(corner: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n| {' | '.join((corner, *columns))} |\n|{'---|' * (1 + len(columns))}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    sys.exit(main())
