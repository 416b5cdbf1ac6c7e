"""What comes after the running node, read off the prompt: no hour of sampling for a decode that cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import host

Prompt = dict[str, dict[str, Any]]  # nodes by id, as the API takes them


def require_decodable(prompt: Prompt | None, height: int, width: int) -> None:
    """Raise DoesNotFitError if a FireRed Decode fed by the running node could not decode latents of that
    size.
    """
    from .engine.vae import require_decodable as require

    node = host.running_node()
    if prompt is None or node is None:
        return
    for decode in _nodes_fed_by(prompt, node, "FireRedDecode", "latent"):
        loader = prompt.get(_source(decode.get("vae")) or "", {})
        if loader.get("class_type") != "FireRedLoadVAE":
            continue
        chosen = {name: value for name, value in loader["inputs"].items() if isinstance(value, str)}
        spec = host.describe_component(
            "vae", chosen["checkpoint"], chosen.get("precision", "auto"), chosen.get("device", "auto")
        )
        tiling = decode.get("tiling", "auto")
        require(spec, height, width, tiling, host.free_memory(spec.device, evicting=True))


def _nodes_fed_by(prompt: Prompt, node: str, class_type: str, socket: str) -> Iterator[dict[str, Any]]:
    """The inputs of every node of that class whose `socket` gets what `node` made, maybe by way of others."""
    for other in prompt.values():
        if other.get("class_type") != class_type:
            continue
        pending, seen = [_source(other["inputs"].get(socket))], set[str]()
        while pending:
            source = pending.pop()
            if source is None or source in seen or source not in prompt:
                continue
            seen.add(source)
            pending += [_source(value) for value in prompt[source]["inputs"].values()]
        if node in seen:
            yield other["inputs"]


def _source(value: Any) -> str | None:
    """The node that a linked input comes from."""
    return value[0] if isinstance(value, list) and len(value) == 2 else None
