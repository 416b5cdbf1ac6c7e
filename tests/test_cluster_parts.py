"""What workers of a cluster are sent, and how they find their files: without a Ray."""

from __future__ import annotations

import importlib.util
import io
import shutil
import struct
from pathlib import Path

import pytest
import torch
from cluster_runs import make_run
from engine.arithmetic import apply_settings, library_version, settings_now
from engine.cluster import link
from engine.cluster.copies import describe_checkpoint, describe_lora, find_checkpoint, find_lora
from engine.cluster.crew import _difference
from engine.cluster.frames import read_frame, write_frame
from engine.cluster.link import ADDRESS_VARIABLE, Link, cluster_address, require_ray
from engine.cluster.task import Task, single
from engine.cluster.wire import WireError, packed, unpacked
from engine.cluster.worker import LIBRARIES, EngineWorker, disk_cache
from engine.errors import CheckpointError, FireRedError, InputError
from engine.files.cache import FOLDER_VARIABLE, SIZE_VARIABLE, DiskCache
from engine.files.checkpoint import Checkpoint
from engine.files.identity import folder_content
from engine.models import loading
from engine.sampling.options import SamplingOptions, StepCacheOptions
from engine.sampling.sampling import sample
from safetensors.torch import save_file


def test_values_cross_as_they_are() -> None:
    matrix = torch.randn(3, 4).bfloat16()
    sent = [1, None, "x", 2.5, True, matrix, matrix[:2], matrix.T]
    value = {"a": sent, "b": torch.empty(0), "c": 2**64 - 1}
    there = unpacked(packed(value))
    assert there["a"][:5] == [1, None, "x", 2.5, True] and there["c"] == 2**64 - 1
    for tensor, before in zip(there["a"][5:], sent[5:], strict=True):
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, before)
    assert there["b"].shape == (0,)


@pytest.mark.parametrize("content", [b"", b"x" * 20, struct.pack("<Q", 5) + b"{}", packed(1)[:-3]])
def test_other_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(WireError):
        unpacked(content)


def test_messages_carry_bytes_and_end_where_the_stream_does() -> None:
    stream = io.BytesIO()
    write_frame(stream, (1, "call", {"content": b"\0abc", "task": None, "list": [b"", 2]}))
    end = stream.tell()
    stream.seek(0)
    assert read_frame(stream) == [1, "call", {"content": b"\0abc", "task": None, "list": [b"", 2]}]
    with pytest.raises(EOFError):
        read_frame(stream)
    stream.truncate(end - 2)
    stream.seek(0)
    with pytest.raises(EOFError):
        read_frame(stream)


def test_a_copy_is_found_by_name_and_known_by_content(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = describe_checkpoint(tiny)
    there = described | {"path": str(tmp_path / "not here" / tiny.name)}
    with pytest.raises(CheckpointError, match=r"There is no tiny.*FIRERED_MODELS is not set"):
        find_checkpoint(there)
    other = Path(shutil.copytree(tiny.folder, tmp_path / "models" / "a" / "other"))
    monkeypatch.setenv("FIRERED_MODELS", str(tmp_path / "models"))
    assert find_checkpoint(there).folder == other, "the name differs, the content does not"
    copy = Path(shutil.copytree(tiny.folder, tmp_path / "models" / "b" / tiny.name))
    assert find_checkpoint(there).folder == copy
    assert folder_content(copy) == folder_content(tiny.folder)
    shutil.rmtree(other)
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has other content.*Copy tiny from there"):
        find_checkpoint(there)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"safetensors is in one of them alone"):
        find_checkpoint(there)


def test_a_lora_is_found_below_the_model_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here.safetensors", tmp_path / "models" / "loras" / "here.safetensors"
    save_file({"x": torch.ones(3)}, here)
    described = describe_lora(here)
    there.parent.mkdir(parents=True)
    shutil.move(here, there)
    monkeypatch.setenv("FIRERED_MODELS", str(tmp_path / "models"))
    assert find_lora(described) == there


def make_worker() -> EngineWorker:
    settings = {"number": 1, "card": False, "threads": torch.get_num_threads(), "torch": settings_now()}
    return EngineWorker(settings)


