"""Load compiled kernels onto a card and launch them on torch's current stream, by the driver's library."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Mapping
from typing import Any

import torch

from ..cards.kernels import as_current
from .compiler import KernelError, compiled


class Pointer(int):
    """An address in a card's memory."""


# A kernel's parameter: a tensor's memory, an address, a null pointer, a 32-bit integer or an FP32 number.
Argument = torch.Tensor | Pointer | None | int | float


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

    def __call__(self, grid: tuple[int, ...], threads: int, *arguments: Argument) -> None:
        """Queue it on the card's current stream. The card is the current one. Raises RuntimeError."""
        values = [_parameter(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        stream = torch.cuda.current_stream(self._device).cuda_stream
        columns, *others = grid
        rows = others[0] if others else 1
        layers = others[1] if len(others) > 1 else 1
        result = self._launch(self._function, columns, rows, layers, threads, 1, 1, 0, stream, pointers, None)
        if result:
            raise RuntimeError(f"CUDA error: {self._name} could not be launched ({result})")


def _parameter(argument: Argument) -> Any:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, Pointer):
        return ctypes.c_void_p(argument)
    return ctypes.c_int(argument) if isinstance(argument, int) else ctypes.c_float(argument)


class Module:
    """A source file of this folder, compiled for a card and loaded onto it. Raises KernelError."""

    def __init__(self, source: str, device: torch.device, macros: Mapping[str, object] | None = None):
        if device.type != "cuda" or torch.version.hip:
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
