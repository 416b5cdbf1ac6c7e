"""comfy-test, a checker for node packs, at every level, attached to a running server, without internet."""

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

CONFIG = tomllib.loads((ROOT / "comfy-test.toml").read_text(encoding="utf-8"))["test"]
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
            [sys.executable, "-m", "comfy_test", "run", "--server-url", server.address],
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
    executed = dict(re.findall(r"(\w+)\.json \[\d+/\d+\] - (\w+)", run.stdout))
    assert executed == dict.fromkeys(CONFIG["workflows"]["cpu"], "PASS")


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
    """A copy of this pack in a copy of ComfyUI made of links, which is what comfy-test needs."""
    comfyui.mkdir()
    for entry in comfyui_folder().iterdir():
        if entry.is_file():
            shutil.copy(entry, comfyui)
        elif entry.name != "custom_nodes":
            link_folder(comfyui / entry.name, entry)
    left_out = shutil.ignore_patterns(".*", "__pycache__")
    return Path(shutil.copytree(ROOT, comfyui / "custom_nodes" / PACK_FOLDER, ignore=left_out))
