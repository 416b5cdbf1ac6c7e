"""What comfy-test finds. It runs beside the other tests, see conftest.py."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import Future

import pytest

from launcher.folders import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG = tomllib.loads((ROOT / "comfy-test.toml").read_text(encoding="utf-8"))["test"]


@pytest.mark.skipif(sys.platform != "linux", reason="hands comfy-test a browser by symbolic links")
def test_comfy_test_passes_at_every_level(comfy_test: Future[subprocess.CompletedProcess[str]]) -> None:
    run = comfy_test.result()
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.findall(r"^\[(\w+)\] PASSED", run.stdout, re.MULTILINE)
    assert [level.lower() for level in passed] == CONFIG["levels"]
    assert "registered nodes used across" in run.stdout and "(100%)" in run.stdout
    executed = dict(re.findall(r"(\w+)\.json \[\d+/\d+\] - (\w+)", run.stdout))
    assert executed == dict.fromkeys(CONFIG["workflows"]["cpu"], "PASS")
