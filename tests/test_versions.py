"""Missing and old libraries are named before anything loads; our checkpoints load in old and new ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SERVER_ARGUMENTS
from engine.arithmetic import computing_environment
from engine.cards.libraries import _torchvision_for, require_libraries, startup_warning
from engine.errors import FireRedError
from prompts import edit_prompt, fail

from launcher.folders import ROOT, comfyui_folder, link_folder, prepare_work_folder
from launcher.server import Server, clean_environment, server_command

PIP = f"{sys.executable} -m pip install"


def installed_without(folder: Path, *packages: str) -> Path:
    """Everything that this Python has installed but these packages, linked into a folder for `python -S`."""
    folder.mkdir()
    for site in filter(Path.is_dir, (Path(entry) for entry in sys.path if entry.endswith("site-packages"))):
        for entry in site.iterdir():
            if entry.name.partition("-")[0] in packages or (folder / entry.name).exists():
                continue
            if entry.is_dir():
                link_folder(folder / entry.name, entry)
            else:
                shutil.copy(entry, folder)
    return folder


def add_package(site: Path, name: str, version: str, source: str = "") -> None:
    """Add a package of that version. Its import runs `source`."""
    described = site / f"{name}-{version}.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (site / name).mkdir()
    (site / name / "__init__.py").write_text(source)


def ask(site: Path, *expressions: str) -> list[str]:
    """What expressions of the engine's libraries module give or raise when only `site` is installed."""
    code = (
        "import sys\nfrom engine.errors import FireRedError\nfrom engine.cards.libraries import *\n"
        "for expression in sys.argv[1:]:\n"
        "    try: print(eval(expression))\n"
        "    except FireRedError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", code, *expressions],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT / "nodes")])},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.splitlines()


def test_missing_and_old_libraries_are_named_at_start_and_by_the_loader(
    own_work: Path, tmp_path: Path
) -> None:
    """ComfyUI starts with the nodes nevertheless, so that workflows open."""
    site = installed_without(tmp_path / "site", "diffusers", "accelerate", "bitsandbytes")
    add_package(site, "accelerate", "0.30.0")
    needed = (
        "diffusers 0.37 or later is needed, none is installed; accelerate 1.10 or later is needed, 0.30.0"
    )
    server = Server(own_work, SERVER_ARGUMENTS)
    server.command.insert(1, "-S")
    server.environment["PYTHONPATH"] = str(site)
    with server:
        (line,) = [line for line in server.text().splitlines() if "FireRed nodes:" in line]
        assert needed in line and "bitsandbytes 0.46 or later is needed, none is installed (only nf4" in line
        assert f'{PIP} "diffusers>=0.37" "accelerate>=1.10" "bitsandbytes>=0.46" and restart' in line
        assert "FireRedSampler" in server.client.get("/object_info/FireRedSampler")
        error = fail(server.client, edit_prompt())
        assert error["node_type"].startswith("FireRedLoad") and needed in error["exception_message"]
        assert f'{PIP} "diffusers>=0.37" "accelerate>=1.10" and restart' in error["exception_message"]


def test_bitsandbytes_is_needed_by_its_precisions_only(tmp_path: Path) -> None:
    site = installed_without(tmp_path / "site", "bitsandbytes")
    all_components, its_own, at_start = ask(
        site, "require_libraries()", "require_libraries('bitsandbytes')", "startup_warning()"
    )
    assert all_components == "None"
    assert "bitsandbytes 0.46 or later is needed, none is installed" in its_own
    assert "none is installed (only nf4 and int8-bnb use it)" in at_start


def test_a_library_that_cannot_be_imported_is_named_with_the_first_cause(tmp_path: Path) -> None:
    site = installed_without(tmp_path / "site", "diffusers")
    source = (
        "try: 1 / 0\nexcept Exception as error: raise RuntimeError('Look up to see its traceback') from error"
    )
    add_package(site, "diffusers", "0.99.0", source)
    at_start, said = ask(site, "startup_warning()", "require_libraries()")
    assert at_start == "None"  # at start nothing is imported
    assert "diffusers 0.99.0 is here, but it cannot be imported (ZeroDivisionError: division by zero)" in said
    assert f'{PIP} --force-reinstall --no-deps "diffusers>=0.37"' in said


def test_an_old_torch_is_told_what_installs_one_with_kernels_for_any_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    with pytest.raises(FireRedError) as refused:
        require_libraries()
    assert "torch 2.6 or later is needed, 2.5.1+cu121 is here" in str(refused.value)
    assert f"{PIP} torch==2.7.1 torchvision==0.22.1 torchaudio==2.7.1" in str(refused.value)


def test_nothing_is_said_where_everything_is_here() -> None:
    assert startup_warning() is None
    require_libraries("bitsandbytes")
    require_libraries()


def test_a_comfyui_that_is_too_old_is_told_so_in_one_sentence(tmp_path: Path) -> None:
    big = {".git", "custom_nodes", "input", "models", "output", "user"}  # if it is a user's own
    old = tmp_path / "ComfyUI"
    comfyui = comfyui_folder()
    shutil.copytree(comfyui, old, ignore=lambda folder, _: big if Path(folder) == comfyui else ())
    (old / "models").mkdir()
    (old / "comfyui_version.py").write_text('__version__ = "0.22.3"\n')
    work = tmp_path / "work"
    prepare_work_folder(old, work)
    command = server_command(old, work, 0, (*SERVER_ARGUMENTS, "--quick-test-for-ci"))
    run = subprocess.run(
        command, cwd=old, env=clean_environment(), capture_output=True, text=True, check=True
    )
    log = run.stdout + run.stderr
    assert log.count("FireRed Image Edit needs ComfyUI 0.24 or later, and this one is 0.22.3") == 1
    assert "Traceback" not in log and "Cannot import" not in log and "IMPORT FAILED" not in log


def test_a_torch_without_the_fp16_accumulation_switch_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.6 raises an AttributeError for it."""
    switches = type(torch.backends.cuda.matmul)
    known = switches.__getattr__

    def without(self: object, name: str) -> object:
        if name == "allow_fp16_accumulation":
            raise AttributeError(f"Unknown attribute {name}")
        return known(self, name)

    monkeypatch.setattr(switches, "__getattr__", without)
    assert computing_environment(torch.device("cpu"), "diffusers")


def test_a_missing_torchvision_is_not_answered_with_another_torch() -> None:
    for torch_version, torchvision in (("2.11.0+cu130", "0.26"), ("2.7.1+cu126", "0.22"), ("2.6.0", "0.21")):
        assert _torchvision_for(torch_version) == f'"torchvision=={torchvision}.*"'


def test_the_checkpoints_we_write_load_in_transformers_4_and_5(tiny_folder: Path) -> None:
    """They have the older form, which both read: 4.57 cannot read the form that 5 writes."""
    text_config = json.loads((tiny_folder / "text_encoder" / "config.json").read_text())["text_config"]
    assert text_config["rope_scaling"]["mrope_section"] == [8, 12, 12] and text_config["rope_theta"] == 1e6
    assert "rope_parameters" not in text_config
    for name in ("tokenizer", "processor"):
        folder = tiny_folder / name
        assert {"tokenizer.json", "vocab.json", "merges.txt"} <= {path.name for path in folder.iterdir()}
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert "<|image_pad|>" in config["additional_special_tokens"]
        assert "extra_special_tokens" not in config
    assert (tiny_folder / "processor" / "preprocessor_config.json").is_file()
    assert (tiny_folder / "processor" / "video_preprocessor_config.json").is_file()
