"""ComfyUI's server and its queue of prompts, where these nodes run in one."""

from __future__ import annotations

from typing import Any


def prompt_server() -> Any:
    """ComfyUI's PromptServer; None without one."""
    from server import PromptServer

    return getattr(PromptServer, "instance", None)


def prompt_queue() -> Any:
    """The server's queue of prompts; None without one."""
    return getattr(prompt_server(), "prompt_queue", None)
