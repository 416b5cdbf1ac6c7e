#!/usr/bin/env python3
"""Run the tests on several sets of versions and renew docs/versions.md. It needs Python alone.

Each set has an environment of its own, which `run.py test` makes: about 7 GB, and minutes the first time.
A set whose Python or ComfyUI is not here is left out, and its row in the page stays.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "versions.md"
PINNED = "0.30.0"  # the ComfyUI that run.py fetches
COLUMNS = ("Python", "ComfyUI", "frontend", "torch", "diffusers", "transformers")
# What depends on ComfyUI, its page, diffusers or transformers
PART = [
    f"tests/test_{name}.py"
    for name in (
        *("api_page", "bad_input", "blueprint", "contract", "guard", "interop"),
        *("languages", "parity", "server", "transformer", "versions", "workflows"),
    )
]


class Versions(NamedTuple):
    """A set: its Python, its ComfyUI, and the arguments of run.py that install the rest."""

    python: str | None = None  # None: the one that runs this
    comfyui: str = PINNED
    arguments: tuple[str, ...] = ()


SETS = {
    "usual": Versions(),
    "ComfyUI 0.24": Versions(comfyui="0.24.0", arguments=("--environment", "comfyui0.24")),
    "ComfyUI 0.33": Versions(comfyui="0.33.0", arguments=("--environment", "comfyui0.33")),
    "oldest libraries": Versions(arguments=("--libraries", "oldest")),
    "torch for Pascal": Versions(arguments=("--torch", "legacy")),
    "oldest of all": Versions(
        "3.10", "0.24.0", ("--torch", "legacy", "--libraries", "oldest", "--environment", "python3.10")
    ),
    "newest of all": Versions("3.13", "0.33.0", ("--torch", "newest", "--environment", "python3.13")),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)} (default: all)")
    parser.add_argument(
        "--comfyui", type=Path, action="append", default=[], help="a ComfyUI's folder; repeat"
    )
    parser.add_argument("--part", action="store_true", help="only the tests that depend on other projects")
    arguments = parser.parse_args()
    if unknown := set(arguments.sets) - set(SETS):
        parser.error(f"there is no set {', '.join(sorted(unknown))}; choose from {', '.join(SETS)}")
    folders: dict[str, Path | None] = {PINNED: None} | {version_of(path): path for path in arguments.comfyui}
    succeeded = [measure(name, folders, arguments.part) for name in arguments.sets or SETS]
    return 0 if all(succeeded) else 1


def version_of(comfyui: Path) -> str:
    """The version of the ComfyUI in a folder."""
    return re.findall(r'__version__ = "(.+)"', (comfyui / "comfyui_version.py").read_text(encoding="utf-8"))[
        0
    ]


def measure(name: str, comfyui_folders: dict[str, Path | None], part: bool) -> bool:
    """Run the tests on a set and write its row. Returns whether they passed or the set was left out."""
    versions = SETS[name]
    python = sys.executable if versions.python is None else shutil.which(f"python{versions.python}")
    if python is None or versions.comfyui not in comfyui_folders:
        print(f"{name}: left out, without Python {versions.python} or --comfyui for {versions.comfyui}")
        return True
    folder = comfyui_folders[versions.comfyui]
    comfyui = [] if folder is None else ["--comfyui", str(folder)]
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        tests = [*(PART if part else ["tests"]), f"--junitxml={report}"]
        command = [python, "run.py", "test", *versions.arguments, *comfyui, "--", *tests]
        print(name, *command, sep="  ", flush=True)
        passed = subprocess.run(command, cwd=ROOT, check=False).returncode == 0
        if report.exists():
            write_row(name, row(report, part))
    return passed


def row(report: Path, part: bool) -> str:
    """The cells after a set's name, from pytest's report and the versions that conftest.py put into it."""
    suite = ElementTree.parse(report).getroot()[0]
    found = {entry.get("name"): entry.get("value") for entry in suite.iter("property")}
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    result = ", ".join(
        f"{number} {what}"
        for number, what in ((passed, "passed"), (failed, "failed"), (count["skipped"], "skipped"))
        if number or what == "passed"
    )
    what = "part" if part else "all"
    today = datetime.date.today().isoformat()
    return " | ".join([*(found.get(column) or "" for column in COLUMNS), what, result, today])


def write_row(name: str, cells: str) -> None:
    """Put a set's row into the page, and keep those of the other sets."""
    before, rows, after = split_page(PAGE.read_text(encoding="utf-8"))
    rows[name] = cells
    lines = [f"| {each} | {rows[each]} |\n" for each in SETS if each in rows]
    PAGE.write_text(before + "".join(lines) + after, encoding="utf-8")


def split_page(page: str) -> tuple[str, dict[str, str], str]:
    """What is before the table's rows, the rows by their set's name, and what is after them."""
    head = re.search(r"^\| set \|.*\n\|[-|]+\n", page, re.MULTILINE)
    assert head is not None, f"{PAGE} has no table"
    table = re.match(r"(?:\|.*\n)*", page[head.end() :])
    assert table is not None
    rows = dict(line.strip("| ").split(" | ", 1) for line in table[0].splitlines())
    return page[: head.end()], rows, page[head.end() + table.end() :]


if __name__ == "__main__":
    sys.exit(main())
