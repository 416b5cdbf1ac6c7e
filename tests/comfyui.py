"""A real ComfyUI with this pack in it: start it, submit prompts over HTTP, follow them over the websocket.

Usage: python tests/comfyui.py [--port N] [COMFYUI ARGUMENTS]    (what `run.py serve` runs)
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import torch

ROOT = Path(__file__).resolve().parent.parent
PACK_FOLDER = "firered-image-edit"
START_SECONDS = 180

Prompt = dict[str, dict[str, Any]]


class ServerError(Exception):
    """ComfyUI did not start or ended while it was needed; the message holds the end of its log."""


class PromptRejected(Exception):
    """The server refused a prompt with HTTP 400; `answer` is its JSON."""

    def __init__(self, answer: dict[str, Any]):
        super().__init__(str(answer))
        self.answer = answer

    @property
    def reasons(self) -> list[str]:
        """One line a problem: the node and what is wrong."""
        found = self.answer.get("node_errors") or {}
        listed = [
            f"{node['class_type']}: {error['details']}" for node in found.values() for error in node["errors"]
        ]
        return listed or [str(self.answer.get("error"))]


@dataclass
class Run:
    """A prompt that ran, with the websocket's (type, data) events and how many previews came."""

    prompt_id: str
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    previews: int = 0
    outputs: dict[str, Any] = field(default_factory=dict)
    status: str = ""

    @property
    def error(self) -> dict[str, Any] | None:
        """Node type, exception type and message of the execution error, if there was one."""
        return next((data for name, data in self.events if name == "execution_error"), None)

    def progress(self, node: str) -> list[tuple[int, int]]:
        """The (value, max) pairs that node reported."""
        return [
            (data["value"], data["max"])
            for name, data in self.events
            if name == "progress" and data["node"] == node
        ]

    @property
    def executed(self) -> list[str]:
        """The nodes that ran, in order; nodes answered from ComfyUI's cache are not among them."""
        return [data["node"] for name, data in self.events if name == "executing" and data["node"]]


def wait_for(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The coroutine's result, also where an event loop is running already (a browser test's, say)."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


class Client:
    """Talks to a running server."""

    def __init__(self, address: str):
        self.address = address

    def get(self, path: str) -> Any:
        """A GET request's JSON."""
        return wait_for(self._request("get", path))

    def post(self, path: str, **arguments: Any) -> Any:
        """A POST request's JSON (None for an empty answer)."""
        return wait_for(self._request("post", path, **arguments))

    def image(self, described: dict[str, str]) -> bytes:
        """The bytes of an image as /history describes it."""
        return wait_for(self._bytes("/view", described))

    def run(
        self,
        prompt: Prompt,
        on_event: Callable[[str, dict[str, Any]], None] = lambda name, data: None,
        only: tuple[str, ...] = (),
    ) -> Run:
        """Queue a prompt and wait for its end. Raises PromptRejected when it was not even queued.

        only: the output nodes to run, where not all.
        """
        return wait_for(self._run(prompt, on_event, only))

    async def _request(self, method: str, path: str, **arguments: Any) -> Any:
        async with (
            aiohttp.ClientSession(self.address) as session,
            session.request(method, path, **arguments) as answer,
        ):
            answer.raise_for_status()
            return await answer.json(content_type=None) if await answer.read() else None

    async def _bytes(self, path: str, params: dict[str, str]) -> bytes:
        async with aiohttp.ClientSession(self.address) as session, session.get(path, params=params) as answer:
            answer.raise_for_status()
            return await answer.read()

    async def _run(
        self, prompt: Prompt, on_event: Callable[[str, dict[str, Any]], None], only: tuple[str, ...]
    ) -> Run:
        client_id = uuid.uuid4().hex
        async with (
            aiohttp.ClientSession(self.address) as session,
            session.ws_connect(f"/ws?clientId={client_id}", max_msg_size=0) as socket_,
        ):
            queued = {"prompt": prompt, "client_id": client_id}
            queued |= {"partial_execution_targets": only} if only else {}
            async with session.post("/prompt", json=queued) as answer:
                body = await answer.json()
                if answer.status != 200:
                    raise PromptRejected(body)
            run = Run(body["prompt_id"])
            async for message in socket_:
                if message.type == aiohttp.WSMsgType.BINARY:
                    run.previews += 1
                    continue
                name, data = (event := message.json())["type"], event["data"]
                if data.get("prompt_id") != run.prompt_id:
                    continue
                run.events.append((name, data))
                on_event(name, data)
                if name in ("execution_success", "execution_error", "execution_interrupted"):
                    run.status = name.removeprefix("execution_")
                    break
            if not run.status:
                raise ServerError(
                    "ComfyUI closed the connection: it ended while the prompt ran. See its log."
                )
            while not (history := await self._request("get", f"/history/{run.prompt_id}")):
                await asyncio.sleep(0.05)
            run.outputs = history[run.prompt_id]["outputs"]
            return run


