"""The one door to ComfyUI: folders, devices, memory, progress, previews and cancelling.

comfy.model_management touches the accelerator when it is imported, so what needs it is imported inside
functions.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import comfy.latent_formats
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from comfy_execution.utils import get_executing_context

from .engine.cache import DiskCache
from .engine.checkpoint import Checkpoint, download_hint, find_checkpoints, open_checkpoint
from .engine.components import GIB, ComponentSpec, require_fit, working_bytes
from .engine.errors import CheckpointError, FireRedError
from .engine.estimates import Edit
from .engine.heartbeat import heartbeat_where_compiled
from .engine.kernels import require_kernels
from .engine.libraries import require_libraries
from .engine.machine import Device, Machine
from .engine.placement import Fixed, place
from .engine.places import Placement
from .engine.precision import Card, Precision
from .engine.preflight import preflight
from .engine.progress import StepTimer, before_each_block
from .engine.resume import SavedRun, is_run_name

log = logging.getLogger("FireRed")

NO_CHECKPOINT = "put a FireRed folder into models/diffusers"
DEVICE_LABEL = re.compile(r"auto|cpu|gpu:\d+")
DEFAULT_CACHE_GB = 100
RUN_KEY = "firered_run"  # in a LATENT: the name of the run that made it
RUNS_GB = 1  # of unfinished runs, 1 MB each for a picture of 1 megapixel
PRECISION_FLAGS = {
    "transformer": "unet",
    "text_encoder": "text_enc",
    "vae": "vae",
}  # ComfyUI's --bf16-unet and so on


# Checkpoints


def checkpoint_names() -> list[str]:
    """The edit-pipeline folders below ComfyUI's diffusers folders, or one line saying where to put them."""
    return list(find_checkpoints(folder_paths.get_folder_paths("diffusers"))) or [NO_CHECKPOINT]


def get_checkpoint(name: str) -> Checkpoint:
    """The checkpoint of that name. Raises CheckpointError saying what is there instead."""
    roots = folder_paths.get_folder_paths("diffusers")
    found = find_checkpoints(roots)
    if name in found:
        return Checkpoint(found[name])
    for root in map(Path, roots):
        folder = (root / name).resolve()
        if name and folder.is_relative_to(root.resolve()) and folder.is_dir():
            return open_checkpoint(folder)
    choices = (
        f"Choose one of {', '.join(found)}"
        if found
        else f"None is in {' or '.join(roots)}. {download_hint()}"
    )
    raise CheckpointError(f"There is no checkpoint {name!r}. {choices}")


def validate_loader(checkpoint: str | None, device: str | None) -> bool | str:
    """For a loader's validate_inputs: True, or what is wrong. An absent device is fine: it falls back."""
    if device is not None and not DEVICE_LABEL.fullmatch(device):
        return f"device is {device!r}; choose auto, cpu or gpu:0, gpu:1 and so on."
    if checkpoint is not None:
        try:
            get_checkpoint(checkpoint)
        except FireRedError as error:
            return str(error)
    return True


def disk_cache() -> DiskCache:
    """Where derived files are kept: models/firered_cache, unless the environment says otherwise."""
    gigabytes = os.environ.get("FIRERED_CACHE_GB", DEFAULT_CACHE_GB)
    try:
        return DiskCache(_cache_folder(), int(float(gigabytes) * 1e9))
    except (ValueError, OverflowError):
        raise FireRedError(f"FIRERED_CACHE_GB is {gigabytes!r}; set it to a number of gigabytes.") from None


def saved_run(name: str) -> SavedRun:
    """The unfinished run of that name, which may be on disk or not yet."""
    return SavedRun(DiskCache(_cache_folder() / "runs", int(RUNS_GB * 1e9)), name)


def forget_run(latent: dict[str, Any]) -> None:
    """The latent's picture is there: what would have resumed its run is not needed any more."""
    name = latent.get(RUN_KEY)
    if is_run_name(name):
        saved_run(name).forget()


