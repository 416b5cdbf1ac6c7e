"""Quantised weights and modulation on disk are identical and limited, never half-written and never needed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import replica_for
from engine.files.cache import SUFFIX, WRITING_SECONDS, CacheWriter, DiskCache
from engine.files.checkpoint import Checkpoint
from engine.files.tensors import read_tensors
from engine.models import loading
from engine.sampling.encoded_cache import embedding_name, load_or_encode, reference_name
from PIL import Image
from safetensors.torch import load_file

from launcher.folders import ROOT

LAYOUT = {"a": (torch.int8, (3, 4)), "b": (torch.float32, (2,)), "c": (torch.bfloat16, (5,))}
TENSORS = {
    "a": torch.arange(12, dtype=torch.int8).view(3, 4),
    "b": torch.tensor([1.5, -2.5]),
    "c": torch.arange(5, dtype=torch.bfloat16),
}


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "cache", 10**9)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("borrowed", [None, torch.device("cpu")])
def test_what_is_written_tensor_by_tensor_is_a_safetensors_file(
    tmp_path: Path, borrowed: torch.device | None
) -> None:
    writer = CacheWriter(tmp_path / "file", LAYOUT)
    for name in ("c", "a", "b"):
        assert not (tmp_path / "file").exists()
        writer.write(name, TENSORS[name])
    writer.finish()
    assert same(load_file(tmp_path / "file"), TENSORS)
    read = read_tensors(tmp_path / "file", reuse_buffers_for=borrowed)
    assert same({name: tensor.clone() for name, tensor in read}, TENSORS)


def test_one_process_writes_a_file_that_several_need(cache: DiskCache) -> None:
    """As workers on cards of one machine do, which load the same weights at once."""
    first = cache.create("weights", LAYOUT)
    assert first is not None and cache.create("weights", LAYOUT) is None
    other = cache.create("others", LAYOUT)
    assert other is not None
    for writer in (first, other):
        writer.abandon()
    again = cache.create("weights", LAYOUT)
    assert again is not None
    os.utime(again._partial, (0, time.time() - 2 * WRITING_SECONDS))  # its process was killed
    assert cache.create("weights", LAYOUT) is not None


def test_an_unfinished_file_never_gets_its_name(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "file", LAYOUT)
    writer.write("a", TENSORS["a"])
    writer.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("role", "second"), [("transformer", "int8"), ("transformer", "int8-fast"), ("text_encoder", "int8")]
)
def test_the_second_start_reads_the_copy_and_gets_identical_weights(
    tiny: Checkpoint, cache: DiskCache, role: str, second: str
) -> None:
    first = state(loading.load(replica_for(tiny, role, "int8"), cache=cache))
    (kept,) = cache.folder.iterdir()
    before = kept.stat()
    os.utime(kept, ns=(1, 1))
    assert same(first, state(loading.load(replica_for(tiny, role, second), cache=cache)))
    after = kept.stat()
    assert after.st_ino == before.st_ino and after.st_mtime_ns >= before.st_mtime_ns  # not written again
    assert same(first, state(loading.load(replica_for(tiny, role, "int8"))))


def test_progress_reaches_the_end(tiny: Checkpoint, cache: DiskCache) -> None:
    seen: list[tuple[int, int]] = []
    for _ in ("from the checkpoint", "from the copy"):
        loading.load(replica_for(tiny, "transformer", "int8"), lambda *progress: seen.append(progress), cache)
        assert seen[-1][0] == seen[-1][1]


def test_the_second_start_does_not_read_the_checkpoint(
    tiny: Checkpoint, cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading.load(replica_for(tiny, "transformer", "int8"), cache=cache).modulation.of(torch.tensor([0.5]))

    def unread(*_: object, **__: object) -> None:
        raise AssertionError("the checkpoint's weights were read")

    monkeypatch.setattr("engine.files.checkpoint.Component.tensors", unread)
    loading.load(replica_for(tiny, "transformer", "int8"), cache=cache).modulation.of(torch.tensor([0.5]))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "another shape", "another model's"])
def test_a_damaged_copy_is_made_again(tiny: Checkpoint, cache: DiskCache, damage: str) -> None:
    expected = state(loading.load(replica_for(tiny, "transformer", "int8"), cache=cache))
    (kept,) = cache.folder.iterdir()
    good = kept.read_bytes()
    if damage == "truncated":
        kept.write_bytes(good[:-100])
    elif damage == "garbage":
        kept.write_bytes(b"\0" * len(good))
    elif damage == "another shape":
        assert b"[64,64]" in good or b"[64, 64]" in good
        kept.write_bytes(good.replace(b"[64, 64]", b"[63, 64]", 1))
    else:
        writer = CacheWriter(kept, LAYOUT)
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
        writer.finish()
    assert same(state(loading.load(replica_for(tiny, "transformer", "int8"), cache=cache)), expected)
    assert kept.read_bytes() == good


def test_a_copy_of_replaced_weights_is_not_used(tiny_copy: Path, cache: DiskCache) -> None:
    loading.load(replica_for(Checkpoint(tiny_copy), "transformer", "int8"), cache=cache)
    os.utime(tiny_copy / "transformer" / "diffusion_pytorch_model.safetensors", ns=(1, 1))
    loading.load(replica_for(Checkpoint(tiny_copy), "transformer", "int8"), cache=cache)
    assert len(list(cache.folder.iterdir())) == 2


def test_the_limit_holds_the_least_recently_used_goes_first_and_foreign_files_stay(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1000)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 900)
    (tmp_path / "folder").mkdir()
    for age, name in enumerate(("old", "older")):
        file = tmp_path / f"{name}.firered.safetensors"
        file.write_bytes(b"x" * 300)
        os.utime(file, ns=(10**9 * (5 - age), 10**9 * (5 - age)))
    writer = cache.create("new", {"a": (torch.uint8, (500,))})
    assert writer is not None
    writer.abandon()
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.safetensors",
        "folder",
        "old.firered.safetensors",
    }
    assert cache.create("huge", {"a": (torch.uint8, (2000,))}) is None


def test_a_disk_that_fills_up_ends_the_caching_and_not_the_load(
    tiny: Checkpoint, cache: DiskCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    create = CacheWriter.__init__

    def small_disk(self: CacheWriter, *args: object) -> None:
        create(self, *args)
        file = self._file

        class Full:
            closed = False

            def __getattr__(self, name: str) -> object:
                return getattr(file, name)

            def write(self, data: bytes) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            def close(self) -> None:
                self.closed = True
                file.close()

        self._file = Full()

    monkeypatch.setattr(CacheWriter, "__init__", small_disk)
    loaded = state(loading.load(replica_for(tiny, "transformer", "int8"), cache=cache))
    assert same(loaded, state(loading.load(replica_for(tiny, "transformer", "int8"))))
    assert "No space left on device" in caplog.text
    assert list(cache.folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_no_obstacle(tiny: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    loading.load(replica_for(tiny, "transformer", "int8"), cache=DiskCache(tmp_path / "file", 10**9))


def test_cancelling_a_load_leaves_nothing_behind(tiny: Checkpoint, cache: DiskCache) -> None:
    def cancel(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loading.load(replica_for(tiny, "transformer", "int8"), cancel, cache)
    assert list(cache.folder.iterdir()) == []


def state(component) -> dict[str, torch.Tensor]:
    return getattr(component, "model", component).state_dict()


def test_two_processes_of_one_number_do_not_write_one_file(tmp_path: Path) -> None:
    """Containers that share a folder may have processes of the same number."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from engine.files.cache import PROCESS; print(PROCESS)"
    )
    command = [sys.executable, "-c", code, str(ROOT / "nodes")]
    names = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(names) == 2


