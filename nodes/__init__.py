"""The nodes: their inputs, outputs and what runs them. ComfyUI itself is reached through host alone.

Engine modules that need diffusers or transformers are imported when a node runs: they take seconds.
"""

from __future__ import annotations

import logging

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from . import host
from .decode import FireRedDecode
from .encode import FireRedEncodePrompt
from .engine.cards.libraries import startup_warning
from .examine import FireRedNumerics
from .load import FireRedLoadTextEncoder, FireRedLoadTransformer, FireRedLoadVAE
from .lora import FireRedLoadLoRA
from .parallel import FireRedParallel
from .paste_back import FireRedPasteBack
from .plan import FireRedHardwarePlan
from .sample import FireRedSampler
from .schedule import FireRedSchedule
from .step_cache import FireRedStepCache

NODE_CLASS_MAPPINGS = {
    "FireRedLoadTransformer": FireRedLoadTransformer,
    "FireRedLoadTextEncoder": FireRedLoadTextEncoder,
    "FireRedLoadVAE": FireRedLoadVAE,
    "FireRedEncodePrompt": FireRedEncodePrompt,
    "FireRedSampler": FireRedSampler,
    "FireRedDecode": FireRedDecode,
    "FireRedNumerics": FireRedNumerics,
    "FireRedHardwarePlan": FireRedHardwarePlan,
    "FireRedLoadLoRA": FireRedLoadLoRA,
    "FireRedSchedule": FireRedSchedule,
    "FireRedStepCache": FireRedStepCache,
    "FireRedParallel": FireRedParallel,
    "FireRedPasteBack": FireRedPasteBack,
}


class FireRedExtension(ComfyExtension):
    @override
    async def on_load(self) -> None:
        """Log missing libraries, and put the photo of the template firered_demo where Load Image finds it.

        The nodes exist without their libraries, so that workflows open; loaders raise.
        """
        if warning := startup_warning():
            logging.getLogger("FireRed").warning("FireRed nodes: %s", warning)
        host.provide_example_photo()
        host.watch_free_requests()

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODE_CLASS_MAPPINGS.values())
