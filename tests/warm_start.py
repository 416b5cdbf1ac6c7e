"""A program that imports the libraries of ComfyUI once, and forks for each server that is to start."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import sys
from contextlib import suppress
from pathlib import Path

LIBRARIES = (
    "torch", "torch._dynamo", "torchaudio", "torchvision", "transformers", "transformers.modeling_utils",
    "scipy.integrate", "scipy.ndimage", "scipy.signal", "scipy.stats", "sqlalchemy.orm", "alembic", "kornia",
    "aiohttp.web", "av", "spandrel", "requests", "pydantic_settings",
)  # fmt: skip


def main() -> None:
    """For each line of standard input, an order in JSON: fork, print the number of the new process."""
    for library in LIBRARIES:
        with suppress(ImportError):
            importlib.import_module(library)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that servers that have ended are gone
    for line in sys.stdin:
        child = os.fork()
        if not child:
            become(**json.loads(line))
            return
        print(child, flush=True)


def become(command: list[str], folder: str, environment: dict[str, str], log: str) -> None:
    """Go on as if this process had been started with that command."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with open(os.devnull, "rb") as nothing, open(log, "wb") as written:
        os.dup2(nothing.fileno(), 0)
        os.dup2(written.fileno(), 1)
        os.dup2(written.fileno(), 2)
    sys.argv = command[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
