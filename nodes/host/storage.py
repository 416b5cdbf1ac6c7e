"""The files that these nodes keep in ComfyUI's folders: derived files, unfinished runs, an example photo."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import folder_paths
from comfy_execution.utils import get_executing_context

from ..engine.cuda.compiler import keep_kernels_in
from ..engine.files.cache import FOLDER_VARIABLE, DiskCache, cache_limit
from ..engine.sampling.resume import SavedRun, is_run_name
from .server import prompt_queue

RUN_KEY = "firered_run"  # in a LATENT: the name of the run that made it
PNG_KEY = "firered"  # in a PNG's metadata: a JSON list of what happened in each run
QUEUE_SECONDS = 0.1  # between two looks at ComfyUI's queue
EXAMPLE_PHOTO = Path(__file__).resolve().parents[2] / "workflows" / "input" / "firered_cat.jpg"
RUNS_GB = 1  # of unfinished runs; one picture of 1 megapixel takes 1 to 8 MB


def disk_cache() -> DiskCache:
    """The cache of derived files in models/firered_cache or $FIRERED_CACHE_DIR. Raises as cache_limit."""
    return DiskCache(_cache_folder(), cache_limit())


keep_kernels_in(disk_cache)


def saved_run(name: str, edit: str = "", seed: int = 0) -> SavedRun:
    """The unfinished run of that name. Its file need not exist yet. edit, seed: as in SavedRun."""
    return SavedRun(DiskCache(_cache_folder() / "runs", int(RUNS_GB * 1e9)), name, edit, seed)


def write_into_png(metadata: Any, report: str) -> None:
    """Add what happened in a run to the metadata of the files that this prompt saves.

    metadata: ComfyUI's `extra_pnginfo`; None in a prompt without it.
    """
    if isinstance(metadata, dict) and report not in metadata.setdefault(PNG_KEY, []):
        metadata[PNG_KEY].append(report)


def forget_run(latent: dict[str, Any]) -> None:
    """Delete the run that made this decoded latent, once the current prompt has succeeded."""
    name = latent.get(RUN_KEY)
    if is_run_name(name):
        forget_run_after_prompt(saved_run(name))


def forget_run_after_prompt(run: SavedRun) -> None:
    """Delete the run once the current prompt has succeeded, whichever node decodes its latents.

    ComfyUI does not tell nodes how a prompt ended, so a thread watches the queue and the history.
    """
    queue, context = prompt_queue(), get_executing_context()
    if queue is None or context is None:
        return
    prompt_id = context.prompt_id

    def watch() -> None:
        while any(item[1] == prompt_id for item in queue.get_current_queue_volatile()[0]):
            time.sleep(QUEUE_SECONDS)
        ended = queue.get_history(prompt_id).get(prompt_id, {}).get("status") or {}
        if ended.get("status_str") == "success":
            run.forget()

    threading.Thread(target=watch, name="FireRed: end of the prompt", daemon=True).start()


def _cache_folder() -> Path:
    return Path(os.environ.get(FOLDER_VARIABLE) or Path(folder_paths.models_dir) / "firered_cache")


def provide_example_photo() -> None:
    """Copy the photo of the template firered_demo into ComfyUI's input folder, unless it is there.

    A folder that cannot be written is left alone: only that template needs the photo.
    """
    target = Path(folder_paths.get_input_directory()) / EXAMPLE_PHOTO.name
    with contextlib.suppress(OSError):
        if EXAMPLE_PHOTO.is_file() and not target.exists():
            shutil.copyfile(EXAMPLE_PHOTO, target)