def test_what_cannot_be_deleted_does_not_keep_others_from_being_written(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 3000)
    (tmp_path / f"folder{SUFFIX}").mkdir()  # unlink refuses it
    os.utime(tmp_path / f"folder{SUFFIX}", (1, 1))
    for name in ("a", "b", "c"):
        cache.write(name, {"x": torch.zeros(250)})
    assert cache.read("c") is not None and cache.read("a") is None


def test_only_finite_encodings_are_kept(cache: DiskCache) -> None:
    nan = torch.full((2,), float("nan"))
    _, good = load_or_encode(cache, ["bad", "good"], lambda missing: [nan, torch.ones(2)])
    assert good.tolist() == [1.0, 1.0]
    assert cache.read("bad") is None and cache.read("good") is not None


def test_a_folder_that_takes_nothing_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = DiskCache(tmp_path / "file", 10**9)
    load_or_encode(cache, ["a", "b"], lambda missing: [torch.ones(2)] * 2)
    assert cache.create("c", LAYOUT) is None
    assert caplog.text.count("not caching") == 1 and str(tmp_path / "file") in caplog.text


def test_reading_a_file_holds_it_once(tmp_path: Path) -> None:
    """A process of its own is used, because the measured value is the most memory that a process ever had."""
    megabytes = 200
    DiskCache(tmp_path, 10**9).write("x", {"x": torch.ones(megabytes * 250_000)})
    code = """if True:
        import resource, sys
        from pathlib import Path
        from engine.files.cache import DiskCache
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        cache, before = DiskCache(Path(sys.argv[1]), 10**9), peak()
        kept = cache.read("x")
        print(peak() - before, float(kept["x"].sum()))
    """
    if sys.platform != "linux":
        pytest.skip("ru_maxrss is in other units")
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "nodes")}
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    grown, total = map(float, told.split())
    assert total == megabytes * 250_000 and grown < 1.5 * megabytes


