"""comfy-test, a checker for node packs, attached to a running server, without internet.

It gets what the registry's users get, and executes two workflows of the built-in model at their full sizes.
test_workflows.py checks in the same browser what two of its levels would do: static_capture opens every
workflow, and execution queues from the page what execution_light queues from outside.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import playwright
import pytest
from conftest import SERVER_ARGUMENTS

from launcher.folders import PACK_FOLDER, ROOT, comfyui_folder, link_folder
from launcher.server import Server

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG_FILE = "comfy-test.toml"
CONFIG = tomllib.loads((ROOT / CONFIG_FILE).read_text(encoding="utf-8"))["test"]
CHECKER = (sys.executable, "-m", "comfy_test")
# Where the browser that Playwright brings has its two programs, in a folder of its revision
PROGRAMS = {
    "chromium": "chrome-linux64/chrome",
    "chromium-headless-shell": "chrome-headless-shell-linux64/chrome-headless-shell",
}


@pytest.mark.skipif(sys.platform != "linux", reason="hands comfy-test a browser by symbolic links")
def test_comfy_test_passes_at_every_level(own_work: Path, tmp_path: Path) -> None:
    pack = install_pack(tmp_path / "ComfyUI")
    with Server(own_work, SERVER_ARGUMENTS) as server:
        (tmp_path / "server.log").write_text(server.text(), encoding="utf-8")
        run = subprocess.run(
            [*CHECKER, "run", "--server-url", server.address],
            cwd=pack,
            env=os.environ
            | {"COMFY_TEST_LOGS_DIR": str(tmp_path), "PLAYWRIGHT_BROWSERS_PATH": str(browsers(tmp_path))},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.findall(r"^\[(\w+)\] PASSED", run.stdout, re.MULTILINE)
    assert [level.lower() for level in passed] == CONFIG["levels"]
    assert "registered nodes used across" in run.stdout and "(100%)" in run.stdout
    # The level hazards only reports. These are its two groups of findings that are hardly ever wrong.
    assert "=== A -- presence proves it" not in run.stdout and "=== B -- near-certain" not in run.stdout
    executed = dict(re.findall(r"(\w+)\.json \[\d+/\d+\] - (\w+)", run.stdout))
    assert executed == dict.fromkeys(CONFIG["workflows"]["cpu"], "PASS")


def test_what_is_not_published_passes_its_lint_too(tmp_path: Path) -> None:
    """The tests, the launcher and the training: characters that Windows has, no device written down."""
    pack = copy_pack(tmp_path / PACK_FOLDER, set())
    run = subprocess.run([*CHECKER, "lint", pack], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def browsers(folder: Path) -> Path:
    """A folder in which Playwright finds the tests' browser in place of its own, which is not downloaded."""
    listed = Path(playwright.__file__).parent / "driver" / "package" / "browsers.json"
    revisions = {
        browser["name"]: browser["revision"]
        for browser in json.loads(listed.read_text(encoding="utf-8"))["browsers"]
    }
    for name, program in PROGRAMS.items():
        installed = folder / "browsers" / f"{name.replace('-', '_')}-{revisions[name]}"
        (installed / program).parent.mkdir(parents=True)
        (installed / program).symlink_to(os.environ["FIRERED_BROWSER"])
        (installed / "INSTALLATION_COMPLETE").touch()
    return folder / "browsers"


def install_pack(comfyui: Path) -> Path:
    """What the registry publishes of this pack, in a copy of ComfyUI made of links: comfy-test needs one."""
    comfyui.mkdir()
    for entry in comfyui_folder().iterdir():
        if entry.is_file():
            shutil.copy(entry, comfyui)
        elif entry.name != "custom_nodes":
            link_folder(comfyui / entry.name, entry)
    unpublished = {line.strip("/") for line in (ROOT / ".comfyignore").read_text(encoding="utf-8").split()}
    return copy_pack(comfyui / "custom_nodes" / PACK_FOLDER, unpublished - {CONFIG_FILE})


def copy_pack(target: Path, left_out: set[str]) -> Path:
    """A copy of this repository without its hidden files and without the paths in left_out."""

    def ignored(folder: str, names: list[str]) -> set[str]:
        within = Path(folder).relative_to(ROOT)
        return {
            name
            for name in names
            if name.startswith(".") or name == "__pycache__" or (within / name).as_posix() in left_out
        }

    return Path(shutil.copytree(ROOT, target, ignore=ignored))
