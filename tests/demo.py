"""Edit the example photo through a real ComfyUI and print the PNG's path (what `run.py demo` runs)."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from comfyui import ROOT, Prompt, PromptRejected, Server, ServerError, environment

WORKFLOW = ROOT / "workflows" / "api" / "firered_edit.json"
PHOTO = "cat.png"
TINY = "tiny-random"
TINY_STEPS = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default=TINY)
    parser.add_argument("--prompt", default="Add a red hat on the cat")
    arguments = parser.parse_args()
    comfyui, work = environment()
    is_tiny = arguments.checkpoint == TINY
    if is_tiny:
        print(
            "No --checkpoint: using a tiny one with random weights. "
            "It runs every part; its picture is noise.",
            flush=True,
        )
        build_tiny_checkpoint(work / "models" / "diffusers" / TINY)
    prompt = demo_prompt(arguments.checkpoint, arguments.prompt, TINY_STEPS if is_tiny else None)
    try:
        with Server(comfyui, work) as server:
            started = time.monotonic()
            run = server.client.run(prompt, show_progress(prompt))
    except PromptRejected as rejected:
        return failed(*rejected.reasons)
    except ServerError as error:
        return failed(str(error))
    print()
    if run.error:
        return failed(f"{run.error['node_type']}: {run.error['exception_message']}")
    (image,) = next(iter(run.outputs.values()))["images"]
    path = work / "output" / image["subfolder"] / image["filename"]
    print(f"Edited in {time.monotonic() - started:.1f} s: {path}")
    return 0


def failed(*lines: str) -> int:
    print("", *lines, sep="\n", file=sys.stderr)
    return 1


def build_tiny_checkpoint(folder: Path) -> None:
    if not folder.exists():
        from tiny_checkpoint import build
        from transformers.utils import logging

        logging.disable_progress_bar()
        build(folder)


def demo_prompt(checkpoint: str, text: str, steps: int | None) -> Prompt:
    """The shipped API workflow with this checkpoint, photo and text."""
    prompt: Prompt = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    for node in prompt.values():
        inputs = node["inputs"]
        if "checkpoint" in inputs:
            inputs["checkpoint"] = checkpoint
        if node["class_type"] == "LoadImage":
            inputs["image"] = PHOTO
        if node["class_type"] == "FireRedEncodePrompt":
            inputs["prompt"] = text
        if node["class_type"] == "FireRedSampler" and steps:
            inputs["steps"] = steps
    return prompt


def show_progress(prompt: Prompt) -> Any:
    """Prints a line a node and a count as its progress moves."""

    def show(name: str, data: dict[str, Any]) -> None:
        if name == "executing" and data["node"]:
            print(f"\n{prompt[data['node']]['class_type']}", end="", flush=True)
        elif name == "progress":
            print(f"\r{prompt[data['node']]['class_type']} {data['value']}/{data['max']}", end="", flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