def test_mapped_tensors_are_whole_or_none(cache: DiskCache) -> None:
    writer = cache.create("x", LAYOUT)
    assert writer is not None and cache.map("x") is None
    for name, tensor in TENSORS.items():
        writer.write(name, tensor)
    writer.finish()
    mapped = cache.map("x")
    assert mapped is not None and same(mapped, TENSORS)
    cache.remove("x")
    assert same(mapped, TENSORS) and cache.map("x") is None
    for content in (b"", b"\xff" * 99, b"\x02" + bytes(7) + b"{}" + b"rest"):
        cache.path("x").write_bytes(content)
        assert not cache.map("x")


def test_weights_in_use_keep_their_file_young(tiny: Checkpoint, cache: DiskCache) -> None:
    replica = replica_for(tiny, "transformer", "int8")
    loading.load(replica, cache=cache)
    (kept,) = cache.folder.iterdir()
    os.utime(kept, ns=(1, 1))
    loading.mark_used(replica.spec, cache)
    assert kept.stat().st_mtime_ns > 1
    loading.mark_used(replica_for(tiny, "transformer", "fp32").spec, cache)  # for which nothing is kept


def test_the_same_prompt_and_pictures_are_encoded_once(cache: DiskCache) -> None:
    asked: list[list[int]] = []

    def encode(missing: list[int]) -> list[torch.Tensor]:
        asked.append(missing)
        return [torch.full((2,), float(index)) for index in missing]

    assert [t.tolist() for t in load_or_encode(cache, ["a", "b", "a"], encode)] == [[0, 0], [1, 1], [0, 0]]
    assert [t.tolist() for t in load_or_encode(cache, ["b", "c"], encode)] == [[1, 1], [1, 1]]
    assert asked == [[0, 1], [1]]


def test_an_encodings_name_depends_on_all_it_is_made_from(tiny: Checkpoint, tiny_copy: Path) -> None:
    replica, vae = replica_for(tiny, "text_encoder"), replica_for(tiny, "vae")
    red, blue = (Image.new("RGB", (8, 4), colour) for colour in ("red", "blue"))
    os.utime(tiny_copy / "processor" / next((tiny_copy / "processor").iterdir()).name, ns=(1, 1))
    names = [
        embedding_name(replica, "a hat", [red]),
        embedding_name(replica, "a cat", [red]),
        embedding_name(replica, "a hat", [blue]),
        embedding_name(replica, "a hat", [red, blue]),
        embedding_name(replica, "a hat", [red.resize((4, 8))]),
        embedding_name(replica_for(tiny, "text_encoder", "int8"), "a hat", [red]),
        embedding_name(replica_for(Checkpoint(tiny_copy), "text_encoder"), "a hat", [red]),
        reference_name(vae, red, 1.0),
        reference_name(vae, red, 0.5),
        reference_name(vae, blue, 1.0),
        reference_name(replica_for(tiny, "vae", "bf16"), red, 1.0),
    ]
    assert len(set(names)) == len(names)
    assert embedding_name(replica, "a hat", [red.copy()]) == names[0]
