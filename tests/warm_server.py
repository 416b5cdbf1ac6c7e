"""Servers that start in a few seconds: most of a start is the import of libraries, which is done once.

ComfyUI itself and the nodes are imported by each server. test_run.py, test_versions.py and test_comfy_test.py
start servers from nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

from launcher import server

_ordering = threading.Lock()


class Forked(psutil.Process):
    """A process that `warm_start` forked, with what a Server uses of subprocess.Popen."""

    def poll(self) -> int | None:
        return None if self.is_running() else 0  # whose child it is not cannot know its code

    def wait(self, timeout: float | None = None) -> int:  # type: ignore[override]
        try:
            super().wait(timeout)
        except psutil.TimeoutExpired as error:
            raise subprocess.TimeoutExpired("ComfyUI", error.seconds) from None
        return 0

    def kill(self) -> None:
        with suppress(psutil.NoSuchProcess):
            super().kill()

    def terminate(self) -> None:
        with suppress(psutil.NoSuchProcess):
            super().terminate()


class WarmServer(server.Server):
    def start(self) -> subprocess.Popen[bytes]:
        order = dict(
            command=self.command, folder=str(self.comfyui), environment=self.environment, log=str(self.log)
        )
        with _ordering:
            process = _warm()
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            return Forked(int(process.stdout.readline()))  # type: ignore[return-value]


@cache
def _warm() -> subprocess.Popen[str]:
    """The process that forks, which ends with this one."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("warm_start.py"))],
        env=server.clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


Server = WarmServer if hasattr(os, "fork") else server.Server
