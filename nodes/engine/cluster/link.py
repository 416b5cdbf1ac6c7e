"""ComfyUI's end of the process that Ray runs in."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import itertools
import math
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO

from ..arithmetic import ENVIRONMENT, KERNEL_SWITCH
from ..errors import FireRedError, InputError, first_line
from .frames import read_frame, write_frame

ADDRESS_VARIABLE = "RAY_ADDRESS"
TIMEOUT_VARIABLE = "FIRERED_WORKER_TIMEOUT"
DEFAULT_TIMEOUT = 60.0  # seconds
OLDEST_RAY = (2, 52)  # the first that asks for a token
LOCAL_PREFIX = "firered-ray-"  # of the folders of local Rays, with their owners' process numbers
ENGINE = Path(__file__).resolve().parents[1]
PROBE_SECONDS = 5.0
KEPT_LINES = 20  # of what the process prints


class ClusterError(FireRedError):
    """The cluster, or a worker of it, does not answer or answers something else."""


class Link:
    """A process of its own that Ray runs in. It ends with this process, however that ends."""

    def __init__(self, address: str):
        """address: of a cluster; empty for a Ray of this machine that starts and ends with this link.

        Raises FireRedError without Ray, InputError for a TIMEOUT_VARIABLE that is no number, and ClusterError
        where nothing answers at the address.
        """
        require_ray()
        self.timeout = worker_timeout()
        _require_answer(address)
        self.address = address
        self._folder = None if address else _make_folder()
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self._printed: deque[str] = deque(maxlen=KEPT_LINES)
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("bridge.py"))],
            stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True,
        )  # fmt: skip
        self._requests, self._replies = map(_binary, (self._process.stdin, self._process.stdout))
        for target in (self._read, self._keep_printed):
            threading.Thread(target=target, name="FireRed: Ray", daemon=True).start()

    @property
    def where(self) -> str:
        """Which cluster it is, for people."""
        return f"the Ray cluster at {self.address}" if self.address else "this machine's Ray"

    def connect(self) -> Future[str]:
        """Join the cluster, or start one. Gives the number of this machine's node."""
        names = (*ENVIRONMENT, KERNEL_SWITCH)
        variables = {name: os.environ[name] for name in names if name in os.environ}
        return self.ask(
            "connect",
            engine=str(ENGINE),
            address=self.address,
            folder=str(self._folder or ""),
            token=secrets.token_hex(32),
            variables=variables,
        )

    def ask(self, request: str, **arguments: Any) -> Future[Any]:
        """One of the bridge's requests. Fails with ClusterError."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            number = next(self._numbers)
            self._waiting[number] = future
            try:
                write_frame(self._requests, (number, request, arguments))
                return future
            except (OSError, ValueError):
                self._waiting.pop(number, None)
        future.set_exception(self._ended())
        return future

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End the process, and a Ray that it started. Waits for neither."""
        with self._lock, contextlib.suppress(OSError):
            self._requests.close()

    def kill(self) -> None:
        """End the process at once, also one that does not answer."""
        self._process.kill()

    def _read(self) -> None:
        with contextlib.suppress(OSError, EOFError, ValueError):
            while True:
                number, succeeded, result = read_frame(self._replies)
                with self._lock:
                    future = self._waiting.pop(number, None)
                if future is not None and succeeded:
                    future.set_result(result)
                elif future is not None:
                    future.set_exception(ClusterError(str(result)))
        self._process.wait()
        with self._lock:
            lost, self._waiting = list(self._waiting.values()), {}
        for future in lost:
            future.set_exception(self._ended())
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _keep_printed(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if text := line.decode(errors="replace").strip():
                self._printed.append(text)

    def _ended(self) -> ClusterError:
        last = next((line for line in reversed(self._printed) if "rror" in line or "ail" in line), "")
        return ClusterError(f"{self.where} ended" + (f": {last}" if last else ""))


def _binary(stream: Any) -> BinaryIO:
    assert stream is not None
    return stream


def require_ray() -> None:
    """Raise FireRedError, with what installs it, where there is no Ray."""
    if importlib.util.find_spec("ray") is None:
        raise FireRedError(
            f"devices ray needs Ray, which is not installed. Install it with: {sys.executable} -m pip "
            "install ray. Or name cards of this machine, such as gpu:0, gpu:1."
        )
    version = importlib.metadata.version("ray")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_RAY:
        raise FireRedError(
            f"Ray {version} is too old: a cluster of it has no lock. On every machine, install a newer one: "
            f"{sys.executable} -m pip install --upgrade ray."
        )


def worker_timeout() -> float:
    """Seconds without an answer, after which a worker counts as hung. Raises InputError."""
    given = os.environ.get(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT)
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds < math.inf:
        raise InputError(f"{TIMEOUT_VARIABLE} is {given!r}; set it to a number of seconds, 1 or more.")
    return seconds


def cluster_address() -> str:
    """From the environment; empty for a Ray of this machine. Raises FireRedError for a client's address."""
    address = os.environ.get(ADDRESS_VARIABLE, "").strip()
    if "://" in address:
        raise FireRedError(
            f"{ADDRESS_VARIABLE} is {address}, which is for Ray's client. Join this machine to the cluster "
            f"(ray start --address=HOST:6379) and set {ADDRESS_VARIABLE} to HOST:6379."
        )
    return "" if address == "local" else address


def reaches(host: str, port: int) -> bool:
    """Whether something accepts connections there."""
    return _refusal(host, port) is None


def _refusal(host: str, port: int) -> Exception | None:
    """Why nothing accepts connections there; None if something does."""
    try:
        socket.create_connection((host, port), PROBE_SECONDS).close()
        return None
    except (OSError, OverflowError) as error:
        return error


def _require_answer(address: str) -> None:
    """Raise ClusterError where nothing listens: Ray itself would try for half a minute."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal():  # such as auto
        return
    if (error := _refusal(host.strip("[]"), int(port))) is not None:
        raise ClusterError(
            f"Nothing answers at {ADDRESS_VARIABLE}={address} ({first_line(error)}). Start the cluster's "
            f"head there, or unset {ADDRESS_VARIABLE}."
        )


def _make_folder() -> Path:
    """A folder for a local Ray's files. It has a short path, as those of sockets must be short.

    Deletes folders whose owner was killed together with its bridge.
    """
    root = Path("/tmp" if os.name == "posix" else tempfile.gettempdir())
    for left in root.glob(f"{LOCAL_PREFIX}*"):
        owner = left.name.removeprefix(LOCAL_PREFIX).partition("-")[0]
        if owner.isdecimal() and not _runs(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{LOCAL_PREFIX}{os.getpid()}-", dir=root))


def _runs(process: int) -> bool:
    import psutil

    return psutil.pid_exists(process)
