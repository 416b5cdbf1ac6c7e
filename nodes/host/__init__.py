"""All that calls ComfyUI, but for comfy_api: folders, devices, memory, progress, previews, cancel.

What works without ComfyUI belongs in engine. Functions import comfy.model_management and what needs it
themselves, because its import touches the accelerator.
"""

from __future__ import annotations

from .attention import attention_fingerprint, keep_attention_verdict
from .checkpoints import (
    FILE_FOLDERS,
    checkpoint_fingerprint,
    checkpoint_names,
    get_checkpoint,
    validate_checkpoint,
)
from .cluster import cluster_line, on_card, sample_on_cluster, watch_free_requests
from .components import hardware_plan, open_component
from .devices import device_labels, free_memory
from .loras import get_lora, lora_fingerprint, lora_names
from .memory import Handle, borrow, borrow_all, require_handle, room
from .parallel import share
from .progress import check_cancelled, progress_reporter, sampling_reporter
from .storage import (
    RUN_KEY,
    disk_cache,
    forget_run,
    forget_run_after_prompt,
    provide_example_photo,
    saved_run,
    write_into_png,
)

__all__ = [
    "FILE_FOLDERS",
    "RUN_KEY",
    "Handle",
    "attention_fingerprint",
    "borrow",
    "borrow_all",
    "check_cancelled",
    "checkpoint_fingerprint",
    "checkpoint_names",
    "cluster_line",
    "device_labels",
    "disk_cache",
    "forget_run",
    "forget_run_after_prompt",
    "free_memory",
    "get_checkpoint",
    "get_lora",
    "hardware_plan",
    "keep_attention_verdict",
    "lora_fingerprint",
    "lora_names",
    "on_card",
    "open_component",
    "progress_reporter",
    "provide_example_photo",
    "require_handle",
    "room",
    "sample_on_cluster",
    "sampling_reporter",
    "saved_run",
    "share",
    "validate_checkpoint",
    "watch_free_requests",
    "write_into_png",
]
