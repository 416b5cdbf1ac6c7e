"""Edit the example photo through a real ComfyUI and print the PNG's path (what `run.py demo` runs)."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from launcher.client import OnEvent, Prompt, PromptRejected, Run, ServerError
from launcher.folders import ROOT, work_folder
from launcher.server import Server

WORKFLOW = ROOT / "workflows" / "api" / "firered_edit.json"
PHOTO = "cat.png"
TINY = "tiny-random"
TINY_STEPS = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default=TINY)
    parser.add_argument("--prompt", default="Add a red hat on the cat")
    arguments = parser.parse_args()
    work = work_folder()
    steps = None
    if arguments.checkpoint == TINY:
        print(
            "No --checkpoint: using a tiny one with random weights. "
            "It runs every part; its picture is noise.",
            flush=True,
        )
        build_tiny_checkpoint(work / "models" / "diffusers" / TINY)
        steps = TINY_STEPS
    try:
        run, seconds = edit(work, demo_prompt(arguments.checkpoint, arguments.prompt, steps))
    except PromptRejected as rejected:
        return failed(*rejected.reasons)
    except ServerError as error:
        return failed(str(error))
    if run.error:
        return failed(f"{run.error['node_type']}: {run.error['exception_message']}")
    (image,) = next(iter(run.outputs.values()))["images"]
    print(f"\nEdited in {seconds:.1f} s: {work / 'output' / image['subfolder'] / image['filename']}")
    return 0


def failed(*lines: str) -> int:
    print("", *lines, sep="\n", file=sys.stderr)
    return 1


def build_tiny_checkpoint(folder: Path) -> None:
    """Write the tests' checkpoint in a separate process, to hide what its libraries print."""
    if not folder.exists():
        command = [sys.executable, ROOT / "tests" / "tiny_checkpoint.py", folder]
        subprocess.run(command, check=True, capture_output=True)


def demo_prompt(checkpoint: str, text: str, steps: int | None) -> Prompt:
    """The shipped API workflow with this checkpoint, text and number of steps, and the example photo."""
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
