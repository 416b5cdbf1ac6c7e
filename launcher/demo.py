"""Edit the example photo through a real ComfyUI and print the PNG's path (what `run.py demo` runs)."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from launcher.client import OnEvent, Prompt, PromptRejected, Run, ServerError
from launcher.folders import EXAMPLE_PHOTO, ROOT, work_folder
from launcher.server import Server

WORKFLOWS = ROOT / "workflows" / "api"
BUILT_IN = "FireRed-Demo"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default=BUILT_IN)
    parser.add_argument("--prompt")
    arguments = parser.parse_args()
    if arguments.checkpoint == BUILT_IN:
        print(f"Using {BUILT_IN}, a toy that knows a few edits. It is not FireRed.", flush=True)
    work = work_folder()
    try:
        run, seconds = edit(work, demo_prompt(arguments.checkpoint, arguments.prompt))
    except PromptRejected as rejected:
        return failed(*rejected.reasons)
    except ServerError as error:
        return failed(str(error))
    if run.error:
        return failed(f"{run.error['node_type']}: {run.error['exception_message']}")
    (image,) = next(output["images"] for output in run.outputs.values() if "images" in output)
    print(f"\nEdited in {seconds:.1f} s: {work / 'output' / image['subfolder'] / image['filename']}")
    return 0


def failed(*lines: str) -> int:
    print("", *lines, sep="\n", file=sys.stderr)
    return 1


def demo_prompt(checkpoint: str, text: str | None) -> Prompt:
    """The shipped API workflow of the built-in model, or that of a real one with this checkpoint.

    text: what to change, if not what the workflow says.
    """
    name = "firered_demo" if checkpoint == BUILT_IN else "firered_edit"
    prompt: Prompt = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    for node in prompt.values():
        inputs = node["inputs"]
        if "checkpoint" in inputs:
            inputs["checkpoint"] = checkpoint
        if node["class_type"] == "LoadImage":
            inputs["image"] = EXAMPLE_PHOTO
        if node["class_type"] == "FireRedEncodePrompt" and text:
            inputs["prompt"] = text
    return prompt


def edit(work: Path, prompt: Prompt) -> tuple[Run, float]:
    """Run the prompt in a new server. Returns the run and its seconds, without the server's start."""
    with Server(work) as server:
        started = time.monotonic()
        return server.client.run(prompt, show_progress(prompt)), time.monotonic() - started


def show_progress(prompt: Prompt) -> OnEvent:
    """A callback that prints a line for each node, with its progress."""

    def show(name: str, data: dict[str, Any]) -> None:
        if name == "executing" and data["node"]:
            print(f"\n{prompt[data['node']]['class_type']}", end="", flush=True)
        elif name == "progress":
            print(f"\r{prompt[data['node']]['class_type']} {data['value']}/{data['max']}", end="", flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
