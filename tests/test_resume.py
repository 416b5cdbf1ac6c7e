"""In the engine: an interrupted run goes on where it was, ends in the same bits and leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import replica_for
from engine.files.cache import PROCESS, SUFFIX, DiskCache
from engine.files.checkpoint import Checkpoint
from engine.latents import LatentStatistics
from engine.models import loading
from engine.models.guard import GUARDS
from engine.sampling.resume import RunState, SavedRun
from engine.sampling.sampling import SamplingRun, sample
from test_sampling import plan

STEPS = 6


@pytest.fixture
def store(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "runs", 10**9)


class Stop(Exception):
    pass


def stop_at(step: int) -> Callable[[int, int, torch.Tensor], None]:
    def on_step(done: int, total: int, denoised: torch.Tensor) -> None:
        if done == step:
            raise Stop

    return on_step


def sampled_steps(transformer: Any, run: SamplingRun, saved: SavedRun) -> tuple[list[int], torch.Tensor]:
    """The steps that a run reported, and its latents."""
    steps: list[int] = []
    latents = sample(transformer, run, lambda done, *_: steps.append(done), saved=saved)
    return steps, latents


def files(store: DiskCache) -> list[Path]:
    return sorted(store.folder.iterdir()) if store.folder.is_dir() else []


@pytest.mark.parametrize("precision", ["fp32", "int8-fast"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_run_stopped_at_any_step_ends_in_the_same_bits(
    tiny: Checkpoint, store: DiskCache, precision: str, batch: int
) -> None:
    transformer = loading.load(replica_for(tiny, "transformer", precision))
    run = plan(tiny, steps=STEPS, samples=torch.zeros(batch, 16, 4, 4))
    expected = sample(transformer, run)
    for step in range(1, batch * STEPS):
        with pytest.raises(Stop):
            sample(transformer, run, stop_at(step), saved=SavedRun(store, run.name()))
        saved = SavedRun(store, run.name())
        steps, resumed = sampled_steps(transformer, run, saved)
        assert torch.equal(resumed, expected)
        assert steps == list(range(step + 1, batch * STEPS + 1))
        saved.forget()
        assert files(store) == []


def test_a_finished_run_waits_for_its_decode(tiny: Checkpoint, store: DiskCache) -> None:
    run = plan(tiny, steps=STEPS)
    saved = SavedRun(store, run.name())
    latents = sample(loading.load(replica_for(tiny, "transformer")), run, saved=saved)
    kept = SavedRun(store, run.name()).result(1)
    assert kept is not None and torch.equal(kept, latents)
    assert SavedRun(store, run.name()).result(2) is None


def test_a_finished_run_of_other_kernels_is_not_handed_back(
    tiny: Checkpoint, store: DiskCache, caplog: pytest.LogCaptureFixture
) -> None:
    transformer = loading.load(replica_for(tiny, "transformer", "int8-fast"))
    run = replace(plan(tiny, steps=STEPS), replica=replica_for(tiny, "transformer", "int8-fast"))
    latents = sample(transformer, run, saved=SavedRun(store, run.name()))
    assert transformer.arithmetic and SavedRun(store, run.name()).result(1) is None
    steps, again = sampled_steps(transformer, run, SavedRun(store, run.name()))
    assert steps == [] and torch.equal(again, latents)
    other = replace(transformer, arithmetic="other kernels")
    steps, _ = sampled_steps(other, run, SavedRun(store, run.name()))
    assert steps == list(range(1, STEPS + 1)) and "starting over" in caplog.text


def test_what_an_unguarded_run_let_pass_is_never_handed_back(tiny: Checkpoint, store: DiskCache) -> None:
    saved = SavedRun(store, plan(tiny).name("off"))
    saved.open("")
    saved.update(RunState(0, torch.zeros(1, 4, 64), (torch.full((1, 16, 1, 4, 4), float("nan")),)), now=True)
    assert SavedRun(store, plan(tiny).name("off")).result(1) is None
    assert len({plan(tiny).name(guard) for guard in GUARDS}) == 3


def test_a_card_that_fails_keeps_its_own_error(store: DiskCache) -> None:
    """An error while the state is saved must not hide why the run stopped."""
    saved = SavedRun(store, "2" * 32)
    saved.open("")
    saved._unsaved = RunState(3, torch.zeros(1, 4, 64, device="meta"))  # has no bytes to give
    saved.flush()
    assert files(store) == []


def test_a_changed_input_never_resumes(tiny: Checkpoint, tiny_copy: Path) -> None:
    base = plan(tiny)
    condition = base.conditions["positive"]
    other_text = replace(condition, prompt_embeds=condition.prompt_embeds + 1e-6)
    other_picture = replace(condition, reference_latents=(condition.reference_latents[0] * 1.001,))
    other_vae = replace(condition, statistics=LatentStatistics((0.0,) * 16, (1.0,) * 16))
    other_weights = replica_for(Checkpoint(tiny_copy), "transformer")
    os.utime(tiny_copy / "transformer" / "config.json", ns=(1, 1))
    touched = replica_for(Checkpoint(tiny_copy), "transformer")
    card = replace(base.replica.card, name="another card")
    changed_runs: list[SamplingRun] = [
        plan(tiny, seed=1),
        plan(tiny, steps=3),
        plan(tiny, true_cfg_scale=4.1),
        plan(tiny, true_cfg_scale=1.0),
        plan(tiny, width=48),
        plan(tiny, samples=torch.zeros(2, 16, 4, 4)),
        replace(base, conditions=base.conditions | {"positive": other_text}),
        replace(base, conditions=base.conditions | {"positive": other_picture}),
        replace(base, replica=replica_for(tiny, "transformer", "int8")),
        replace(base, replica=touched),
        replace(base, conditions=base.conditions | {"positive": other_vae}),
        replace(base, replica=replace(base.replica, card=card)),
    ]
    names = [run.name() for run in changed_runs]
    assert base.name() not in names and len(set(names)) == len(names)
    assert base.name() == plan(tiny).name()
    assert other_weights.spec.identity != touched.spec.identity


def test_other_kernels_start_over(store: DiskCache, caplog: pytest.LogCaptureFixture) -> None:
    saved = SavedRun(store, "0" * 32)
    saved.open("3072x3072 triton")
    saved.update(RunState(3, torch.zeros(1, 4, 64)))
    assert SavedRun(store, "0" * 32).open("3072x3072 torch") is None
    assert "starting over" in caplog.text
    kept = SavedRun(store, "0" * 32).open("3072x3072 triton")
    assert kept is not None and kept.step == 3


@pytest.mark.parametrize("damage", ["empty", "truncated", "garbage", "another size", "not a number"])
def test_a_damaged_state_starts_over(tiny: Checkpoint, store: DiskCache, damage: str) -> None:
    transformer, run = loading.load(replica_for(tiny, "transformer")), plan(tiny, steps=STEPS)
    with pytest.raises(Stop):
        sample(transformer, run, stop_at(3), saved=SavedRun(store, run.name()))
    (kept,) = files(store)
    content = kept.read_bytes()
    saved = SavedRun(store, run.name())
    if damage in ("empty", "truncated", "garbage"):
        kept.write_bytes({"empty": b"", "truncated": content[:-9], "garbage": b"\xff" * 99}[damage])
    else:
        tokens = torch.zeros(1, 2, 64) if damage == "another size" else torch.full((1, 4, 64), float("nan"))
        saved.open("")
        saved.update(RunState(3, tokens), now=True)
    steps, latents = sampled_steps(transformer, run, saved)
    assert steps[0] == 1 and torch.equal(latents, sample(transformer, run))


def test_states_are_written_seldom_when_steps_are_fast(store: DiskCache) -> None:
    saved = SavedRun(store, "1" * 32)
    saved.open("")
    written = set()
    for step in range(1, 200):
        saved.update(RunState(step, torch.zeros(1, 4, 64)))
        kept = SavedRun(store, "1" * 32).open("")
        assert kept is not None
        written.add(kept.step)
    assert min(written) == 1 and len(written) < 100
    saved.flush()
    kept = SavedRun(store, "1" * 32).open("")
    assert kept is not None and kept.step == 199


def test_a_full_disk_costs_the_resume_and_not_the_run(
    tiny: Checkpoint, store: DiskCache, caplog: pytest.LogCaptureFixture
) -> None:
    transformer, run = loading.load(replica_for(tiny, "transformer")), plan(tiny, steps=STEPS)
    store.folder.mkdir()
    partial = store.folder / f"{run.name()}{SUFFIX}.{PROCESS}.partial"

    def refill(*_: object) -> None:  # a disk that is always full
        partial.unlink(missing_ok=True)
        partial.symlink_to("/dev/full")

    refill()
    saved = SavedRun(store, run.name())
    assert torch.equal(sample(transformer, run, refill, saved=saved), sample(transformer, run))
    assert caplog.text.count("cannot be resumed after a crash") == 1 and "No space left" in caplog.text


def test_a_folder_that_cannot_be_written_costs_the_resume_and_not_the_run(
    tiny: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = DiskCache(tmp_path / "file", 10**9)
    transformer, run = loading.load(replica_for(tiny, "transformer")), plan(tiny, steps=STEPS)
    assert torch.equal(sample(transformer, run, saved=SavedRun(store, run.name())), sample(transformer, run))
    assert caplog.text.count("cannot be resumed after a crash") == 1


@pytest.mark.parametrize("moment", [0, 2**33])
def test_a_clock_that_jumps_loses_nothing(tiny: Checkpoint, store: DiskCache, moment: int) -> None:
    """1970 and 2242. Only the time of the file depends on the clock."""
    transformer, run = loading.load(replica_for(tiny, "transformer")), plan(tiny, steps=STEPS)
    with pytest.raises(Stop):
        sample(transformer, run, stop_at(3), saved=SavedRun(store, run.name()))
    os.utime(files(store)[0], (moment, moment))
    with pytest.raises(Stop):
        other = plan(tiny, steps=STEPS, seed=9)
        sample(transformer, other, stop_at(3), saved=SavedRun(store, other.name()))
    kept = SavedRun(store, run.name()).open("")
    assert kept is not None and kept.step == 3


def test_unfinished_runs_of_other_seeds_are_found(store: DiskCache) -> None:
    def run(number: int, edit: str = "edit", seed: int = 0) -> SavedRun:
        return SavedRun(store, f"{number:032x}", edit, seed)

    latents = torch.zeros(1, 16, 64)
    run(1, seed=2**64 - 1).update(RunState(4, latents), now=True)
    run(2, seed=7).update(RunState(0, torch.empty(0), (latents,)), now=True)  # finished, waits for its decode
    run(3, "another", seed=8).update(RunState(5, latents), now=True)
    run(4, "").update(RunState(5, latents), now=True)
    store.path("damaged").write_bytes(b"x" * 100)
    assert run(5, seed=9).other_seeds() == {2**64 - 1: 4}
    assert run(1).other_seeds() == {}, "it goes on itself"
    assert run(6, "").other_seeds() == {}
    kept = run(1).kept()
    assert kept is not None and kept[0].step == 4
