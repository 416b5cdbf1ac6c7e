"""Load transformers from single files on one GPU: seconds, memory, and the step that follows.

Random weights of the real width in each form that users have, 1024x1024, one 1 MP reference, true CFG, BF16
arithmetic. Each row is a process of its own; the files are in the page cache. diffusers' rows only load.
Usage: python single_files.py FOLDER [LAYERS]    (writes files of up to 41 GB there, and deletes them)
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import real_checkpoint
import torch
from diffusers import GGUFQuantizationConfig, QwenImageTransformer2DModel
from engine.files.cache import CacheWriter
from engine.files.single import open_file
from engine.models import loading
from engine.sampling.workers import LocalWorker
from precision import DEVICE, GIB, inputs, replica_of, timed

Shapes = dict[str, tuple[int, ...]]
CONVROT = torch.tensor(list(b'{"format": "int8_tensorwise", "convrot": true}'), dtype=torch.uint8)
FORMS = {  # the precisions that each is loaded at
    "bf16": ("int8", "bf16", "diffusers"),
    "fp8": ("int8", "bf16", "fp32"),
    "convrot": ("int8", "int8-fast"),
    "gguf": ("int8", "bf16", "fp32", "diffusers"),
}


def write(form: str, shapes: Shapes, path: Path) -> None:
    if form == "gguf":
        write_gguf(shapes, path)
        return
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        layout[name] = (torch.float8_e4m3fn if form == "fp8" else torch.bfloat16, shape)
        if form == "convrot" and is_quantised(name, shape):
            layer = name.removesuffix(".weight")
            layout[name] = (torch.int8, shape)
            layout[f"{layer}.weight_scale"] = (torch.float32, (shape[0], 1))
            layout[f"{layer}.comfy_quant"] = (torch.uint8, tuple(CONVROT.shape))
    writer = CacheWriter(path, layout)
    for name, (dtype, shape) in layout.items():
        writer.write(name, random(name, dtype, shape))
    writer.finish()


def random(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Matrices at std 0.02, norms 1, biases 0; codes with the scale that gives that."""
    if dtype is torch.int8:
        return torch.randint(-127, 128, shape, dtype=dtype, device=DEVICE)
    if dtype is torch.uint8:
        return CONVROT
    numbers = torch.empty(shape, device=DEVICE)
    if name.endswith("weight_scale"):
        return numbers.fill_(0.02 / 73)
    return (numbers.normal_(0, 0.02) if len(shape) > 1 else numbers.fill_(name.endswith("weight"))).to(dtype)


def is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name.startswith("transformer_blocks")


def write_gguf(shapes: Shapes, path: Path) -> None:
    """A Q4_K_M: two thirds Q4_K, the rest Q6_K. Layers of a shape share their codes."""
    writer, blocks = gguf.GGUFWriter(path, "qwen_image"), {}
    for number, (name, shape) in enumerate(shapes.items()):
        if not is_quantised(name, shape):
            writer.add_tensor(name, random(name, torch.float32, shape).cpu().numpy())
            continue
        kind = gguf.GGMLQuantizationType.Q6_K if number % 3 == 0 else gguf.GGMLQuantizationType.Q4_K
        if (kind, shape) not in blocks:
            blocks[kind, shape] = codes(shape, kind)
        writer.add_tensor(name, blocks[kind, shape], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def codes(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Random codes, with small FP16 scales where the type has them."""
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    made = np.random.default_rng(0).integers(0, 256, (shape[0], shape[1] // size, nbytes), dtype=np.uint8)
    for offset in (208,) if kind is gguf.GGMLQuantizationType.Q6_K else (0, 2):
        made[..., offset : offset + 2] = np.frombuffer(np.float16(2e-5).tobytes(), np.uint8)
    return made.reshape(shape[0], -1)


def measure(path: Path, precision: str, config: Path) -> str:
    """A row: seconds to load, GPU GiB after it, the most host GiB, seconds of a step."""
    torch.zeros(1, device=DEVICE)
    before, started = host_gib(), time.perf_counter()
    if precision == "diffusers":
        options = (
            {"quantization_config": GGUFQuantizationConfig(torch.bfloat16)} if "gguf" in path.name else {}
        )
        model = QwenImageTransformer2DModel.from_single_file(
            str(path), config=str(config), torch_dtype=torch.bfloat16, **options
        ).to(DEVICE)
        seconds = time.perf_counter() - started
        return f"{seconds:.1f} | {used_gib():.1f} | {host_gib() - before:.1f} | ({type(model).__name__})"
    replica = replica_of(open_file(path, "transformer"), "transformer", precision, "bf16")
    transformer = loading.load(replica)
    torch.cuda.synchronize()
    seconds, used, host = time.perf_counter() - started, used_gib(), host_gib() - before
    run, latents = inputs(path, replica)
    worker = LocalWorker(transformer, run.schedule, run.padded_size, run.conditions)
    step = timed(lambda: worker.predict(latents, 1))
    return f"{seconds:.1f} | {used:.1f} | {host:.1f} | {step:.3f}"


def used_gib() -> float:
    return torch.cuda.memory_allocated() / GIB


def host_gib() -> float:
    """The most host memory that this process held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def main() -> None:
    folder, layers = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 60
    folder.mkdir(parents=True, exist_ok=True)
    model = real_checkpoint.transformer_on_meta(layers)
    model.save_config(folder)
    shapes = {name: tuple(p.shape) for name, p in real_checkpoint.named_weights(model)}
    print(f"{torch.cuda.get_device_name()}, {layers} of 60 blocks")
    print("| file | GB | loaded at | seconds | GPU GiB | host GiB | step s |\n|---|---|---|---|---|---|---|")
    for form, precisions in FORMS.items():
        path = folder / f"model-{form}.{'gguf' if form == 'gguf' else 'safetensors'}"
        write(form, shapes, path)
        for precision in precisions:
            command = [sys.executable, __file__, "--row", str(path), precision, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            row = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip().splitlines()[-1][:200]]
            print(f"| {form} | {path.stat().st_size / 1e9:.1f} | {precision} | {row[0]} |", flush=True)
        path.unlink()


if __name__ == "__main__":
    if sys.argv[1] == "--row":
        print(measure(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])))
    else:
        main()
