"""Talk to a running ComfyUI: submit a prompt, follow it to its end, fetch its pictures."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import aiohttp

Prompt = dict[str, dict[str, Any]]
OnEvent = Callable[[str, dict[str, Any]], None]


class ServerError(Exception):
    """ComfyUI did not start, or it ended too early. The message says where to look."""


class PromptRejected(Exception):
    """The server refused a prompt with HTTP 400; `answer` is its JSON."""

    def __init__(self, answer: dict[str, Any]):
        super().__init__(str(answer))
        self.answer = answer

    @property
    def reasons(self) -> list[str]:
        """One line for each problem: the node and what is wrong."""
        found = self.answer.get("node_errors") or {}
        listed = [
            f"{node['class_type']}: {error['details']}" for node in found.values() for error in node["errors"]
        ]
        return listed or [str(self.answer.get("error"))]


@dataclass
class Run:
    """A prompt that ran: its (type, data) events, its number of previews, its outputs."""

    prompt_id: str
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    previews: int = 0
    outputs: dict[str, Any] = field(default_factory=dict)
    status: str = ""

    @property
    def error(self) -> dict[str, Any] | None:
        """The execution error, if there was one: node type, exception type and message."""
        return next((data for name, data in self.events if name == "execution_error"), None)

    def progress(self, node: str) -> list[tuple[int, int]]:
        """The (value, max) pairs that the node reported."""
        return [
            (data["value"], data["max"])
            for name, data in self.events
            if name == "progress" and data["node"] == node
        ]

    @property
    def executed(self) -> list[str]:
        """The nodes that ran, in order. Nodes whose output came from ComfyUI's cache are not among them."""
        return [data["node"] for name, data in self.events if name == "executing" and data["node"]]


class Client:
    """Talks to a running server. Its methods wait for the answer."""

    def __init__(self, address: str):
        self.address = address

    def get(self, path: str) -> Any:
        """A GET request's JSON."""
        return wait_for(self._request("get", path))

    def post(self, path: str, **arguments: Any) -> Any:
        """A POST request's JSON (None for an empty answer)."""
        return wait_for(self._request("post", path, **arguments))

    def image(self, described: dict[str, str]) -> bytes:
        """The bytes of an image that /history describes."""
        return wait_for(self._bytes("/view", described))

    def run(
        self,
        prompt: Prompt,
        on_event: OnEvent = lambda name, data: None,
        only: tuple[str, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> Run:
        """Queue a prompt and wait for its end.

        on_event: called with the type and the data of each websocket event of the prompt.
        only: the output nodes to run; empty runs all of them. metadata: for the PNGs that it saves.
        Raises PromptRejected when the server refuses the prompt, ServerError when the server ends.
        """
        return wait_for(self._run(prompt, on_event, only, metadata))

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
        self, prompt: Prompt, on_event: OnEvent, only: tuple[str, ...], metadata: dict[str, Any] | None
    ) -> Run:
        client_id = uuid.uuid4().hex
        async with (
            aiohttp.ClientSession(self.address) as session,
            session.ws_connect(f"/ws?clientId={client_id}", max_msg_size=0) as socket,
        ):
            queued: dict[str, Any] = {"prompt": prompt, "client_id": client_id}
            queued |= {"partial_execution_targets": only} if only else {}
            queued |= {} if metadata is None else {"extra_data": {"extra_pnginfo": metadata}}
            async with session.post("/prompt", json=queued) as answer:
                body = await answer.json()
                if answer.status != 200:
                    raise PromptRejected(body)
            run = Run(body["prompt_id"])
            await follow(socket, run, on_event)
        while not (history := await self._request("get", f"/history/{run.prompt_id}")):
            await asyncio.sleep(0.05)
        run.outputs = history[run.prompt_id]["outputs"]
        return run


async def follow(socket: aiohttp.ClientWebSocketResponse, run: Run, on_event: OnEvent) -> None:
    """Collect the run's events until it has ended. Raises ServerError when the connection ends first."""
    async for message in socket:
        if message.type == aiohttp.WSMsgType.BINARY:
            run.previews += 1
            continue
        event = message.json()
        name, data = event["type"], event["data"]
        if data.get("prompt_id") != run.prompt_id:
            continue
        run.events.append((name, data))
        on_event(name, data)
        if name in ("execution_success", "execution_error", "execution_interrupted"):
            run.status = name.removeprefix("execution_")
            return
    raise ServerError("ComfyUI closed the connection: it ended while the prompt ran. See its log.")


def wait_for(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The coroutine's result. It runs in a new thread: a browser test's thread has an event loop already."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
