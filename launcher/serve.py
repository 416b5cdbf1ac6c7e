"""Print ComfyUI's address and run it with this pack until it ends (what `run.py serve` runs).

Usage: python -m launcher.serve [--port N] [COMFYUI ARGUMENTS]
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from launcher.folders import comfyui_folder, prepare_work_folder, work_folder
from launcher.server import clean_environment, server_command


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # ComfyUI's own options are longer
    )
    parser.add_argument("--port", type=int, default=8188)
    arguments, for_comfyui = parser.parse_known_args()
    comfyui, work = comfyui_folder(), work_folder()
    prepare_work_folder(comfyui, work)
    print(f"ComfyUI with the FireRed nodes: http://127.0.0.1:{arguments.port}", flush=True)
    command = server_command(comfyui, work, arguments.port, tuple(for_comfyui))
    return subprocess.run(command, cwd=comfyui, env=clean_environment(), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
