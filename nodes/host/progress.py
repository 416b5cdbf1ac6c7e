"""Progress bars, previews and cancelling in ComfyUI."""

from __future__ import annotations

import logging
from collections.abc import Callable

import comfy.latent_formats
import comfy.utils
import torch

from ..engine.progress import StepTimer

log = logging.getLogger("FireRed")


def check_cancelled() -> None:
    """Raise ComfyUI's interrupt if the user cancelled the prompt."""
    import comfy.model_management as mm

    mm.throw_exception_if_processing_interrupted()


def progress_reporter() -> Callable[[int, int], None]:
    """A callback (done, total) that moves the node's progress bar and raises when the user cancelled."""
    bar = comfy.utils.ProgressBar(1)

    def report(done: int, total: int) -> None:
        check_cancelled()
        bar.update_absolute(done, total)

    return report


def sampling_reporter(device: torch.device) -> Callable[[int, int, torch.Tensor], None]:
    """A callback (done, total, denoised) like progress_reporter's, with ComfyUI's preview if it is on.

    denoised: normalised latents (1, 16, 1, h, w). Core's preview factors for Wan 2.1 take the same latents.
    """
    from latent_preview import get_previewer

    bar, timer = comfy.utils.ProgressBar(1), StepTimer()
    previewer = get_previewer(device, comfy.latent_formats.Wan21())

    def report(done: int, total: int, denoised: torch.Tensor) -> None:
        if line := timer.line(done, total):
            log.info(line)
        check_cancelled()
        preview = previewer.decode_latent_to_preview_image("JPEG", denoised) if previewer else None
        bar.update_absolute(done, total, preview)

    return report
