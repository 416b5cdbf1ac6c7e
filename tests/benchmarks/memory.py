"""Measure what each component takes on a GPU beside its weights at several sizes. The estimates use this.

Usage: python memory.py FOLDER [transformer] [text_encoder] [vae]    (of the real width, any depth)
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from engine.latents import LATENT_CHANNELS, PATCH
from engine.models import loading, vae
from engine.sampling.conditioning import POSITIVE, Condition
from engine.sampling.schedule import Schedule
from engine.sampling.workers import LocalWorker
from engine.units import GIB
from engine.weights.components import Replica
from PIL import Image
from precision import replica_for

DEVICE = torch.device("cuda", 0)
TOKENS = 250


def measure(what: str, replica: Replica, run: Callable[[], object]) -> None:
    """Print what `run` takes at its peak in addition to what was there before."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    allocated = torch.cuda.max_memory_allocated() - before
    reserved = torch.cuda.max_memory_reserved() - before
    weights = f"weights {before / GIB:.2f} (estimated {replica.spec.nbytes() / GIB:.2f})"
    print(
        f"{what} | {weights} | + {allocated / GIB:.3f} GiB allocated, {reserved / GIB:.3f} reserved",
        flush=True,
    )


def transformer(folder: Path) -> None:
    for precision, math in (("fp32", "fp32"), ("int8", "fp32"), ("int8-fast", "fp32"), ("bf16", "bf16")):
        replica = replica_for(folder, "transformer", precision, math)
        model = loading.load(replica)
        for side, references in ((64, 1), (128, 1), (128, 3), (192, 1)):
            latents = torch.randn(1, (side // PATCH) ** 2, LATENT_CHANNELS * PATCH**2, device=DEVICE)
            reference = (torch.randn(1, LATENT_CHANNELS, 1, 128, 128),) * references
            conditions = {POSITIVE: Condition(torch.randn(1, TOKENS, 3584), None, reference)}
            schedule = Schedule(torch.tensor([1.0, 0.0]), torch.tensor([1.0]))
            worker = LocalWorker(model, schedule, (side, side), conditions)
            tokens = latents.shape[1] + references * 4096 + TOKENS
            measure(
                f"transformer {precision} {math} {tokens} tokens",
                replica,
                lambda worker=worker, latents=latents: worker.predict(latents, 0),
            )
        del model, worker


def text_encoder(folder: Path) -> None:
    for precision, math in (("int8", "fp32"), ("fp16", "fp32"), ("bf16", "bf16")):
        replica = replica_for(folder, "text_encoder", precision, math)
        encoder = loading.load(replica)
        for pictures in (1, 3):
            images = [Image.new("RGB", (1024, 1024), "red")] * pictures
            measure(
                f"text encoder {precision} {math} {pictures} pictures",
                replica,
                lambda encoder=encoder, images=images: encoder.encode("red hat", images),
            )
        del encoder


def autoencoder(folder: Path) -> None:
    for precision in ("fp32", "bf16"):
        replica = replica_for(folder, "vae", precision, precision)
        model = loading.load(replica)
        for side in (64, 128, 192, 256):
            latents = torch.randn(1, LATENT_CHANNELS, 1, side, side)
            for tiling in ("whole", "tiled"):
                measure(
                    f"vae {precision} decode {side * 8} {tiling}",
                    replica,
                    lambda model=model, replica=replica, latents=latents, tiling=tiling: vae.decode(
                        model, latents, tiling
                    ),
                )
            picture = Image.new("RGB", (side * 8, side * 8), "red")
            measure(
                f"vae {precision} encode {side * 8}",
                replica,
                lambda model=model, replica=replica, picture=picture, side=side: vae.encode_reference(
                    model, picture, (side / 128) ** 2
                ),
            )
        latents = torch.randn(1, LATENT_CHANNELS, 1, 256, 256)
        whole, tiled = (vae.decode(model, latents, tiling) for tiling in ("whole", "tiled"))
        print(f"vae {precision}: tiled and whole differ by at most {float((whole - tiled).abs().max()):.2e}")
        del model


PARTS = {"transformer": transformer, "text_encoder": text_encoder, "vae": autoencoder}

if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    checkpoint, *chosen = sys.argv[1:]
    for name in chosen or PARTS:
        PARTS[name](Path(checkpoint))
