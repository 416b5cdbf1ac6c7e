"""comfy-test, a checker for node packs, attached to the running server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from launcher.folders import PACK_FOLDER, ROOT, comfyui_folder, link_folder
from launcher.server import Server

LEVELS = ("SYNTAX", "INSTALL", "REGISTRATION", "INSTANTIATION", "VALIDATION")


def test_comfy_test_passes_through_its_validation_level(server: Server, tmp_path: Path) -> None:
    (tmp_path / "server.log").write_text(server.text(), encoding="utf-8")
    pack = install_pack(tmp_path / "ComfyUI")
    run = subprocess.run(
        [sys.executable, "-m", "comfy_test", "run", "--server-url", server.address],
        cwd=pack,
        env=os.environ | {"COMFY_TEST_LOGS_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for level in LEVELS:
        assert level in run.stdout.upper()


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
