"""run.py sets up what it needs, says what to do when it cannot, and starts the demo and the benchmarks."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from engine.cards.kernels import TORCH, TORCH_BEFORE_TURING
from prompts import edit_prompt

from launcher.folders import ROOT, comfyui_folder

# run.py sets up the environment that it is told to use: here the one that these tests run in.
VARIANTS = {name: ("--torch", name) for name in ("legacy", "newest")} | {"oldest": ("--libraries", "oldest")}
OWN = [
    part
    for name in Path(sys.prefix).name.split("-")[1:]
    for part in VARIANTS.get(name, ("--environment", name))
]

QUICK_TEST = "tests/test_versions.py::test_a_missing_torchvision_is_not_answered_with_another_torch"


def run(command: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "run.py", command, *OWN, *arguments],
        cwd=ROOT,
        env=os.environ | {"COMFYUI_PATH": str(comfyui_folder())} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_folder_that_is_not_comfyui_is_refused(tmp_path: Path) -> None:
    refused = run("demo", "--comfyui", str(tmp_path))
    assert refused.returncode == 1
    assert "is not a ComfyUI folder: it has no main.py. Check --comfyui or COMFYUI_PATH" in refused.stderr


def test_a_benchmark_that_does_not_exist_lists_those_that_do() -> None:
    refused = run("bench", "nonsense")
    assert (
        refused.returncode == 1 and "Choose a benchmark: " in refused.stderr and "overhead" in refused.stderr
    )


def test_bench_without_a_name_measures_the_hardware() -> None:
    measured = run("bench")
    assert measured.returncode == 0, measured.stderr
    rows = dict(re.findall(r"^\| (.+?) \| ([\d.]+)", measured.stdout, re.MULTILINE))
    assert all(float(rows[name]) > 0 for name in ("matmul fp32", "matmul int8", "attention fp32 math"))
    assert f"torch {torch.__version__}" in measured.stdout and "Projected" in measured.stdout


@pytest.mark.skipif(os.name == "nt", reason="Windows always has Edge")
def test_a_missing_browser_is_named(tmp_path: Path) -> None:
    refused = run("test", PATH=str(tmp_path), FIRERED_BROWSER="")
    assert refused.returncode == 1 and "install Chromium, Chrome or Edge" in refused.stderr


def test_a_finished_set_up_is_recognised() -> None:
    """Nothing is installed again, and pip is not started."""
    again = run("bench", "nonsense")
    assert "pip" not in again.stdout


def test_the_demo_with_an_absent_checkpoint_says_where_to_get_one() -> None:
    refused = run("demo", "--checkpoint", "absent")
    assert refused.returncode == 1
    assert "There is no checkpoint 'absent'" in refused.stderr


def as_module(script: str) -> ModuleType:
    name = f"firered_{Path(script).stem}"
    spec = importlib.util.spec_from_file_location(name, ROOT / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """run.py as a module."""
    return as_module("run.py")


def test_set_up_installs_what_errors_recommend(script: ModuleType) -> None:
    assert (" ".join(script.TORCH), script.TORCH_INDEX) == TORCH
    assert (" ".join(script.TORCH_LEGACY), script.TORCH_LEGACY_INDEX) == TORCH_BEFORE_TURING


@pytest.mark.skipif(os.name == "nt", reason="nvidia-smi is a shell script here")
@pytest.mark.parametrize(
    ("cards", "torch_release", "triton"),
    [
        (["6.1", "6.1"], "torch==2.7.1", False),
        (["6.1", "8.6"], "torch==2.7.1", True),
        (["7.0"], "torch==2.7.1", True),
        (["8.6"], "torch==2.11.0", True),
        ([], "torch==2.11.0", True),
    ],
)
def test_the_cards_decide_which_torch_is_installed(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cards: list[str],
    torch_release: str,
    triton: bool,
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nprintf '%s\\n' {' '.join(cards)}\n" if cards else "#!/bin/sh\nexit 9\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    plain = argparse.Namespace(torch=None, libraries=None, environment=None)
    here, windows = script.Environment.of(plain, windows=False), script.Environment.of(plain, windows=True)
    assert here.folder == ROOT / ".venv" and here.triton is triton
    assert here.torch()[0] == torch_release and "--index-url" not in here.torch()
    assert ("--index-url" in windows.torch()) == bool(cards)  # PyPI's have no CUDA there


def test_other_versions_have_environments_of_their_own(script: ModuleType) -> None:
    def environment(torch: str | None = None, libraries: str | None = None, name: str | None = None) -> Any:
        asked = argparse.Namespace(torch=torch, libraries=libraries, environment=name)
        return script.Environment.of(asked)

    legacy, oldest = environment("legacy"), environment(libraries="oldest")
    assert legacy.folder == ROOT / ".venv-legacy" and legacy.torch()[0] == "torch==2.7.1"
    assert oldest.folder == ROOT / ".venv-oldest" and "diffusers==0.37.*" in oldest.libraries()
    newest = environment("newest", name="python3.13")
    assert newest.folder == ROOT / ".venv-newest-python3.13" and newest.torch()[0] == "torch"
    assert environment("legacy", "oldest").folder == ROOT / ".venv-legacy-oldest"


def test_a_run_of_the_tests_renews_its_row_of_the_tested_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = as_module("tests/versions.py")
    _, published, _ = versions.split_page(versions.PAGE.read_text(encoding="utf-8"))
    assert list(published) == list(versions.SETS)
    monkeypatch.setattr(versions, "PAGE", Path(shutil.copy(versions.PAGE, tmp_path)))
    report = tmp_path / "report.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", QUICK_TEST, f"--junitxml={report}"],
        cwd=ROOT,
        check=True,
    )
    versions.write_row("usual", versions.row(report, part=True))
    _, renewed, after = versions.split_page(versions.PAGE.read_text(encoding="utf-8"))
    assert list(renewed) == list(published) and "Windows" in after
    assert {name for name in renewed if renewed[name] != published[name]} == {"usual"}
    python, comfyui, _, torch_version, *_, tests, result, _ = renewed["usual"].split(" | ")
    assert (python, tests) == (platform.python_version(), "part")
    assert torch.__version__.startswith(torch_version)
    assert comfyui == versions.version_of(comfyui_folder()) and re.fullmatch(r"[1-9]\d* passed", result)


@pytest.mark.skipif(os.name == "nt", reason="ends the demo by its process group")
def test_the_demo_speaks_before_its_libraries_and_its_server_logs_no_error(tmp_path: Path) -> None:
    """Reads standard output and errors as one stream, as in a log file, until the demo's first node."""
    with subprocess.Popen(
        [sys.executable, "-m", "launcher.demo"],
        cwd=ROOT,
        env=os.environ | {"COMFYUI_PATH": str(comfyui_folder()), "FIRERED_WORK": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as demo:
        assert demo.stdout is not None
        first, second, third = (demo.stdout.readline() for _ in range(3))
        os.killpg(demo.pid, signal.SIGTERM)
    assert first.startswith("Using FireRed-Demo") and second == "\n"
    assert third.split()[0] in {node["class_type"] for node in edit_prompt().values()}
    (log,) = tmp_path.glob("server-*.log")
    assert "[ERROR]" not in log.read_text(encoding="utf-8")
