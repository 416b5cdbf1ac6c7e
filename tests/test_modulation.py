"""What depends on the timestep alone is computed once for a schedule."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import replica_for
from diffusers.models.embeddings import get_timestep_embedding
from engine.cards.card import Card
from engine.files.cache import DiskCache
from engine.files.checkpoint import Checkpoint
from engine.models import loading
from engine.models.config import TransformerConfig
from engine.models.modulation import TIME_CHANNELS, TIME_SCALE, Modulation, Table, is_folded, time_waves
from engine.units import GIB
from engine.weights.components import Replica
from safetensors.torch import load_file, save_file

P40 = Card("gpu:0", "Tesla P40", torch.device("cpu"), native_bf16=False, memory=24 * GIB)


def modulation_of(replica: Replica, cache: DiskCache | None = None) -> Modulation:
    config = TransformerConfig.of(replica.spec.checkpoint.component("transformer").config())
    return Modulation(replica, config, cache)


def test_folding_leaves_out_a_third_of_the_weights(tiny: Checkpoint) -> None:
    names = loading.load(replica_for(tiny, "transformer")).model.state_dict()
    assert names and not [name for name in names if "_mod." in name or "time_text_embed" in name]


def test_the_time_embedding_has_the_bits_of_diffusers() -> None:
    timesteps = torch.cat(
        [torch.linspace(1, 0, 41), torch.tensor([0.9999, 1 / 3, 1e-3, 1e-7]), torch.rand(99)]
    )
    reference = get_timestep_embedding(
        timesteps, TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0, scale=TIME_SCALE
    )
    assert reference.shape == (144, 256) and torch.equal(time_waves(timesteps), reference)


def test_the_schedules_last_used_are_kept(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    modulation = loading.load(replica_for(tiny, "transformer")).modulation
    computed = []
    compute = Modulation._compute_table
    monkeypatch.setattr(Modulation, "_compute_table", lambda *args: computed.append(1) or compute(*args))
    for steps in (2, 3, 2, 3):
        modulation.of(torch.linspace(1, 0.1, steps))
    assert len(computed) == 2


def test_a_broken_table_is_never_kept(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN while folding must not be kept, neither in this process nor on disk."""
    timesteps, cache, computed = torch.tensor([0.5, 0.25]), DiskCache(tmp_path, 10**9), []
    compute = Modulation._compute_table

    def broken_once(*args: Any) -> Table:
        table = compute(*args)
        if not computed:
            table["blocks"][1, 0, 0, 0] = float("nan")
        computed.append(1)
        return table

    monkeypatch.setattr(Modulation, "_compute_table", broken_once)
    modulation = modulation_of(replica_for(tiny, "transformer"), cache)
    modulation.of(timesteps)
    assert list(tmp_path.iterdir()) == []
    modulation.of(timesteps)
    good = modulation.of(timesteps).at(1)
    assert len(computed) == 2 and all(bool(part.isfinite().all()) for part in good)
    (kept,) = tmp_path.iterdir()
    tables = {name: rows.clone() for name, rows in load_file(kept).items()}
    for damage in ("nan", "truncated"):
        if damage == "nan":
            tables["blocks"][0, 1] = float("inf")
            save_file(tables, kept)
        else:
            kept.write_bytes(kept.read_bytes()[:-4096])
        again = modulation_of(replica_for(tiny, "transformer"), cache).of(timesteps).at(1)
        assert all(map(torch.equal, again, good))
        assert all(bool(rows.isfinite().all()) for rows in load_file(kept).values())
    assert len(computed) == 4


def test_a_table_in_memory_is_its_file_and_outlives_it(tiny: Checkpoint, tmp_path: Path) -> None:
    cache, timesteps = DiskCache(tmp_path, 10**9), torch.tensor([0.5, 0.25])
    modulation = modulation_of(replica_for(tiny, "transformer"), cache)
    modulation.of(timesteps)
    (kept,) = tmp_path.iterdir()
    os.utime(kept, ns=(1, 1))
    schedule = modulation.of(timesteps)
    assert kept.stat().st_mtime_ns > 1  # in daily use, so not the first to go
    if sys.platform == "linux":
        assert str(kept) in Path("/proc/self/maps").read_text()
    first = schedule.at(0)
    kept.unlink()
    assert not torch.equal(schedule.at(1).blocks, first.blocks)
    assert torch.equal(schedule.at(0).blocks, first.blocks)


def test_a_table_is_found_by_all_its_bits_depend_on(tiny: Checkpoint, tmp_path: Path) -> None:
    replica, timesteps = replica_for(tiny, "transformer"), torch.tensor([0.5])
    other_card = replace(replica, card=replace(replica.card, name="another"))
    names = [modulation_of(one)._name(timesteps) for one in (replica, other_card)]
    names.append(modulation_of(replica)._name(torch.tensor([0.25])))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        names.append(modulation_of(replica)._name(timesteps))
    finally:
        torch.set_num_threads(threads)
    assert len(set(names)) == 4 and modulation_of(replica)._name(timesteps) == names[0]


def test_folding_says_what_it_reads(tiny: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[int, int]] = []
    with caplog.at_level("INFO"):
        modulation = modulation_of(replica_for(tiny, "transformer"))
        modulation.of(torch.tensor([0.5, 0.25]), on_progress=lambda *progress: seen.append(progress))
    stored = tiny.component("transformer").stored().items()
    weights = sum(each.nbytes for name, each in stored if is_folded(name))
    assert seen[-1] == (weights, weights) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert "computing modulation for 2 steps: reading" in caplog.text
    assert re.search(r"modulation computed in [\d.]+ s \([\d.]+ GB/s\)", caplog.text)
