"""What happened in a run can be read in the graph, and later in the PNG."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import replica_for
from engine.files.checkpoint import Checkpoint
from engine.models import loading
from engine.sampling.options import SamplingOptions, StepCacheOptions
from engine.sampling.record import FROM_DISK, RunRecord
from engine.sampling.sampling import sample
from PIL import Image
from prompts import DECODE, SAMPLE, SAVE, changed, edit_prompt, wait_until_empty, with_node
from test_sampling import plan

from launcher.client import Client, Prompt, Run

SHOW = "41"


def with_report(prompt: Prompt, **inputs: object) -> Prompt:
    return with_node(changed(prompt, SAMPLE, **inputs), SHOW, "PreviewAny", source=[SAMPLE, 1])


def shown(run: Run) -> str:
    (text,) = run.outputs[SHOW]["text"]
    return text


def in_the_png(run: Run, work: Path) -> list[str]:
    (image,) = run.outputs[SAVE]["images"]
    with Image.open(work / "output" / image["subfolder"] / image["filename"]) as picture:
        return json.loads(picture.text.get("firered", "[]"))


def test_the_sampler_says_what_happened_and_so_does_the_png(client: Client, work: Path) -> None:
    first, second = (with_report(edit_prompt(), seed=seed) for seed in (410, 411))
    run = client.run(first, metadata={"workflow": {}})
    text = shown(run)
    for part in (
        "transformer fp32 on cpu",
        "64x64, 1 references, 2 steps, cfg 4, seed 410",
        " s a step, ",
    ):
        assert part in text
    assert in_the_png(run, work) == [text]
    again = client.run(changed(first, DECODE, tiling="tiled"), metadata={"workflow": {}})
    assert SAMPLE not in again.executed and in_the_png(again, work) == [text]
    assert in_the_png(client.run(second), work) == []  # no metadata was asked for


def test_a_resumed_run_and_skipped_steps_are_told(tiny: Checkpoint) -> None:
    options = SamplingOptions(step_cache=StepCacheOptions(10.0, start=0.25))
    run = plan(tiny, steps=8, options=options)
    record = RunRecord()
    sample(loading.load(replica_for(tiny, "transformer")), run, record=record)
    text = record.describe(run)
    assert record.skipped > 0 and f"; the step cache skipped {record.skipped}" in text
    record.first_step = 5
    assert "; resumed at step 6 of 8" in record.describe(run)


def test_times_count_no_set_up() -> None:
    times = iter([10.0, 15.0, 16.0, 17.0])
    record = RunRecord(clock=lambda: next(times))
    record.start([torch.device("cpu")])
    record.step()
    assert record.seconds_each == 5.0
    record.step()
    record.step()
    assert record.seconds_each == 1.0


def test_a_run_whose_latents_come_from_disk_says_so(tiny: Checkpoint) -> None:
    assert FROM_DISK in RunRecord().describe(plan(tiny))


@pytest.mark.parametrize("before", [[], ["another run"]])
def test_what_is_there_already_stays(client: Client, work: Path, before: list[str]) -> None:
    prompt = with_report(edit_prompt(), seed=420 + len(before))
    run = client.run(prompt, metadata={"firered": [*before]})
    assert in_the_png(run, work) == [*before, shown(run)]


def test_the_node_says_what_it_does(client: Client, work: Path) -> None:
    """Loading, then the modulation of a schedule that is new, then the steps."""
    client.post("/free", json={"unload_models": True, "free_memory": True})
    wait_until_empty(client, work)
    run = client.run(changed(edit_prompt(), SAMPLE, steps=7, seed=430))
    assert run.status == "success", run.error
    said = [text for node, text in run.texts if node == SAMPLE]
    assert said[0] == "loading the transformer fp32 on cpu"
    assert said[1] == "computing the modulation of 7 steps"
    assert said[2] == "step 1/7" and said[-1].startswith("step 7/7, ")
