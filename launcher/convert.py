"""Write a transformer as one INT8 file that core and these nodes load (what `run.py convert` runs)."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from engine.errors import FireRedError
from engine.files.checkpoint import Checkpoint, open_checkpoint
from engine.files.single import open_file
from engine.weights.checks import require_usable
from engine.weights.conversion import write_int8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--precision", choices=["int8"], default="int8")
    arguments = parser.parse_args()
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        checkpoint = opened(arguments.source)
        require_usable("transformer", checkpoint)
        write_int8(checkpoint.component("transformer"), arguments.target, device, show)
    except (FireRedError, OSError) as error:
        print(f"\nrun.py: {error}", file=sys.stderr)
        return 1
    size = arguments.target.stat().st_size / 1e9
    print(f"\n{arguments.target}: {size:.2f} GB in {time.monotonic() - started:.0f} s")
    return 0


def opened(source: Path) -> Checkpoint:
    """A folder of the edit pipeline, or a file of a transformer. Raises CheckpointError."""
    return open_checkpoint(source) if source.is_dir() else open_file(source, "transformer")


def show(done: int, total: int) -> None:
    print(f"\r{done / 1e9:.2f} of {total / 1e9:.2f} GB", end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
