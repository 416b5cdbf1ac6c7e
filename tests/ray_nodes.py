"""Ray clusters for tests: several nodes on this machine, each like a machine of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from prompts import soon

from launcher.server import free_port

TOKEN = "a" * 64
START_SECONDS = 120


class Node:
    """A Ray node: `ray start` and all processes below it."""

    def __init__(self, folder: Path, address: str = "", cards: int = 0, **variables: str):
        """address: of the head; empty for a head. folder: short, for sockets. cards: as many as Ray is told
        of; there need not be any.
        """
        self.address = address or f"127.0.0.1:{free_port()}"
        self.environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN} | variables
        self.environment.pop("RAY_ADDRESS", None)
        role = ["--address", self.address]
        if not address:
            role = ["--head", "--port", self.address.rpartition(":")[2], "--temp-dir", str(folder)]
        command = [Path(sys.executable).with_name("ray"), "start", *role, "--block", "--num-gpus", str(cards)]
        command += ["--num-cpus", "1", "--object-store-memory", "100000000", "--disable-usage-stats"]
        command += ["--include-dashboard", "false"] if not address else []
        self.log = folder / f"node-{time.monotonic_ns()}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in self.log.read_text():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"the Ray node did not start: {self.log.read_text()}")
            time.sleep(0.1)

    def kill(self) -> None:
        """End it as a power cut would."""
        for process in [*family(self.process.pid), self.process]:
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                os.kill(process.pid, signal.SIGKILL)
        self.process.wait()


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Raise AssertionError unless it holds in time."""
    assert soon(condition, seconds)


def family(pid: int) -> list[psutil.Process]:
    """All processes below one."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@contextmanager
def ray_variables(**variables: str) -> Iterator[None]:
    """Environment variables of this process, inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def listening(pids: list[int]) -> set[Any]:
    """The addresses at which these processes listen."""
    found = (each for each in psutil.net_connections("inet") if each.pid in pids)
    return {each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN}
