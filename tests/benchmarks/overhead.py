"""Compare the time of our graph with plain diffusers for the same edit on the CPU, and show ComfyUI's share.

The tiny checkpoint, one 1 MP reference, a 512x512 picture, 8 steps with true CFG. All is loaded before.
Usage: python run.py bench overhead
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import tiny_checkpoint
import torch
from conftest import replica_for
from diffusers import QwenImageEditPlusPipeline
from engine.files.checkpoint import open_checkpoint
from engine.models import loading, vae
from engine.sampling import sampling
from engine.sampling.conditioning import NEGATIVE, POSITIVE, from_conditioning, to_conditioning
from PIL import Image
from prompts import ENCODE, SAMPLE, changed, edit_prompt

from launcher.client import Client
from launcher.folders import ROOT
from launcher.server import Server

RUNS, STEPS, CFG, SIZE, PROMPT = 5, 8, 4.0, 512, "Add a red hat on the cat"
PHOTO = Image.open(ROOT / "workflows" / "input" / "cat.png").convert("RGB")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder = work / "models" / "diffusers" / "tiny"
        folder.parent.mkdir(parents=True)
        tiny_checkpoint.build(folder)
        with Server(work, ("--disable-api-nodes",)) as server:
            candidates = {
                "diffusers": plain_diffusers(folder),
                "our engine": our_engine(folder),
                "our graph in ComfyUI": our_graph(server.client),
            }
            times = measure(candidates)
    print(f"\n{'':24}seconds  / diffusers   (median of {RUNS}, {torch.get_num_threads()} threads)")
    for name, seconds in times.items():
        print(f"{name:24}{seconds:7.2f}  {seconds / times['diffusers']:11.2f}")
    print(f"ComfyUI adds {times['our graph in ComfyUI'] - times['our engine']:.2f} s to the engine")


def measure(candidates: dict[str, Callable[[int], object]]) -> dict[str, float]:
    """The median of each candidate over RUNS. They run in turn, after a warm-up of each."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for seed in range(RUNS + 1):
        for name, edit in candidates.items():
            started = time.perf_counter()
            edit(seed)
            if seed:
                times[name].append(time.perf_counter() - started)
    return {name: median(seconds) for name, seconds in times.items()}


def plain_diffusers(folder: Path) -> Callable[[int], object]:
    pipe = QwenImageEditPlusPipeline.from_pretrained(folder).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return lambda seed: pipe(
        image=[PHOTO], prompt=PROMPT, negative_prompt=" ", true_cfg_scale=CFG, num_inference_steps=STEPS,
        width=SIZE, height=SIZE, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def our_engine(folder: Path) -> Callable[[int], object]:
    checkpoint = open_checkpoint(folder)
    specs = {role: replica_for(checkpoint, role) for role in ("text_encoder", "vae", "transformer")}
    encoder, autoencoder, transformer = map(loading.load, specs.values())

    def edit(seed: int) -> object:
        references = [vae.encode_reference(autoencoder, PHOTO, 1.0)]
        conditions = {
            branch: from_conditioning(
                to_conditioning(encoder.encode(text, [PHOTO]), references, PHOTO.size), branch, 128
            )
            for branch, text in ((POSITIVE, PROMPT), (NEGATIVE, " "))
        }
        run = sampling.prepare_run(
            specs["transformer"], conditions,
            steps=STEPS, true_cfg_scale=CFG, width=SIZE, height=SIZE, seed=seed,
        )  # fmt: skip
        return vae.decode(autoencoder, sampling.sample(transformer, run))

    return edit


def our_graph(client: Client) -> Callable[[int], object]:
    prompt = changed(edit_prompt(), SAMPLE, steps=STEPS, cfg=CFG, width=SIZE, height=SIZE)

    def edit(seed: int) -> object:
        # Each reference has a slightly different size, so that ComfyUI's cache answers the loaders only.
        run = client.run(
            changed(changed(prompt, SAMPLE, seed=seed), ENCODE, reference_megapixels=1.0 - seed * 1e-6)
        )
        assert run.status == "success", run.error
        return run

    return edit


if __name__ == "__main__":
    main()
