"""Load compiled kernels onto a card and launch them on torch's current stream, by the driver's library."""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from ..cards.kernels import as_current
from .compiler import KernelError, compiled

log = logging.getLogger("FireRed")

T = TypeVar("T")
# A kernel's parameter: a tensor's memory, an address or a null pointer, a 32-bit integer, an FP32 number.
Argument = torch.Tensor | int | None | float


@functools.cache
def _driver() -> Any:
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise KernelError(f"the driver's library cannot be used ({error})") from error
    launch = library.cuLaunchKernel
    launch.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]
    return library


def driver_version() -> int:
    """Of the CUDA that the driver knows, such as 12080. Raises KernelError."""
    version = ctypes.c_int()
    _check(_driver().cuDriverGetVersion(ctypes.byref(version)), "asking for the driver's version")
    return version.value


def _check(result: int, what: str) -> None:
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise KernelError(f"{what}: {(text.value or b'error').decode()} ({result})")


class Kernel:
    """A kernel on one card."""

    def __init__(self, function: ctypes.c_void_p, name: str, device: torch.device):
        self._function, self._name, self._device = function, name, device
        self._launch = _driver().cuLaunchKernel

    def __call__(self, grid: tuple[int, int, int], threads: int, *arguments: Argument) -> None:
        """Queue it on the card's current stream. The card is the current one. Raises RuntimeError."""
        if 0 in grid:  # nothing to do, which the driver refuses
            return
        count = len(arguments)
        values = (ctypes.c_uint64 * count)(*map(_bits, arguments))  # little-endian: the low bytes come first
        first = ctypes.addressof(values)
        pointers = (ctypes.c_void_p * count)(*range(first, first + 8 * count, 8))
        stream = torch.cuda.current_stream(self._device).cuda_stream
        result = self._launch(self._function, *grid, threads, 1, 1, 0, stream, pointers, None)
        if result:
            raise RuntimeError(f"CUDA error: {self._name} could not be launched ({result})")


def _bits(argument: Argument) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    if isinstance(argument, float):
        return int.from_bytes(struct.pack("<f", argument), "little")
    return argument or 0  # ctypes cuts an integer to its low bits


class Module:
    """A source file of this folder, compiled for a card and loaded onto it. Raises KernelError."""

    def __init__(self, source: str, device: torch.device, macros: Mapping[str, object] | None = None):
        if not are_for(device):
            raise KernelError("these kernels are for NVIDIA's cards")
        major, minor = torch.cuda.get_device_capability(device)
        self._device, self._module = device, ctypes.c_void_p()
        with as_current(device):
            torch.zeros(1, device=device)  # makes torch's context the current one
            for binary in compiled(source, f"sm_{major}{minor}", macros or {}, driver_version()):
                result = _driver().cuModuleLoadData(ctypes.byref(self._module), binary)
                if not result:
                    break
        _check(result, f"loading {source}")

    def kernel(self, name: str) -> Kernel:
        function = ctypes.c_void_p()
        with as_current(self._device):
            result = _driver().cuModuleGetFunction(ctypes.byref(function), self._module, name.encode())
        _check(result, name)
        return Kernel(function, name, self._device)


def are_for(device: torch.device) -> bool:
    """Whether our kernels are for this kind of device: NVIDIA's cards."""
    return device.type == "cuda" and not torch.version.hip


def if_they_pass(
    device: torch.device, what: str, load: Callable[[torch.device], T], fault: Callable[[T], str]
) -> T | None:
    """What `load` gives, if `fault` finds none in it on that card. Else None; `what` and why are logged.

    Raises OutOfMemoryError: a card that is full now may run them later.
    """
    if not are_for(device):
        return None
    try:
        kernels = load(device)
        with as_current(device):
            if found := fault(kernels):
                raise KernelError(found)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # they do not compile, load or start, or compute wrong
        log.info("%s: %s (%s)", device, what, error)
        return None
    return kernels
