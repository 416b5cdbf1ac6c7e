"""Measure what the guard costs: a step with and without it, at the real width, in FP32 and FP16 arithmetic.

Usage: python guard.py CHECKPOINT    (of the real width, any depth)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from engine.models import loading
from engine.models.guard import OFF, STOP, WARN
from engine.sampling.conditioning import POSITIVE, Condition
from engine.sampling.denoise import denoise
from engine.sampling.schedule import Schedule
from engine.sampling.workers import LocalWorker
from precision import DEVICE, SIZE, TEXT_TOKENS, replica_for, timed

SCHEDULE = Schedule(torch.tensor([1.0, 0.0]), torch.tensor([1.0]))

if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for precision, math in (("int8", "fp32"), ("bf16", "bf16"), ("fp16", "auto")):
        replica = replica_for(Path(sys.argv[1]), "transformer", precision, math)
        transformer = loading.load(replica)
        references = (torch.randn(1, 16, 1, SIZE, SIZE),)
        conditions = {POSITIVE: Condition(torch.randn(1, TEXT_TOKENS, 3584), None, references)}
        latents = torch.randn(1, (SIZE // 2) ** 2, 64, device=DEVICE)

        def run(
            level: str, replica=replica, transformer=transformer, conditions=conditions, latents=latents
        ) -> None:
            worker = LocalWorker(transformer, SCHEDULE, (SIZE, SIZE), conditions, level)
            denoise(worker.predict, latents, SCHEDULE, 1.0)

        watched = STOP if precision != "fp16" else WARN
        times = {}
        for level in (OFF, watched):
            times[level] = min(timed(lambda level=level: run(level), 5) for _ in range(3))
        share = times[watched] / times[OFF] - 1
        blocks = len(transformer.model.transformer_blocks)
        print(f"{replica}, {blocks} blocks: {times[OFF]:.4f} s a forward, guard {share:+.3%}")
        del transformer, run
