"""The search for checkpoints finds each folder once, whatever links and caches lie beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

from engine.files.search import find_checkpoints


def test_only_edit_pipelines_are_found_at_any_depth(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "team" / "model")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{")
    assert list(find_checkpoints([tmp_path, tmp_path / "absent"])) == ["team/model"]


def holds_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "QwenImageEditPlusPipeline"}')
    return folder


def test_links_to_ancestors_list_each_real_folder_once(tmp_path: Path) -> None:
    root = tmp_path / "diffusers"
    holds_checkpoint(root / "team" / "model")
    for number in range(3):
        (root / f"all-{number}").symlink_to(tmp_path)
        (root / "team" / f"up-{number}").symlink_to("..")
    assert list(find_checkpoints([root, root])) == ["team/model"]


def test_an_entry_that_cannot_be_followed_hides_nothing_beside_it(tmp_path: Path, tiny_copy: Path) -> None:
    (tiny_copy.parent / "loop").symlink_to("loop")
    (tiny_copy.parent / "nowhere").symlink_to(tmp_path / "gone")
    assert list(find_checkpoints([tiny_copy.parent])) == [tiny_copy.name]


def test_a_checkpoint_that_is_a_link_is_listed_unless_it_is_there_itself(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "diffusers", holds_checkpoint(tmp_path / "elsewhere" / "model")
    real = holds_checkpoint(root / "real")
    (root / "linked").symlink_to(elsewhere)
    (root / "again").symlink_to(real)
    assert list(find_checkpoints([root])) == ["linked", "real"]


def test_caches_and_what_lies_below_a_checkpoint_are_not_searched(tmp_path: Path) -> None:
    names = ("model/old", "blobs/a", ".cache/b", "1/2/3/4/5/6", "hub/snapshots/0", "1/2/3/4/5a")
    holds_checkpoint(tmp_path / "model")
    for name in names:
        holds_checkpoint(tmp_path / name)
    assert list(find_checkpoints([tmp_path])) == ["1/2/3/4/5a", "hub/snapshots/0", "model"]
