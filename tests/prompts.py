"""API prompts for tests: the shipped workflow, made small enough for two cores."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from core_vae import CORE_VAE

from launcher.client import Client, Prompt, Run
from launcher.folders import ROOT

LOADERS = {"1": "transformer", "2": "text_encoder", "3": "vae"}
COMPONENTS = {"transformer", "text encoder", "vae"}  # as their descriptions begin
ENCODE, SAMPLE, DECODE, SAVE, PHOTO, COMPARE = "4", "5", "6", "7", "10", "11"
PARALLEL = "30"  # the node that through_parallel adds


def edit_prompt(checkpoint: str = "tiny") -> Prompt:
    """The shipped API workflow at 64x64 in two steps, without the comparison with the photo."""
    prompt: Prompt = json.loads((ROOT / "workflows/api/firered_edit.json").read_text(encoding="utf-8"))
    del prompt[COMPARE]
    for node in LOADERS:
        prompt[node]["inputs"]["checkpoint"] = checkpoint
    prompt[ENCODE]["inputs"]["reference_megapixels"] = 0.01
    prompt[SAMPLE]["inputs"] |= {"steps": 2, "width": 64, "height": 64}
    prompt[PHOTO]["inputs"]["image"] = "cat.png"
    return prompt


def changed(prompt: Prompt, node: str, /, **inputs: Any) -> Prompt:
    """A copy of the prompt with some of a node's inputs set; None removes one."""
    result = copy.deepcopy(prompt)
    result[node]["inputs"] |= inputs
    result[node]["inputs"] = {
        name: value for name, value in result[node]["inputs"].items() if value is not None
    }
    return result


def with_node(prompt: Prompt, node: str, class_type: str, /, **inputs: Any) -> Prompt:
    """A copy of the prompt with one more node."""
    return copy.deepcopy(prompt) | {
        node: {"class_type": class_type, "inputs": inputs, "_meta": {"title": node}}
    }


def through_parallel(prompt: Prompt, **inputs: Any) -> Prompt:
    """A copy of the prompt whose transformer goes through FireRed Parallel."""
    graph = with_node(prompt, PARALLEL, "FireRedParallel", transformer=["1", 0], **inputs)
    return changed(graph, SAMPLE, transformer=[PARALLEL, 0])


def keep_tensor(prompt: Prompt, source: list[Any], name: str) -> Prompt:
    """A copy of the prompt that also writes what `source` gives to output/NAME.pt."""
    return with_node(prompt, f"keep_{name}", "ProbeKeep", value=source, name=name)


def kept_tensor(work: Path, name: str) -> Any:
    """What keep_tensor wrote."""
    return torch.load(work / "output" / f"{name}.pt", weights_only=True)


def once_at(step: int, act: Callable[[], object]) -> Callable[[int], None]:
    """Calls `act` once, when that many steps are done."""
    done: list[int] = []

    def check(now: int) -> None:
        if now >= step and not done:
            done.append(now)
            act()

    return check


def at_step(
    step: int, act: Callable[[], object], of: int | None = None
) -> Callable[[str, dict[str, Any]], None]:
    """A listener to a prompt's events that acts once, when the sampler has done that many steps.

    of: how many there are in all, where the sampler has other progress too.
    """
    check = once_at(step, act)

    def on_event(name: str, data: dict[str, Any]) -> None:
        if name == "progress" and data["node"] == SAMPLE and of in (None, data["max"]):
            check(data["value"])

    return on_event


def soon(condition: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether it becomes true in time. ComfyUI does not tell nodes when a prompt has ended."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def succeed(client: Client, prompt: Prompt) -> Run:
    """Run a prompt that must end well."""
    run = client.run(prompt)
    assert run.status == "success", run.error
    return run


def fail(client: Client, prompt: Prompt) -> dict[str, Any]:
    """Run a prompt that must end in an execution error, and return that error."""
    run = client.run(prompt)
    assert run.error is not None, run.status
    return run.error


def failure(client: Client, prompt: Prompt, node: str = SAMPLE) -> str:
    """The message of the execution error that the prompt must end in, raised by that node."""
    error = fail(client, prompt)
    assert error["node_id"] == node
    return error["exception_message"]


def residents(client: Client, work: Path) -> dict[str, Any]:
    """What is in the server's memory, as ProbeResidents writes it."""
    succeed(client, with_node({}, "1", "ProbeResidents", name="residents"))
    return json.loads((work / "output" / "residents.json").read_text(encoding="utf-8"))


def loaded_components(client: Client, work: Path) -> dict[str, int]:
    """The bytes that each of our loaded components has in memory, by its description."""
    models = residents(client, work)["models"]
    return {name: size for name, _, size in models if size and " on " in name}


def loaded_roles(client: Client, work: Path) -> set[str]:
    """Which of our components are in memory."""
    loaded = loaded_components(client, work)
    return {role for role in COMPONENTS if any(name.startswith(role) for name in loaded)}


def wait_until_empty(client: Client, work: Path) -> dict[str, int]:
    """What is still loaded after ten seconds. ComfyUI carries out /free after the prompt that follows it."""
    deadline = time.monotonic() + 10
    while (loaded := loaded_components(client, work)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return loaded


def core_prompt(number: int, side: int = 8) -> Prompt:
    """Core's VAE decodes a latent of that side, so ComfyUI loads it. number: makes another latent."""
    graph = with_node({}, "1", "VAELoader", vae_name=CORE_VAE)
    graph = with_node(graph, "2", "ProbeLatent", shape=f"1,16,1,{side},{side}", fill=str(number / 1000))
    graph = with_node(graph, "3", "VAEDecode", samples=["2", 0], vae=["1", 0])
    return keep_tensor(graph, ["3", 0], "core")