def _cache_folder() -> Path:
    return Path(os.environ.get("FIRERED_CACHE_DIR") or Path(folder_paths.models_dir) / "firered_cache")


# Devices and precisions


def device_labels() -> list[str]:
    """`auto`, `cpu`, and `gpu:N` for every accelerator of this machine."""
    return ["auto", "cpu", *(f"gpu:{index}" for index in range(len(_accelerators())))]


def open_component(role: str, checkpoint: str, precision: str, device: str, math: str = "auto") -> Handle:
    """Decide where and how a component runs here and log it in one line. Loads nothing.

    Raises FireRedError where it cannot run or does not fit, or where a library is missing.
    """
    require_libraries()
    spec, reason = _decide(role, checkpoint, precision, device, math)
    log.info("%s, about %.1f GiB%s", spec, spec.nbytes() / GIB, f" ({reason})" if reason else "")
    require_kernels(spec.device)
    require_fit(spec)
    _require_library(spec.precision, spec.card)
    if role == "transformer" and spec.math is torch.float16:
        log.warning(
            "fp16 arithmetic overflows in this transformer; the sampler will stop at the step where it does."
        )
    return Handle(spec, _patchers.get(spec) or _make_patcher(spec))


def describe_component(role: str, checkpoint: str, precision: str, device: str) -> ComponentSpec:
    """What open_component would open."""
    return _decide(role, checkpoint, precision, device, "auto")[0]


def _decide(role: str, checkpoint: str, precision: str, device: str, math: str) -> tuple[ComponentSpec, str]:
    """A component as it will run here, and why so where somebody else than the user chose."""
    found = get_checkpoint(checkpoint)
    component = found.component(role)
    component.shards()  # a plan leaves out what is damaged; this says which file is
    chosen = Fixed(_present(device, role), None if precision == "auto" else precision, math)
    placed = plan(found, fixed={role: chosen}).place(role)
    card = placed.device.card
    identity = component.identity()
    return ComponentSpec(role, found, placed.precision, _torch_device(card), card, identity), placed.reason


def plan(
    checkpoint: Checkpoint,
    edit: Edit = Edit(),  # noqa: B008 - it is frozen
    fixed: dict[str, Fixed] | None = None,
    measure_cpu: bool = False,
) -> Placement:
    """Where everything of the checkpoint goes on this machine: the answer that all loaders share.

    fixed: what the user chose; ComfyUI's command line fixes some of the rest. measure_cpu: also on a machine
    without accelerators, where its speed decides nothing but tells the time.
    """
    here = machine()
    if measure_cpu and not here.gpus:
        speeds = preflight(torch.device("cpu")).speeds
        here = replace(here, cpu=replace(here.cpu, speeds=speeds, measured=True))
    wishes = {role: _with_flags(role, (fixed or {}).get(role, Fixed())) for role in PRECISION_FLAGS}
    return place(here, checkpoint, edit, wishes, runs=_runs_here)


def machine() -> Machine:
    """This machine as each part of it was when first asked: answers must not change with what is free then.

    Its cards are tested and measured, which takes seconds once.
    """
    import comfy.model_management as mm

    cpu, native_bf16 = torch.device("cpu"), mm.should_use_bf16(torch.device("cpu"))
    memory, accelerators = mm.get_total_memory(cpu), _accelerators()
    gpus = tuple(_describe_device(f"gpu:{index}", device) for index, device in enumerate(accelerators))
    unified = mm.cpu_state == mm.CPUState.MPS or (bool(gpus) and all(map(_is_integrated, accelerators)))
    return Machine(gpus, Device(Card("cpu", "cpu", native_bf16, memory, is_gpu=False), memory), unified)


def _describe_device(label: str, device: torch.device) -> Device:
    """An accelerator as a place for components; one that cannot be used now is one without room."""
    import comfy.model_management as mm

    try:
        return _measure_device(label, device)
    except FireRedError as error:
        log.warning("%s", error)
        return Device(Card(label, _card_model(device), False, mm.get_total_memory(device)), free=0)


