"""Progress bars, previews and cancelling in ComfyUI."""

from __future__ import annotations

import logging
from collections.abc import Callable

import comfy.latent_formats
import comfy.utils
import torch
from comfy_execution.utils import get_executing_context

from ..engine.progress import StepTimer
from .server import prompt_server

log = logging.getLogger("FireRed")


def check_cancelled() -> None:
    """Raise ComfyUI's interrupt if the user cancelled the prompt."""
    import comfy.model_management as mm

    mm.throw_exception_if_processing_interrupted()


def show_text(text: str) -> None:
    """Write on the node that runs what it does, where this ComfyUI can."""
    context, server = get_executing_context(), prompt_server()
    if context is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(text, context.node_id)


def progress_reporter(what: str) -> Callable[[int, int], None]:
    """A callback (done, total) that moves the node's progress bar and raises when the user cancelled.

    what: is done meanwhile, to be written on the node.
    """
    bar, told = comfy.utils.ProgressBar(1), False

    def report(done: int, total: int) -> None:
        nonlocal told
        if not told:
            show_text(what)
            told = True
        check_cancelled()
        bar.update_absolute(done, total)

    return report


def sampling_reporter(device: torch.device) -> Callable[[int, int, torch.Tensor | None], None]:
    """A callback (done, total, denoised) like progress_reporter's, with ComfyUI's preview if it is on.

    denoised: normalised latents (1, 16, 1, h, w), or None for no preview. Core's preview factors for Wan 2.1
    take the same latents.
    """
    from latent_preview import get_previewer

    bar, timer = comfy.utils.ProgressBar(1), StepTimer()
    previewer = get_previewer(device, comfy.latent_formats.Wan21())

    def report(done: int, total: int, denoised: torch.Tensor | None) -> None:
        if line := timer.line(done, total):
            log.info(line)
        show_text(line or f"step {done}/{total}")
        check_cancelled()
        preview = None
        if previewer and denoised is not None:
            preview = previewer.decode_latent_to_preview_image("JPEG", denoised)
        bar.update_absolute(done, total, preview)

    return report
