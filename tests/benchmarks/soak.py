"""Run our graph and one of core's models in turn in one server, and print time and memory after each.

Usage: python soak.py [--prompts N] [--checkpoint FOLDER] [--devices gpu:0,gpu:1,gpu:0] [--precision P]
[--size PIXELS] [-- COMFYUI ARGUMENTS]    (without a checkpoint: the tiny one)
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import core_vae
import tiny_checkpoint
from conftest import PROBE_NODES
from prompts import (
    ENCODE,
    LOADERS,
    PHOTO,
    SAMPLE,
    changed,
    core_prompt,
    edit_prompt,
    residents,
    succeed,
    with_node,
)

from launcher.client import Prompt
from launcher.folders import add_pack, link_folder
from launcher.server import Server

MIB = 2**20
PRECISIONS = ("int8", "int8-fast")  # the transformer has these in turn, so that weights are replaced too


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--devices", default="auto,auto,auto", help="transformer, text encoder, VAE")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("comfyui_arguments", nargs="*")
    return parser.parse_args()


def make_work_folder(folder: Path, checkpoint: Path | None) -> None:
    (folder / "models/diffusers").mkdir(parents=True)
    if checkpoint is None:
        tiny_checkpoint.build(folder / "models/diffusers/soak")
    else:
        link_folder(folder / "models/diffusers/soak", checkpoint)
    core_vae.write(folder, "soak")
    add_pack(folder, PROBE_NODES)


def our_prompt(args: argparse.Namespace, number: int) -> Prompt:
    prompt = changed(edit_prompt("soak"), SAMPLE, seed=number, width=args.size, height=args.size)
    photo = with_node({}, PHOTO, "ProbeImage", shape=f"1,{args.size},{args.size},3", fill=f"{number % 7 / 7}")
    prompt = changed(prompt, ENCODE, reference_megapixels=max(args.size**2 / 2**20, 0.01)) | photo
    for node, device in zip(LOADERS, args.devices.split(","), strict=True):
        prompt = changed(prompt, node, device=device)
    return changed(prompt, "1", precision=PRECISIONS[number // 4 % len(PRECISIONS)])


def describe(found: dict[str, Any]) -> str:
    models = ", ".join(f"{name} {size / MIB:.0f}" for name, _, size in found["models"] if size)
    cards = ", ".join(f"{card} {size / MIB:.0f}" for card, size in found["allocated"].items())
    return f"rss {found['rss'] / MIB:6.0f} | torch {cards or '-'} | models {models}"


def main() -> int:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as work:
        make_work_folder(Path(work), args.checkpoint)
        flags = ("--disable-api-nodes", "--database-url", "sqlite:///:memory:", *args.comfyui_arguments)
        with Server(Path(work), flags) as server:
            print(f"flags: {' '.join(args.comfyui_arguments) or '-'}; MiB after each prompt", flush=True)
            for number in range(args.prompts):
                name, prompt = (
                    ("core", core_prompt(number, args.size // 8))
                    if number % 2
                    else ("ours", our_prompt(args, number))
                )
                started = time.monotonic()
                succeed(server.client, prompt)
                seconds = time.monotonic() - started
                if number < 8 or number % 10 >= 8:
                    found = residents(server.client, Path(work))
                    print(f"{number:3} {name} {seconds:6.2f} s | {describe(found)}", flush=True)
            before = residents(server.client, Path(work))
            server.client.post("/free", json={"unload_models": True, "free_memory": True})
            time.sleep(2)
            succeed(server.client, core_prompt(args.prompts, args.size // 8))
            server.client.post("/free", json={"unload_models": True, "free_memory": True})
            time.sleep(2)
            print(f"before /free: {describe(before)}")
            print(f"after /free:  {describe(residents(server.client, Path(work)))}")
            print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
