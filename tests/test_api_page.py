"""docs/api.md: its blocks run as they stand, one after the other, against a real server."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from launcher.client import Client
from launcher.folders import ROOT
from launcher.server import Server

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
WRITE, POST, POLL, FOLLOW = (
    (language, block) for language, block in re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the page's edit.json."""
    edit = re.fullmatch(r"cat > edit.json <<'END'\n(.*)END\n", WRITE[1], re.DOTALL)
    assert edit is not None
    (tmp_path / "edit.json").write_text(edit[1], encoding="utf-8")
    return tmp_path


def run_block(block: tuple[str, str], server: Server, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block of the page as its reader would, against this server."""
    language, text = block
    command = {"sh": ["sh", "-c"], "python": [sys.executable, "-c"]}[language]
    return subprocess.run(
        [*command, text.replace("http://127.0.0.1:8188", server.address)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def change_edit(folder: Path, node: str, **inputs: object) -> None:
    path = folder / "edit.json"
    edit = json.loads(path.read_text(encoding="utf-8"))
    edit["prompt"][node]["inputs"] |= inputs
    path.write_text(json.dumps(edit), encoding="utf-8")


def size_of_the_only_picture(folder: Path) -> tuple[int, int]:
    (picture,) = folder.glob("api_*.png")
    return Image.open(picture).size


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("sh")), reason="needs curl and a shell")
def test_the_curl_lines_write_the_edit_and_queue_it(server: Server, client: Client, tmp_path: Path) -> None:
    assert run_block(WRITE, server, tmp_path).returncode == 0
    answer = json.loads(run_block(POST, server, tmp_path).stdout)
    assert not answer["node_errors"]
    deadline = time.monotonic() + 120
    while not (history := client.get(f"/history/{answer['prompt_id']}")) and time.monotonic() < deadline:
        time.sleep(0.2)
    (picture,) = history[answer["prompt_id"]]["outputs"]["save"]["images"]
    assert Image.open(io.BytesIO(client.image(picture))).size[0] == 320


def test_the_short_client_fetches_the_picture(server: Server, folder: Path) -> None:
    change_edit(folder, "sample", seed=3)
    run = run_block(POLL, server, folder)
    assert run.returncode == 0 and run.stdout.startswith("success"), run.stderr
    assert size_of_the_only_picture(folder)[0] == 320


def test_the_following_client_prints_every_step_and_fetches_the_picture(server: Server, folder: Path) -> None:
    run = run_block(FOLLOW, server, folder)
    assert run.returncode == 0, run.stderr
    assert [f"sample: {step} of 10" in run.stdout for step in range(1, 11)] == [True] * 10
    assert size_of_the_only_picture(folder)[0] == 320


def test_the_following_client_says_what_is_wrong_with_a_prompt(server: Server, folder: Path) -> None:
    change_edit(folder, "transformer", checkpoint="absent")
    refused = run_block(FOLLOW, server, folder)
    assert refused.returncode == 1 and "There is no checkpoint 'absent'" in refused.stderr
    change_edit(folder, "transformer", checkpoint="FireRed-Demo")
    change_edit(folder, "encode", prompt=" ")
    failed = run_block(FOLLOW, server, folder)
    assert failed.returncode == 1 and "FireRedEncodePrompt: The prompt is empty" in failed.stderr
