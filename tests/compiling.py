"""Our CUDA kernels, compiled for Pascal without such a card, by the NVRTC 12 that run.py installs."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from engine.cuda.compiler import OPTIONS, SOURCES, Compilation, Nvrtc, find_nvrtc
from engine.cuda.rows import EPS, MACROS

OLD_COMPILER = Path(sys.prefix) / "nvrtc-12"
EPSILON = {"EPS": f"{EPS}f"}
# Each source, with its macros: rows.cu for FP32 and BF16.
ALL = [
    ("attention.cu", {}),
    ("product.cu", {}),
    *(("rows.cu", EPSILON | MACROS[dtype]) for dtype in (torch.float32, torch.bfloat16)),
]


@functools.cache
def old_nvrtc() -> Nvrtc:
    """NVRTC 12.6."""
    return find_nvrtc("12", OLD_COMPILER)


def compile_for(architecture: str, source: str, macros: Mapping[str, object]) -> Compilation:
    """A source file, with each kernel's registers in the log. architecture: such as "sm_61"."""
    options = *OPTIONS, f"--gpu-architecture={architecture}", "--ptxas-options=-v"
    text = (SOURCES / source).read_text(encoding="utf-8")
    return old_nvrtc().compile(text, source, (*options, *(f"-D{k}={v}" for k, v in macros.items())))


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: registers of a thread, bytes of shared memory of a block, bytes spilled."""

    registers: int
    shared: int
    spilled: int

    def blocks(self, threads: int) -> int:
        """How many blocks of so many threads fit on a multiprocessor of a P40."""
        of_warp = -(-self.registers * 32 // 256) * 256  # given out in portions of 256
        return min(65536 // (of_warp * -(-threads // 32)), 98304 // max(self.shared, 1))


def resources(log: str) -> dict[str, Resources]:
    """By kernel, from a compilation's log."""
    found = {}
    for name, text in re.findall(
        r"Compiling entry function '(\w+)'(.*?Used .*?)$", log, re.DOTALL | re.MULTILINE
    ):
        spilled = [int(number) for number in re.findall(r"(\d+) bytes spill", text)]
        (registers,) = re.findall(r"Used (\d+) registers", text)
        shared = sum(int(number) for number in re.findall(r"(\d+) bytes smem", text))
        assert spilled, text
        found[name] = Resources(int(registers), shared, sum(spilled))
    return found
