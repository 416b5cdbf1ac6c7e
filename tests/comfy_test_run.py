"""comfy-test, a checker for node packs, at every level, attached to a running server, without internet."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import playwright

from launcher.folders import PACK_FOLDER, ROOT, comfyui_folder, link_folder
from launcher.server import Server

SERVER_ARGUMENTS = ("--disable-api-nodes", "--database-url", "sqlite:///:memory:")
# Where the browser that Playwright brings has its two programs, in a folder of its revision
PROGRAMS = {
    "chromium": "chrome-linux64/chrome",
    "chromium-headless-shell": "chrome-headless-shell-linux64/chrome-headless-shell",
}


def run_comfy_test(work: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Let it check this pack. work: for a server of its own. folder: for a copy of the pack, and for logs."""
    pack = install_pack(folder / "ComfyUI")
    with Server(work, SERVER_ARGUMENTS) as server:
        (folder / "server.log").write_text(server.text(), encoding="utf-8")
        return subprocess.run(
            [sys.executable, "-m", "comfy_test", "run", "--server-url", server.address],
            cwd=pack,
            env=os.environ
            | {"COMFY_TEST_LOGS_DIR": str(folder), "PLAYWRIGHT_BROWSERS_PATH": str(browsers(folder))},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )


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
