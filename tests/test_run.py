"""run.py says what to do when set-up cannot go on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui import ROOT, environment


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    comfyui, _ = environment()
    return subprocess.run(
        [sys.executable, "run.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"COMFYUI_PATH": str(comfyui)} | variables,
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
    (tmp_path / "python3").symlink_to(sys.executable)
    refused = run("test", PATH=str(tmp_path), FIRERED_BROWSER="")
    assert refused.returncode == 1 and "install Chromium, Chrome or Edge" in refused.stderr


def test_a_finished_set_up_is_recognised() -> None:
    """Nothing is installed again: pip is not even asked."""
    again = run("bench", "nonsense")
    assert "pip" not in again.stdout


def test_the_demo_with_an_absent_checkpoint_says_where_to_get_one() -> None:
    refused = run("demo", "--checkpoint", "absent")
    assert refused.returncode == 1
    assert "There is no checkpoint 'absent'" in refused.stderr