def test_a_task_gives_the_same_bits_in_a_worker(tiny: Checkpoint) -> None:
    """With everything that a run may have: masks, denoise, a schedule's end, the step cache, guidance."""
    options = SamplingOptions(
        guidance_to=0.7, denoise=0.6, differential=0.5, step_cache=StepCacheOptions(5.0, 0.1, 0.9)
    )
    samples = torch.randn(3, 16, 1, 15, 17)
    mask = torch.rand(3, 1, 1, 15, 17).round()
    run = make_run(tiny, samples=samples, mask=mask, options=options, draws=(4, 0, 2), steps=6)
    transformer = loading.load(run.replica)
    expected = sample(transformer, run)
    worker = make_worker()
    task = packed(Task(run, "stop").plain())
    for number in range(3):
        asked = {"key": "k", "turn": number, "number": number, "state": None, "arithmetic": ""}
        answer = unpacked(worker.answer("sample", packed(asked), task))
        assert torch.equal(answer["result"]["latents"], expected[number : number + 1]), answer
        assert torch.equal(sample(transformer, single(run, number)), expected[number : number + 1])
    assert answer["result"]["skipped"] > 0


def test_a_worker_answers_faults_and_never_raises(tiny: Checkpoint) -> None:
    worker = make_worker()
    branch = {"key": "k", "turn": 1, "branch": "positive", "latents": torch.ones(1), "step": 0}
    for method, content, said in [
        ("nothing", packed({}), "no nothing"),
        ("sample", b"rubbish", "not a message"),
        ("progress", packed({"x": 1}), "unexpected keyword"),
        (
            "predict",
            packed(branch),
            "prepared",
        ),
    ]:
        assert said in unpacked(worker.answer(method, content))["message"]


def test_a_worker_computes_with_comfyuis_settings_of_torch() -> None:
    before = settings_now()
    assert {"cudnn.benchmark", "mkldnn.enabled", "deterministic", "math_sdp"} <= set(before)
    try:
        for name, value in before.items():
            apply_settings({name: not value})
            assert settings_now()[name] is not value, name
    finally:
        apply_settings(before)
    assert settings_now() == before


def test_versions_that_decide_bits_must_be_the_same() -> None:
    ours = {name: library_version(name) for name in LIBRARIES}
    assert _difference(ours) == ""
    build = str(ours["torch"]).partition("+")[0] + "+other"
    assert _difference(ours | {"torch": build}) == ""
    assert "torch 2.0 (here" in _difference(ours | {"torch": "2.0"})
    assert "diffusers is missing" in _difference(ours | {"diffusers": None})


def test_what_is_missing_or_wrong_around_ray_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADDRESS_VARIABLE, "ray://10.0.0.1:10001")
    with pytest.raises(FireRedError, match="Join this machine"):
        cluster_address()
    monkeypatch.setenv(ADDRESS_VARIABLE, " 10.0.0.1:6379 ")
    assert cluster_address() == "10.0.0.1:6379"
    monkeypatch.setenv("FIRERED_WORKER_TIMEOUT", "soon")
    with pytest.raises(InputError, match="FIRERED_WORKER_TIMEOUT is 'soon'"):
        Link("")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FireRedError, match="pip install ray"):
        require_ray()
    assert link.LOCAL_PREFIX in str(link._make_folder())


def test_a_worker_keeps_as_much_on_disk_as_its_machine_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SIZE_VARIABLE, raising=False)
    assert disk_cache() is None
    assert disk_cache(["/comfyui", 7]) == DiskCache(Path("/comfyui"), 7)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert disk_cache(["/comfyui", 7]) == DiskCache(tmp_path, 100 * 10**9)
    monkeypatch.setenv(SIZE_VARIABLE, "2.5")
    assert disk_cache() == DiskCache(tmp_path, 2_500_000_000)
    monkeypatch.setenv(SIZE_VARIABLE, "much")
    with pytest.raises(FireRedError, match=r"FIRERED_CACHE_GB is 'much'; set it to a number"):
        disk_cache()