@functools.cache
def _measure_device(label: str, device: torch.device) -> Device:
    import comfy.model_management as mm

    speeds, memory = preflight(device).speeds, mm.get_total_memory(device)
    card = Card(label, _card_model(device), speeds.bf16 is not None, memory)
    free = min(memory, free_memory(device, evicting=True)) - int((args.reserve_vram or 0) * GIB)
    return Device(card, free, speeds, measured=True)


def _card_model(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _is_integrated(device: torch.device) -> bool:
    return device.type == "cuda" and bool(torch.cuda.get_device_properties(device).is_integrated)


def _torch_device(card: Card) -> torch.device:
    return _accelerators()[int(card.label.partition(":")[2])] if card.is_gpu else torch.device("cpu")


def _accelerators() -> list[torch.device]:
    import comfy.model_management as mm

    return [device for device in mm.get_all_torch_devices() if device.type != "cpu"]


def _present(label: str, role: str) -> str | None:
    """The label of a device of this machine; None for `auto` and, logged, for one that is not here."""
    if label == "auto" or label in device_labels():
        return None if label == "auto" else label
    log.info("this machine has no %s for the %s: falling back to auto", label, role.replace("_", " "))
    return None


def _with_flags(role: str, wish: Fixed) -> Fixed:
    """What ComfyUI's command line says of what the user left free."""
    import comfy.model_management as mm

    if role == "vae" and mm.vae_device().type == "cpu" and wish.device is None:
        wish = replace(wish, device="cpu", reason="--cpu-vae")
    if args.force_fp32 and wish.math == "auto":
        wish = replace(wish, math="fp32", reason="--force-fp32")
    if wish.precision is not None:
        return wish
    for name in ("fp32", "bf16"):
        flag = f"{name}_{PRECISION_FLAGS[role]}"
        if getattr(args, flag, False):
            return replace(wish, precision=name, reason=f"--{flag.replace('_', '-')}")
    return wish


def _require_library(precision: Precision, card: Card) -> None:
    """Raise FireRedError where what the precision needs is not installed or does not work on the card."""
    if precision.needs_bitsandbytes:
        from .engine.formats.bitsandbytes import require_bitsandbytes

        require_bitsandbytes(precision, card, _torch_device(card))


def _runs_here(role: str, precision: Precision, card: Card) -> bool:
    try:
        _require_library(precision, card)
    except FireRedError:
        return False
    return True


# Memory


class Resident(torch.nn.Module):
    """What ComfyUI's memory manager sees of a component: whole on its device, or not in memory at all.

    Unloading drops the weights instead of parking them in host memory, which a 41 GB transformer would fill;
    they stream back from disk.
    """

    def __init__(self, spec: ComponentSpec):
        super().__init__()
        self.spec = spec
        self.device = torch.device("cpu")
        self.component: Any = None
        self.model_loaded_weight_memory = 0

    def load(self, nbytes: int) -> None:
        import comfy.model_management as mm

        from .engine import loading

        started = time.monotonic()
        with mm.cuda_device_context(self.spec.device):  # layers test kernels on the current device
            self.component = loading.load(self.spec, progress_reporter(), disk_cache())
        log.info("%s loaded in %.1f s", self.spec, time.monotonic() - started)
        self.device, self.model_loaded_weight_memory = self.spec.device, nbytes

    def unload(self) -> None:
        self.component = None
        self.device, self.model_loaded_weight_memory = torch.device("cpu"), 0


@dataclass(frozen=True, eq=False)
class Handle:
    """What a loader node hands on: it lives in ComfyUI's cache and owns the patcher, which owns the weights.

    When ComfyUI forgets the node's output, weights in host memory go; when that runs short, outputs with a
    `patcher` are forgotten first.
    """

    spec: ComponentSpec
    patcher: Any


_patchers: WeakValueDictionary[ComponentSpec, Any] = WeakValueDictionary()  # equal handles share one
# Weights on a card stay when their node's output is forgotten: they cost no host memory, another prompt may
# want them, and ComfyUI evicts them when it needs the card.
_on_cards: dict[ComponentSpec, Any] = {}


@contextmanager
def borrow(handle: Handle, working: float | None = None) -> Iterator[Any]:
    """The handle's component, loaded on its device, the current one inside the block.

    working: bytes it needs there beside its weights; for an edit of usual size if nobody knows. Its forward
    raises ComfyUI's interrupt before the next block if the user cancels.
    """
    import comfy.model_management as mm

    spec, patcher = handle.spec, handle.patcher
    if working is None:
        working = working_bytes(spec)
    _release_replaced(spec)
    _forget_unloaded()
    if spec.device.type == "cpu":
        _make_room_in_host_memory(patcher, patcher.model_size() + int(working))
    mm.load_models_gpu([patcher], memory_required=working, force_full_load=True)
    if spec.card.is_gpu:
        _on_cards[spec] = patcher
    component = patcher.model.component
    module = getattr(component, "model", component)
    stop = before_each_block(module, spec.device, check_cancelled)
    alive = heartbeat_where_compiled(f"running the {spec}", spec.device)
    with mm.cuda_device_context(spec.device), stop, alive:
        yield component


def _release_replaced(spec: ComponentSpec) -> None:
    """Free what `spec` replaces, before it loads: the same role on its device or of its checkpoint."""
    for other, patcher in list(_patchers.items()):
        same_place = other.device == spec.device or other.checkpoint == spec.checkpoint
        if other != spec and other.role == spec.role and same_place:
            patcher.detach()


def _forget_unloaded() -> None:
    """Drop what ComfyUI evicted; not as it does: its list of models would shift under its feet."""
    for spec, patcher in list(_on_cards.items()):
        if not patcher.loaded_size():
            del _on_cards[spec]


def _make_room_in_host_memory(wanted: Any, nbytes: int) -> None:
    """ComfyUI moves models between accelerators and host memory; on the CPU ours make room for each other."""
    import comfy.model_management as mm

    for patcher in list(_patchers.values()):
        on_cpu = patcher.load_device.type == "cpu" and patcher is not wanted
        if on_cpu and not wanted.loaded_size() and mm.get_free_memory(patcher.load_device) < nbytes:
            patcher.detach()


def free_memory(device: torch.device, evicting: bool = False) -> int:
    """Bytes free on the device now, or with every model `evicting` could remove."""
    import comfy.model_management as mm

    mm.cleanup_models_gc()
    ours = [model for model in mm.current_loaded_models if model.device == device and model.model is not None]
    evictable = sum(model.model_loaded_memory() for model in ours) if evicting else 0
    return int(mm.get_free_memory(device)) + evictable


def _make_patcher(spec: ComponentSpec) -> Any:
    patcher = _whole_model_patcher()(Resident(spec), spec.device, torch.device("cpu"), size=spec.nbytes())
    _patchers[spec] = patcher
    return patcher


@functools.cache
def _whole_model_patcher() -> type:
    """A ModelPatcher that loads and unloads its model as one: diffusers modules know no partial loading."""
    from comfy.model_patcher import ModelPatcher

    class WholeModelPatcher(ModelPatcher):
        def partially_load(
            self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False
        ) -> int:
            if self.loaded_size():
                return 0
            self.model.load(self.model_size())
            return self.model_size()

        def partially_unload(
            self, device_to: Any, memory_to_free: float = 0, force_patch_weights: bool = False
        ) -> int:
            freed = self.loaded_size()
            self.detach()
            return freed

        def detach(self, unpatch_all: bool = True) -> Resident:
            # load_models_gpu calls detach(False) each time it is asked for a model it already has loaded
            if unpatch_all:
                self.model.unload()
            return self.model

    return WholeModelPatcher


# Progress and cancelling


def running_node() -> str | None:
    """The id in the prompt of the node that runs now."""
    context = get_executing_context()
    return context.node_id if context else None


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
    """A callback (done, total, denoised) like progress_reporter's, with ComfyUI's live preview if it is on.

    denoised: normalised latents (1, 16, 1, h, w), which is the space of core's Wan 2.1 preview factors.
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
