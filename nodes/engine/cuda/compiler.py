"""Compile CUDA C++ with NVRTC, the library that torch's CUDA builds bring along (https://docs.nvidia.com/cuda/nvrtc).

Compiled kernels are kept in a cache, see keep_kernels_in.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from ..arithmetic import KERNEL_SWITCH, own_kernels_off
from ..errors import FireRedError
from ..files.cache import DiskCache, digest

SOURCES = Path(__file__).resolve().parent
OPTIONS = ("-std=c++17", "-default-device")
BINARY, CHECK = "binary", "check"  # the tensors of a kept file: the second is a digest of the first

FindCache = Callable[[], DiskCache | None]
_find_cache: FindCache = lambda: None  # noqa: E731 - keep_kernels_in replaces it


class KernelError(RuntimeError):
    """Why a kernel cannot be used here, for the log."""


def keep_kernels_in(find: FindCache) -> None:
    """Keep what this process compiles in the cache that `find` gives, and look for it there."""
    global _find_cache
    _find_cache = find


def compiled(source: str, architecture: str, macros: Mapping[str, object], driver: object) -> Iterator[bytes]:
    """A source file of this folder as a binary for one architecture, such as "sm_61".

    The first is from the cache, if it is there; whoever cannot use it takes the next, which is compiled now.
    macros: by name. driver: its version, as a binary is kept for one driver. Raises KernelError.
    """
    if own_kernels_off():
        raise KernelError(f"{KERNEL_SWITCH} switches them off")
    text, compiler = (SOURCES / source).read_text(encoding="utf-8"), nvrtc()
    options = (*OPTIONS, f"--gpu-architecture={architecture}", *(f"-D{k}={v}" for k, v in macros.items()))
    name, cache = f"kernels-{digest(text, options, compiler.version, driver)}", _cache()
    kept = (cache.read(name) if cache else None) or {}
    if BINARY in kept and CHECK in kept and torch.equal(kept[CHECK], _check(kept[BINARY])):
        yield kept[BINARY].numpy().tobytes()
    binary = compiler.compile(text, source, options).binary
    if cache:
        tensor = _bytes(binary)
        with suppress(OSError, RuntimeError):  # without a file, it is compiled again the next time
            cache.write(name, {BINARY: tensor, CHECK: _check(tensor)})
    yield binary


def _cache() -> DiskCache | None:
    try:
        return _find_cache()
    except FireRedError:  # its settings are wrong, which others tell
        return None


def _bytes(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _check(binary: torch.Tensor) -> torch.Tensor:
    return _bytes(digest(binary).encode())


class Compilation(NamedTuple):
    """A compiled program. log: what the compiler said, such as each kernel's registers."""

    binary: bytes
    log: str


class Nvrtc:
    """The compiler's library. Raises KernelError when it cannot be used."""

    def __init__(self, path: str):
        try:
            for builtins in _builtins(Path(path)):
                ctypes.CDLL(builtins)
            self._library = ctypes.CDLL(path)
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            major, minor = ctypes.c_int(), ctypes.c_int()
            self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        except (OSError, AttributeError) as error:
            raise KernelError(f"{path} cannot be used ({error})") from error
        self.version = major.value, minor.value

    def compile(self, text: str, name: str, options: tuple[str, ...]) -> Compilation:
        """Raises KernelError with the compiler's first complaint."""
        library, program = self._library, ctypes.c_void_p()
        self._check(library.nvrtcCreateProgram(
            ctypes.byref(program), text.encode(), name.encode(), 0, None, None
        ))  # fmt: skip
        try:
            array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            result = library.nvrtcCompileProgram(program, len(options), array)
            log = self._text("ProgramLog", program).rstrip(b"\0").decode(errors="replace")
            if result:
                raise KernelError(f"NVRTC {self.version}: {_complaint(log) or self._error(result)}")
            return Compilation(self._text("CUBIN", program), log)
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _error(self, result: int) -> str:
        return str(self._library.nvrtcGetErrorString(result).decode())

    def _check(self, result: int) -> None:
        if result:
            raise KernelError(f"NVRTC: {self._error(result)}")


def _builtins(library: Path) -> list[str]:
    """What the library loads when it compiles. Some releases do not look for it beside themselves, and torch
    loads that of another release where there are two.
    """
    beside = library.parent.glob("*nvrtc-builtins*") if library.is_absolute() else ()
    return [str(path) for path in beside if ".alt." not in path.name]


def _complaint(log: str) -> str:
    """The first line with an error."""
    return next((line.strip() for line in log.splitlines() if "error" in line), "")


@functools.cache
def nvrtc() -> Nvrtc:
    """The compiler of this torch's CUDA. Raises KernelError where there is none of the same major version."""
    if torch.version.cuda is None:
        raise KernelError("this torch is not built for CUDA")
    return find_nvrtc(torch.version.cuda.partition(".")[0], Path(torch.__file__).resolve().parents[1])


def find_nvrtc(major: str, site: Path) -> Nvrtc:
    """The compiler of that major version, from that folder of packages or the system. Raises KernelError."""
    faults = []
    for path in _libraries(major, site):
        try:
            found = Nvrtc(path)
        except KernelError as error:
            faults.append(str(error))
            continue
        if found.version[0] == int(major):
            return found
        faults.append(f"{path} is version {found.version}")
    raise KernelError(f"there is no NVRTC {major}: {'; '.join(faults)}")


def _libraries(major: str, site: Path) -> Iterator[str]:
    """Where NVRTC may be: in NVIDIA's wheels beside torch, in torch's folder, or where the system looks."""
    if sys.platform == "win32":
        folders, name = ("torch/lib", "nvidia/*/bin", "nvidia/*/bin/*"), f"nvrtc64_{major}*_0.dll"
    else:
        folders, name = ("nvidia/*/lib", "torch/lib"), f"libnvrtc*.so.{major}*"
    for folder in folders:
        for path in sorted(site.glob(f"{folder}/{name}")):
            if not re.search(r"builtins|\.alt\.", path.name):
                yield str(path)
    yield f"nvrtc64_{major}0_0.dll" if sys.platform == "win32" else f"libnvrtc.so.{major}"
