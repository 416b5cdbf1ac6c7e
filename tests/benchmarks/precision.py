"""Measure each precision on one GPU: memory, seconds a step, seconds to load, error.

The real-size transformer with random weights, 1024x1024, one 1 MP reference, 250 text tokens, true CFG (two
forwards a step), TF32 off. All ratios are within one run. Every part runs in a process of its own, capped to
24 GiB where it says so.
Usage: python precision.py CHECKPOINT CACHE [layers|load|step|edit[:SOME] ...]    (full_checkpoint.py makes
CHECKPOINT)
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from engine.cards.card import Card
from engine.files.cache import DiskCache
from engine.files.checkpoint import Checkpoint, open_checkpoint
from engine.limits import EXACT, INT8
from engine.models import loading
from engine.sampling.conditioning import NEGATIVE, POSITIVE, Condition
from engine.sampling.options import SamplingOptions
from engine.sampling.sampling import prepare_run
from engine.sampling.workers import LocalWorker
from engine.weights.components import ComponentSpec, Replica
from engine.weights.precision import PRECISIONS, ROLE_PRECISIONS, resolve

GIB = 2**30
LAYERS = {name: row.layer for name, row in PRECISIONS.items() if row.layer}
SIZE, TEXT_TOKENS, CAP_GIB = 128, 250, 24
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def replica_for(folder: Path, role: str, precision: str, math: str = "fp32") -> Replica:
    return replica_of(open_checkpoint(folder), role, precision, math)


def replica_of(checkpoint: Checkpoint, role: str, precision: str, math: str) -> Replica:
    memory, name = torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name()
    card = Card("gpu:0", name, DEVICE, native_bf16=math == "bf16", memory=memory)
    resolved = resolve(ROLE_PRECISIONS[role][precision], card, math)
    return Replica(ComponentSpec.of(role, checkpoint, resolved), card)


def cap() -> None:
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    torch.cuda.set_per_process_memory_fraction(CAP_GIB / total)


def timed(run: Callable[[], Any], repeats: int = 2) -> float:
    run()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def inputs(folder: Path, replica: Replica) -> tuple[Any, torch.Tensor]:
    """A run of the edit the step figures are for, and its packed noise."""
    generator = torch.Generator().manual_seed(0)
    conditions = {
        branch: Condition(
            torch.randn(1, TEXT_TOKENS, 3584, generator=generator),
            None,
            (torch.randn(1, 16, 1, SIZE, SIZE, generator=generator),),
        )
        for branch in (POSITIVE, NEGATIVE)
    }
    run = prepare_run(replica, conditions, steps=4, true_cfg_scale=4.0, width=1024, height=1024, seed=0)
    return run, torch.randn(1, SIZE * SIZE // 4, 64, generator=generator).to(DEVICE)


def step(
    folder: Path, cache: DiskCache, precision: str, math: str, capped: bool, attention: str = EXACT
) -> dict[str, Any]:
    """Memory and time of a step (two forwards) with our worker."""
    if capped:
        cap()
    replica = replica_for(folder, "transformer", precision, math)
    transformer = loading.load(replica, cache=cache)
    run, latents = inputs(folder, replica)
    started = time.perf_counter()
    options = SamplingOptions(attention=attention)
    worker = LocalWorker(transformer, run.schedule, run.padded_size, run.conditions, options=options)
    folded = time.perf_counter() - started
    torch.cuda.synchronize()
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = []

    def both() -> None:
        outputs[:] = worker.predict(latents, 1).values()

    seconds = timed(both)
    torch.save(outputs[0].cpu(), cache.folder / f"out-{precision}-{math}.pt")
    reference = cache.folder / "out-fp32-fp32.pt"
    expected = torch.load(reference) if reference.exists() else outputs[0].cpu()
    return {
        "step_s": round(seconds, 3),
        "weights_gib": round(weights / GIB, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "fold_s": round(folded, 1),
        "error": f"{float((outputs[0].cpu() - expected).norm() / expected.norm()):.1e}",
        "finite": bool(outputs[0].isfinite().all()),
    }


def diffusers_step(folder: Path, cache: DiskCache, kind: str) -> dict[str, Any]:
    """The same with diffusers' own model: `bf16`, or `bnb8`, which is the usual recipe (the rest in FP32)."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    started = time.perf_counter()
    idle = host_peak()
    transformer = load_diffusers(folder, kind)
    loaded = time.perf_counter() - started
    host = host_peak() - idle
    run, latents = inputs(folder, replica_for(folder, "transformer", "fp32"))
    condition = run.conditions[POSITIVE]
    arguments = dict(
        hidden_states=torch.cat([latents, latents], 1).to(dtype),
        encoder_hidden_states=condition.prompt_embeds.to(DEVICE, dtype),
        timestep=run.schedule.timesteps[1:2].to(DEVICE, dtype),
        img_shapes=[[(1, SIZE // 2, SIZE // 2)] * 2],
        return_dict=False,
    )
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        seconds = timed(lambda: [transformer(**arguments) for _ in range(2)])
    return {
        "step_s": round(seconds, 3),
        "weights_gib": round(weights / GIB, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "load_s": round(loaded, 1),
        "host_gib": round(host / GIB, 2),
    }


def load_diffusers(folder: Path, kind: str) -> Any:
    from diffusers import BitsAndBytesConfig, QwenImageTransformer2DModel

    options: dict[str, Any] = {
        "dtype": torch.bfloat16 if kind == "bf16" else torch.float32,
        "device_map": "cuda:0",
    }
    if kind == "bnb8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if kind == "bnb4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    return QwenImageTransformer2DModel.from_pretrained(folder / "transformer", **options).eval()


def load(folder: Path, cache: DiskCache, precision: str) -> dict[str, Any]:
    """Seconds and host memory above the idle process of one load."""
    replica = replica_for(folder, "transformer", precision)
    torch.zeros(1, device=DEVICE)
    idle, started = host_peak(), time.perf_counter()
    transformer = loading.load(replica, cache=cache)
    torch.cuda.synchronize()
    total = sum(tensor.double().sum().item() for _, tensor in sorted(transformer.model.state_dict().items()))
    return {
        "load_s": round(time.perf_counter() - started, 1),
        "host_gib": round((host_peak() - idle) / GIB, 2),
        "gpu_gib": round(torch.cuda.memory_allocated() / GIB, 2),
        "checksum": total,
    }


def host_peak() -> int:
    """The most bytes of host memory that this process held."""
    if os.name == "nt":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def layers() -> None:
    """Relative error of one real-size layer against FP64, for activations of several kinds."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, generator=generator)

    tokens, width, out = 2048, 3072, 3072
    heavy = normal(tokens, width)
    heavy[:, :: width // 5] *= 100
    activations = {
        "normal": normal(tokens, width),
        "heavy columns x100": heavy,
        "post-GELU, heavy": torch.nn.functional.gelu(normal(tokens, width) * (1.2 * normal(width)).exp() * 2),
        "up to 1e6": heavy * 3e3,
    }
    print(f"{'relative error against FP64':30}" + "".join(f"{name:>22}" for name in activations))
    linear = torch.nn.Linear
    for name in ("bf16", "fp16", *LAYERS, "int8-bnb, threshold 0"):
        compute = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)
        with torch.device("meta"):
            layer = linear(width, out, bias=False)
        weight = torch.randn(out, width, device=DEVICE, generator=generator) * 0.02
        if name in ("bf16", "fp16"):
            module = functools.partial(torch.nn.functional.linear, weight=weight.to(compute))
        else:
            module = LAYERS[name.partition(",")[0]](layer, compute)
            module.bias = None
            module.set_weight(weight)
            module.prepare()
            if name.endswith("threshold 0"):
                module._state.threshold = 0.0
        cells = []
        for x in activations.values():
            expected = x.double() @ weight.double().T
            with torch.inference_mode():
                got = module(x.to(compute)).double()
            error = float((got - expected).norm() / expected.norm())
            cells.append(f"{error:22.1e}" if got.isfinite().all() else f"{'NaN or infinity':>22}")
        print(f"{name:30}" + "".join(cells), flush=True)


def edit(folder: Path, cache: DiskCache, precision: str, math: str, text: str) -> dict[str, Any]:
    """Encode, sample two steps and decode under the cap. Each component leaves before the next one comes."""
    from engine.models import vae
    from engine.sampling import sampling
    from engine.sampling.conditioning import from_conditioning, to_conditioning
    from PIL import Image

    cap()
    picture = Image.effect_noise((1024, 1024), 80).convert("RGB")
    peaks = {}

    def peak(name: str) -> None:
        torch.cuda.synchronize()
        peaks[name] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    low = "bf16" if math == "bf16" else "fp32"
    vae_spec = replica_for(folder, "vae", low, math)
    autoencoder = loading.load(vae_spec)
    references = [vae.encode_reference(autoencoder, picture, 1.0).cpu()]
    del autoencoder
    peak("vae encode")
    encoder = loading.load(replica_for(folder, "text_encoder", text, math), cache=cache)
    conditions = {}
    for branch, prompt in ((POSITIVE, "Add a red hat on the cat"), (NEGATIVE, " ")):
        embeds = encoder.encode(prompt, [picture]).cpu()
        conditions[branch] = from_conditioning(
            to_conditioning(embeds, references, picture.size), branch, 3584
        )
    del encoder
    peak("text encoder")
    replica = replica_for(folder, "transformer", precision, math)
    transformer = loading.load(replica, cache=cache)
    run = prepare_run(replica, conditions, steps=2, true_cfg_scale=4.0, width=0, height=0, seed=0)
    latents = sampling.sample(transformer, run)
    del transformer
    peak("transformer")
    autoencoder = loading.load(vae_spec)
    pixels = vae.decode(autoencoder, latents, "whole")
    peak("vae decode")
    return peaks | {"shape": list(pixels.shape)}


def in_process(*arguments: str) -> dict[str, Any]:
    """Run one part in a process of its own."""
    run = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if run.returncode:
        return {"failed": (run.stderr.strip().splitlines() or ["?"])[-1][:300]}
    return json.loads(run.stdout.strip().splitlines()[-1])


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "step": lambda folder, cache, precision, math, capped, *attention: step(
        folder, cache, precision, math, capped == "capped", *attention
    ),
    "diffusers": diffusers_step,
    "load": load,
    "edit": edit,
}
RUNS = {
    "step": [
        ("step", "fp32", "fp32", "free"),
        ("step", "int8", "fp32", "capped"),
        ("step", "int8-fast", "fp32", "capped"),
        ("step", "int8-fast", "fp32", "capped", INT8),
        ("diffusers", "bnb8"),
        ("step", "int8-bnb", "fp32", "capped"),
        ("step", "nf4", "fp32", "capped"),
        ("diffusers", "bf16"),
        ("step", "bf16", "bf16", "free"),
        ("step", "int8", "bf16", "capped"),
        ("step", "int8-fast", "bf16", "capped"),
        ("step", "nf4", "bf16", "capped"),
    ],
    "load": [("load", "int8"), ("load", "int8"), ("load", "nf4"), ("diffusers", "bnb4")],
    "edit": [
        ("edit", "int8", "fp32", "int8"),
        ("edit", "int8", "bf16", "bf16"),
        ("edit", "int8-fast", "fp32", "fp32"),
    ],
}


def main() -> None:
    folder, cache, *rest = sys.argv[1:]
    if rest[:1] == ["part"]:
        part, *arguments = rest[1:]
        answer = PARTS[part](Path(folder), DiskCache(Path(cache), 10**12), *arguments)
        print(json.dumps(answer), flush=True)
        return
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    for group in rest or ["layers", *RUNS]:
        if group == "layers":
            layers()
            continue
        name, _, chosen = group.partition(":")
        for run in RUNS[name]:
            if chosen not in " ".join(run):
                continue
            os.sync()
            print(" ".join(run), in_process(folder, cache, "part", *run), flush=True)


if __name__ == "__main__":
    main()
