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
    for decode in _decodes_of(prompt, node):
        loader = prompt.get(_source(decode.get("vae")) or "", {})
        if loader.get("class_type") != "FireRedLoadVAE":
            continue
        given = {"precision": "auto", "device": "auto"} | loader["inputs"]
        wanted = [given.get(name) for name in ("checkpoint", "precision", "device")]
        tiling = decode.get("tiling", "auto")
        if not all(isinstance(value, str) for value in (*wanted, tiling)):
            continue  # linked: known only when it runs
        spec = host.describe_component("vae", *map(str, wanted))
        require(spec, height, width, tiling, host.free_memory(spec.device, evicting=True))


def _decodes_of(prompt: Prompt, node: str) -> Iterator[dict[str, Any]]:
    """The inputs of every FireRed Decode that takes what `node` makes and whose picture is used."""
    used = {_source(value) for other in prompt.values() for value in other.get("inputs", {}).values()}
    for name, other in prompt.items():
        inputs = other.get("inputs", {})
        if (
            other.get("class_type") == "FireRedDecode"
            and name in used
            and _source(inputs.get("latent")) == node
        ):
            yield inputs


def _source(value: Any) -> str | None:
    """The node that a linked input comes from."""
    linked = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
    return value[0] if linked else None
