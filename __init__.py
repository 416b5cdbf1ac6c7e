"""FireRed-Image-Edit for ComfyUI, on the hardware people own."""

import logging
import re

OLDEST_COMFYUI = "0.24"  # pyproject.toml says the same
try:
    from comfyui_version import __version__ as comfyui_version
except ImportError:
    comfyui_version = "older than 0.3.11"  # which was the first with this module


def _numbers(version: str) -> list[int]:
    return list(map(int, re.findall(r"\d+", version)[:2]))


if _numbers(comfyui_version) < _numbers(OLDEST_COMFYUI):
    # To ComfyUI this is a pack without nodes, and nothing to complain about.
    NODE_CLASS_MAPPINGS: dict[str, type] = {}
    logging.getLogger("FireRed").error(
        "FireRed Image Edit needs ComfyUI %s or later, and this one is %s: its nodes are left out. "
        "Update ComfyUI.",
        OLDEST_COMFYUI,
        comfyui_version,
    )
else:
    from .nodes import FireRedExtension

    WEB_DIRECTORY = "./nodes/web"

    async def comfy_entrypoint() -> FireRedExtension:
        return FireRedExtension()