class Server:
    """A ComfyUI process in its own work folder; a context manager that ends it."""

    def __init__(self, comfyui: Path, work: Path, arguments: tuple[str, ...] = (), port: int = 0):
        self.port = port or free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.log = work / f"server-{self.port}.log"
        prepare_work_folder(comfyui, work)
        self.command = server_command(comfyui, work, self.port, arguments)
        self._comfyui = comfyui

    def __enter__(self) -> Server:
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self._comfyui, stdout=log, stderr=subprocess.STDOUT
            )
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
    """How to start ComfyUI: its own models visible too, on the CPU where there is no accelerator."""
    command = [sys.executable, str(comfyui / "main.py"), "--base-directory", str(work), "--port", str(port)]
    command += ["--database-url", f"sqlite:///{(work / 'user' / 'comfyui.db').as_posix()}"]
    command += ["--extra-model-paths-config", str(work / "extra_model_paths.yaml"), "--disable-auto-launch"]
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
    return [*command, *(() if accelerated else ("--cpu",)), *arguments]


def prepare_work_folder(comfyui: Path, work: Path) -> None:
    """Link this pack into the work folder, and put the example pictures where ComfyUI looks."""
    for name in ("custom_nodes", "input", "output", "user", "models/diffusers"):
        (work / name).mkdir(parents=True, exist_ok=True)
    link = work / "custom_nodes" / PACK_FOLDER
    if not link.exists():
        link_folder(link, ROOT)
    for picture in [comfyui / "input" / "example.png", *(ROOT / "workflows" / "input").glob("*.png")]:
        if picture.is_file() and not (work / "input" / picture.name).exists():
            shutil.copy(picture, work / "input")
    folders = "".join(f"  {path.name}: {path.name}\n" for path in sorted((comfyui / "models").glob("*/")))
    paths = f"comfyui:\n  base_path: {(comfyui / 'models').as_posix()}\n{folders}"
    (work / "extra_model_paths.yaml").write_text(paths, encoding="utf-8")


def add_probe_nodes(work: Path) -> None:
    """Link the tests' own nodes into the work folder."""
    (work / "custom_nodes").mkdir(parents=True, exist_ok=True)
    link_folder(work / "custom_nodes" / "probe_nodes", ROOT / "tests" / "probe_nodes")


def link_folder(link: Path, target: Path) -> None:
    """A symbolic link, or on Windows a junction, which needs no administrator; replaces one that is there."""
    if os.name == "nt":
        import _winapi

        if os.path.lexists(link):
            link.rmdir()  # of a junction: removes it and leaves what it points to
        _winapi.CreateJunction(str(target), str(link))
    else:
        link.unlink(missing_ok=True)
        link.symlink_to(target, target_is_directory=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def clean_environment() -> dict[str, str]:
    """Ours without PYTHONPATH: ComfyUI and other packs must not see the tests' and the engine's modules."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def environment() -> tuple[Path, Path]:
    """ComfyUI's folder and the work folder, as run.py hands them over."""
    try:
        return Path(os.environ["COMFYUI_PATH"]), Path(os.environ["FIRERED_WORK"])
    except KeyError as missing:
        raise SystemExit(f"{missing} is not set: start this through run.py.") from None


if __name__ == "__main__":
    comfyui_folder, work_folder = environment()
    chosen_port, rest = 8188, tuple(sys.argv[1:])
    if rest[:1] == ("--port",):
        chosen_port, rest = int(rest[1]), rest[2:]
    prepare_work_folder(comfyui_folder, work_folder)
    print(f"ComfyUI with the FireRed nodes: http://127.0.0.1:{chosen_port}", flush=True)
    command = server_command(comfyui_folder, work_folder, chosen_port, rest)
    sys.exit(subprocess.run(command, cwd=comfyui_folder, env=clean_environment(), check=False).returncode)
