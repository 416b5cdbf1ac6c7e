"""Start a ComfyUI process with this pack, and end it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import torch

from launcher.client import Client, ServerError
from launcher.folders import comfyui_folder, extra_model_paths, prepare_work_folder

START_SECONDS = 180


class Server:
    """A context manager that starts ComfyUI on a free port, waits for its first answer, and ends it.

    Raises ServerError when ComfyUI does not answer within START_SECONDS or ends at once.
    """

    def __init__(self, work: Path, arguments: tuple[str, ...] = ()):
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        self.log = work / f"server-{port}.log"
        self.comfyui = comfyui_folder()
        prepare_work_folder(self.comfyui, work)
        self.command = server_command(self.comfyui, work, port, arguments)
        self.environment = clean_environment()

    def __enter__(self) -> Server:
        self.process = self.start()
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.client.get("/system_stats")
                return self
            except (aiohttp.ClientError, OSError):
                time.sleep(0.2)
        code = self.process.poll()
        self.__exit__()
        happened = (
            f"did not start within {START_SECONDS} s" if code is None else f"ended at once with code {code}"
        )
        raise ServerError(f"ComfyUI {happened}. The end of {self.log}:\n{self.tail()}")

    def start(self) -> subprocess.Popen[bytes]:
        """The process that runs ComfyUI and writes the log."""
        with self.log.open("w", encoding="utf-8") as log:
            return subprocess.Popen(
                self.command, cwd=self.comfyui, env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def client(self) -> Client:
        return Client(self.address)

    def tail(self) -> str:
        """The last lines of the log."""
        return "\n".join(self.text().splitlines()[-20:])

    def text(self) -> str:
        """What the server has logged so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def server_command(comfyui: Path, work: Path, port: int, arguments: tuple[str, ...] = ()) -> list[str]:
    """The command line that starts ComfyUI with its own models too; on the CPU if there is no accelerator."""
    command = [sys.executable, str(comfyui / "main.py"), "--base-directory", str(work), "--port", str(port)]
    command += ["--database-url", f"sqlite:///{(work / 'user' / 'comfyui.db').as_posix()}"]
    command += ["--extra-model-paths-config", str(extra_model_paths(work)), "--disable-auto-launch"]
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
    return [*command, *(() if accelerated else ("--cpu",)), *arguments]


def clean_environment() -> dict[str, str]:
    """This process's variables without PYTHONPATH, in which ComfyUI would find the tests' modules."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def free_port() -> int:
    """A TCP port that no program listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
