"""Measure how several cards share a step: seconds, memory, bytes moved, difference to one card.

The real-size transformer with random weights, 1024x1024, one 1 MP reference, 250 text tokens, TF32 off. All
ratios are to one card in the same run. A card that holds all of a model may use all its memory; the others
are capped to 24 GiB.
Usage: python parallel.py CHECKPOINT [WAY ...]
(full_checkpoint.py makes CHECKPOINT; a WAY is int8-fp32, or int8-fast-fp32:int8 for attention in INT8)
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engine.cards import transfer
from engine.cards.card import Card
from engine.cards.kernels import device_label
from engine.cards.transfer import links
from engine.files.checkpoint import open_checkpoint
from engine.limits import EXACT
from engine.models import loading
from engine.models.transformer import Transformer
from engine.sampling.conditioning import POSITIVE
from engine.sampling.layout import BOTH, CFG, LAYERS, SEQUENCE, Layout, dealt
from engine.sampling.options import SamplingOptions
from engine.sampling.parallel import ParallelWorker
from engine.sampling.sampling import SamplingRun
from engine.sampling.workers import LocalWorker
from engine.weights.components import ComponentSpec, Replica
from engine.weights.precision import PRECISIONS, resolve
from precision import CAP_GIB, GIB, inputs

WAYS = ("int8-fp32", "int8-fast-fp32", "bf16-bf16", "int8-fast-bf16", "fp32-fp32")
CARDS = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def replicas(folder: Path, way: str) -> list[Replica]:
    name, _, math = way.rpartition("-")
    checkpoint = open_checkpoint(folder)
    found = []
    for device in CARDS:
        card = Card(device_label(device), torch.cuda.get_device_name(device), device, math == "bf16", 0)
        precision = resolve(PRECISIONS[name], card, math)
        found.append(Replica(ComponentSpec.of("transformer", checkpoint, precision), card))
    return found


def cap(gib: float | None) -> None:
    for device in CARDS:
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else gib / total, device)


def synchronize() -> None:
    for device in CARDS:
        torch.cuda.synchronize(device)


def timed(worker: Any, latents: torch.Tensor, repeats: int = 2) -> tuple[float, dict[str, torch.Tensor]]:
    worker.predict(latents, 1)
    synchronize()
    for device in CARDS:
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    for _ in range(repeats):
        made = worker.predict(latents, 1)
    synchronize()
    return (time.perf_counter() - started) / repeats, made


def moved_bytes(worker: Any, latents: torch.Tensor) -> int:
    """What a step sends between cards."""
    counted, queue = 0, transfer._queue_copies

    def count(sources: Sequence[torch.Tensor], *others: Any) -> Any:
        nonlocal counted
        counted += sum(source.nbytes for source in sources)
        return queue(sources, *others)

    transfer._queue_copies = count
    try:
        worker.predict(latents, 1)
    finally:
        transfer._queue_copies = queue
    return counted


def with_failure(
    worker: Any, model: Transformer, latents: torch.Tensor
) -> tuple[float, dict[str, torch.Tensor]]:
    """A step in which a card fails in the middle, and what the others make of it."""

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("injected")

    middle = model.model.block(model.model.config.layers // 2).attn
    hook = middle.register_forward_pre_hook(fail)
    started = time.perf_counter()
    made = worker.predict(latents, 1)
    synchronize()
    hook.remove()
    return time.perf_counter() - started, made


def difference(made: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float((made[name] - expected[name]).norm() / expected[name].norm()) for name in made)


def layouts(found: list[Replica]) -> Iterator[tuple[Layout, bool]]:
    """Each with whether it computes both branches of guidance."""
    yield Layout(CFG, tuple(found[:2])), True
    for count in (2, 4):
        if len(found) >= count:
            yield Layout(SEQUENCE, tuple(found[:count])), False
    if len(found) >= 4:
        yield Layout(BOTH, tuple(found[:4])), True
    layers = found[0].spec.checkpoint.component("transformer").config()["num_layers"]
    for count in (2, 3):
        if len(found) >= count:
            hands = dealt(
                [layers * (number + 1) // count - layers * number // count for number in range(count)]
            )
            parts = zip(found[:count], hands, strict=True)
            yield Layout(LAYERS, tuple(replica.holding(hand) for replica, hand in parts)), True


def only_positive(run: SamplingRun) -> SamplingRun:
    return replace(run, conditions={POSITIVE: run.conditions[POSITIVE]})


def measure(folder: Path, way: str) -> None:
    found = replicas(folder, way.partition(":")[0])
    run, latents = inputs(folder, found[0])
    options = SamplingOptions(attention=way.partition(":")[2] or EXACT)
    cap(None)
    started = time.perf_counter()
    models = {found[0]: loading.load(found[0])}
    synchronize()
    print(f"{way}: loaded in {time.perf_counter() - started:.1f} s", flush=True)
    baselines = {}
    for guided in (True, False):
        one = run if guided else only_positive(run)
        arguments = one.schedule, one.padded_size, one.conditions
        worker = LocalWorker(models[found[0]], *arguments, options=options)
        baselines[guided] = timed(worker, latents)
        peak = torch.cuda.max_memory_allocated(CARDS[0]) / GIB
        what = "one card" if guided else "one card, cfg 1"
        print(f"| {way} | {what} | {baselines[guided][0]:.3f} | | {peak:.2f} | | |", flush=True)
        del worker
    for layout, guided in layouts(found):
        if layout.mode == LAYERS:
            models.clear()
        gc.collect()
        torch.cuda.empty_cache()
        needed = max(each.spec.nbytes() for each in layout.replicas) / GIB
        cap(CAP_GIB if needed < CAP_GIB - 3 else None)
        for replica in layout.replicas:
            if replica not in models:
                started = time.perf_counter()
                source = models.get(found[0]) if replica.spec == found[0].spec else None
                models[replica] = loading.load(replica, source=source)
                synchronize()
                how = "copied" if source else "loaded"
                print(f"{replica}: {how} in {time.perf_counter() - started:.1f} s", flush=True)
        one = run if guided else only_positive(run)
        arguments = one.schedule, one.padded_size, one.conditions
        cards = [LocalWorker(models[replica], *arguments, options=options) for replica in layout.replicas]
        worker = ParallelWorker(cards, layout)
        seconds, made = timed(worker, latents)
        peak = max(torch.cuda.max_memory_allocated(device) for device in CARDS) / GIB
        alone, expected = baselines[guided]
        wrong = difference(made, expected)
        what = f"{layout.mode} on {len(layout.replicas)}{'' if guided else ', cfg 1'}"
        moved = moved_bytes(worker, latents) / 1e9
        print(
            f"| {way} | {what} | {seconds:.3f} | {seconds / alone:.3f} | {peak:.2f} | {moved:.2f} "
            f"| {wrong:.1e} |", flush=True,
        )  # fmt: skip
        if layout.mode == BOTH:
            seconds, made = with_failure(worker, models[layout.replicas[-1]], latents)
            wrong, ratio = difference(made, expected), seconds / alone
            print(
                f"| {way} | {what}, one fails | {seconds:.3f} | {ratio:.3f} | | | {wrong:.1e} |", flush=True
            )
        del worker, made


def main() -> None:
    print([torch.cuda.get_device_name(device) for device in CARDS], *links(CARDS), sep="\n")
    print(
        "| weights and arithmetic | cards | step s | of one card | peak GiB a card | GB moved | difference |"
    )
    print("|---|---|---|---|---|---|---|")
    for way in sys.argv[2:] or WAYS:
        measure(Path(sys.argv[1]), way)


if __name__ == "__main__":
    main()
