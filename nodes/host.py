"""The one door to ComfyUI: folders, devices, memory, progress, previews and cancelling.

comfy.model_management touches the accelerator when it is imported, so what needs it is imported inside
functions.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import comfy.latent_formats
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from comfy_execution.utils import get_executing_context

from .engine.cards.heartbeat import heartbeat_where_compiled
from .engine.cards.kernels import require_kernels
from .engine.cards.libraries import require_libraries
from .engine.cards.preflight import preflight, unfused_attention
from .engine.errors import CheckpointError, FireRedError, InputError
from .engine.files.cache import DiskCache
from .engine.files.checkpoint import Checkpoint, download_hint, find_checkpoints, open_checkpoint
from .engine.limits import shown
from .engine.planning.machine import Device, Machine, unusable
from .engine.planning.placement import Fixed, place
from .engine.planning.places import Placement
from .engine.progress import StepTimer, before_each_block
from .engine.sampling.resume import SavedRun, is_run_name
from .engine.units import GIB
from .engine.weights.components import (
    ComponentSpec,
    fingerprint,
    identities,
    require_fit,
    require_room,
    working_bytes,
)
from .engine.weights.estimates import RESERVED_BYTES, Edit
from .engine.weights.precision import MATH, ROLE_PRECISIONS, Card, Precision

log = logging.getLogger("FireRed")

NO_CHECKPOINT = "put a FireRed folder into models/diffusers"
SEARCHING_SHARE = 0.1  # of the time that may go into searching the disk for checkpoints
SHOWN_LETTERS = 100  # of a value in an error
DEVICE_LABEL = re.compile(r"auto|cpu|gpu:\d+")
DEFAULT_CACHE_GB = 100
RUN_KEY = "firered_run"  # in a LATENT: the name of the run that made it
QUEUE_SECONDS = 0.1  # between two looks at ComfyUI's queue
RUNS_GB = 1  # of unfinished runs, 1 MB each for a picture of 1 megapixel
RETRY_SECONDS = 60.0  # after which a card that could not be used is asked again
PRECISION_FLAGS = {
    "transformer": "unet",
    "text_encoder": "text_enc",
    "vae": "vae",
}  # ComfyUI's --bf16-unet and so on


# Checkpoints


def checkpoint_names() -> list[str]:
    """The edit-pipeline folders below ComfyUI's diffusers folders, or one line saying where to put them."""
    return list(_found_checkpoints()) or [NO_CHECKPOINT]


def _found_checkpoints() -> dict[str, Path]:
    """ComfyUI asks a dozen times a prompt; where the search is slow, its answer is remembered for longer."""
    global _search
    roots = tuple(_checkpoint_roots())
    started = time.monotonic()
    if roots != _search.roots or started >= _search.valid_until:
        found = find_checkpoints(roots)
        ended = time.monotonic()
        _search = _Search(roots, found, ended + (ended - started) / SEARCHING_SHARE)
    return _search.found


class _Search(NamedTuple):
    roots: tuple[str, ...]
    found: dict[str, Path]
    valid_until: float  # on the monotonic clock


_search = _Search((), {}, 0.0)


def _checkpoint_roots() -> list[str]:
    return folder_paths.get_folder_paths("diffusers")


def get_checkpoint(name: object) -> Checkpoint:
    """The checkpoint of that name, as checkpoint_names spells it. Raises CheckpointError saying what is there
    instead.
    """
    problem = None
    for root in _checkpoint_roots():
        folder = _folder_below(root, name)
        if folder is not None:
            try:
                return open_checkpoint(folder)
            except CheckpointError as error:
                problem = problem or error
    if problem is not None:
        raise problem
    found = _found_checkpoints()
    choices = (
        f"Choose one of {', '.join(found)}"
        if found
        else f"None is in {' or '.join(_checkpoint_roots())}. {download_hint()}"
    )
    raise CheckpointError(f"There is no checkpoint {shown(name)}. {choices}")


def _folder_below(root: str, name: object) -> Path | None:
    """The folder of that name below root, if there is one; a name never leads out of it, but links may."""
    if not isinstance(name, str) or not name:
        return None
    relative = Path(name)
    if relative.anchor or ".." in relative.parts:
        return None
    try:
        folder = Path(root, relative)
        return folder if stat.S_ISDIR(folder.stat().st_mode) else None
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"The checkpoint name {name!a} cannot be a path here: this system's encoding for file "
            f"names ({error.encoding}) lacks some of its letters. Rename the folder, or start Python with "
            "PYTHONUTF8=1."
        ) from None
    except (OSError, ValueError):  # not there, too long, or with a NUL
        return None


def validate_checkpoint(name: object) -> bool | str:
    """For a node's validate_inputs: True, or what is wrong. Never raises.

    name: None where a link gives it, which is not known before the run.
    """
    if name is None:
        return True
    try:
        get_checkpoint(name)
    except FireRedError as error:
        return str(error)
    return True


def checkpoint_fingerprint(name: object, roles: Sequence[str]) -> str:
    """For a node's fingerprint_inputs: changes when these components' results may. Never raises.

    name: None where a link gives it: it may be any.
    """
    if name is None:
        return " ".join(checkpoint_fingerprint(each, roles) for each in checkpoint_names())
    try:
        checkpoint = get_checkpoint(name)
    except FireRedError as error:
        return str(error)
    return " ".join(fingerprint(role, checkpoint) for role in roles)


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


def forget_run_after_prompt(run: SavedRun) -> None:
    """Forget the run once the prompt that runs now has ended well, whatever node made its picture.

    ComfyUI tells no node how a prompt ended, so a thread looks at its queue and history.
    """
    from server import PromptServer

    queue = getattr(getattr(PromptServer, "instance", None), "prompt_queue", None)
    context = get_executing_context()
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
    return Path(os.environ.get("FIRERED_CACHE_DIR") or Path(folder_paths.models_dir) / "firered_cache")


# Devices and precisions


class DeviceLabels(list[str]):
    """The devices to choose from; one that another machine has is among them, and falls back to `auto`."""

    def __contains__(self, label: object) -> bool:
        return isinstance(label, str) and DEVICE_LABEL.fullmatch(label) is not None


def device_labels() -> DeviceLabels:
    """`auto`, `cpu`, and `gpu:N` for every accelerator of this machine."""
    return DeviceLabels(["auto", "cpu", *(f"gpu:{index}" for index in range(len(_accelerators())))])


def open_component(role: str, checkpoint: str, precision: str, device: str, math: str = "auto") -> Handle:
    """Decide where and how a component runs here and log it in one line. Loads nothing.

    Raises FireRedError where it cannot run or does not fit, or where a library is missing.
    """
    require_libraries()
    spec, reason = _decide(role, checkpoint, precision, device, math)
    log.info(
        "%s, about %.1f GiB%s%s", spec, spec.nbytes() / GIB, f" ({reason})" if reason else "", _scores(spec)
    )
    require_kernels(spec.device)
    require_fit(spec)
    _require_library(spec.precision, spec.card)
    if role == "transformer" and spec.math is torch.float16:
        log.warning(
            "fp16 arithmetic overflows in this transformer; the sampler will stop at the step where it does."
        )
    return Handle(spec, _patchers.get(spec) or _make_patcher(spec))


def _scores(spec: ComponentSpec) -> str:
    """What attention without a fused kernel costs a usual edit, for the log; nothing where there is one."""
    if spec.fused:
        return ""
    working = working_bytes(spec) / GIB
    return f", attention without a fused kernel: {working:.1f} GiB to work with for a usual edit"


def _decide(role: str, checkpoint: str, precision: str, device: str, math: str) -> tuple[ComponentSpec, str]:
    """A component as it will run here, and why so where somebody else than the user chose."""
    _require_choice("device", device, DeviceLabels(["auto", "cpu", "gpu:0", "gpu:1 and so on"]))
    _require_choice("precision", precision, ["auto", *ROLE_PRECISIONS[role]])
    _require_choice("math", math, ["auto", *MATH])
    found = get_checkpoint(checkpoint)
    chosen = Fixed(_present(device, role), None if precision == "auto" else precision, math)
    placed = plan(found, fixed={role: chosen}).place(role)
    if placed.device.fault:
        raise FireRedError(f"The {placed.name} cannot run on {placed.device.card}. {placed.device.fault}")
    card = placed.device.card
    spec = ComponentSpec(role, found, placed.precision, _torch_device(card), card, *identities(role, found))
    return spec, placed.reason


def _require_choice(name: str, value: object, choices: list[str]) -> None:
    """ComfyUI checks what a widget holds, but not what comes over a link."""
    if value not in choices:
        raise InputError(f"{name} is {shown(value)}; choose {', '.join(choices[:-1])} or {choices[-1]}.")


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
    memory = mm.get_total_memory(cpu)
    gpus = tuple(_describe_device(f"gpu:{index}", device) for index, device in enumerate(_accelerators()))
    answering = [gpu for gpu in gpus if not gpu.fault]
    unified = mm.cpu_state == mm.CPUState.MPS or (
        bool(answering) and all(gpu.integrated for gpu in answering)
    )
    card = Card("cpu", "cpu", native_bf16, memory, is_gpu=False, unfused=unfused_attention(cpu))
    return Machine(gpus, Device(card, memory), unified)


_faulty: dict[torch.device, tuple[float, Device]] = {}  # since when, on the monotonic clock


def _describe_device(label: str, device: torch.device) -> Device:
    """An accelerator as a place for components; one that cannot be used now is one with a fault.

    A card with a fault is asked again after RETRY_SECONDS: it may have been full, or in somebody's hands.
    """
    since, described = _faulty.get(device, (0.0, None))
    if described is not None and time.monotonic() - since < RETRY_SECONDS:
        return described
    try:
        return _measure_device(label, device)
    except Exception as error:  # a driver raises whatever it likes
        faulty = unusable(label, error)
    if described != faulty:
        log.warning("%s is not used: %s", label, faulty.fault)
    _faulty[device] = time.monotonic(), faulty
    return faulty


@functools.cache
def _measure_device(label: str, device: torch.device) -> Device:
    import comfy.model_management as mm

    report, memory = preflight(device), mm.get_total_memory(device)
    native_bf16, unfused = report.speeds.bf16 is not None, unfused_attention(device)
    card = Card(label, _card_model(device), native_bf16, memory, unfused=unfused)
    free = min(memory, free_memory(device, evicting=True)) - int((args.reserve_vram or 0) * GIB)
    return Device(card, free, report.speeds, measured=True, integrated=_is_integrated(device))


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
    if label == "auto" or label in list(device_labels()):
        return None if label == "auto" else label
    log.info("this machine has no %s for the %s: falling back to auto", label, role.replace("_", " "))
    return None


def _with_flags(role: str, wish: Fixed) -> Fixed:
    """What ComfyUI's command line says of what the user left free."""
    if role == "vae" and args.cpu_vae and wish.device is None:
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
        from .engine.weights.formats.bitsandbytes import require_bitsandbytes

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
        self.borrowed = 0  # how many borrow it now; while anybody does, nobody unloads it

    def load(self, nbytes: int) -> None:
        import comfy.model_management as mm

        from .engine.models import loading

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


def require_handle(given: Any, role: str) -> Handle:
    """What a loader of that role made, unchanged. Raises InputError for anything else, such as a name."""
    if not isinstance(given, Handle) or given.spec.role != role:
        what = f"a {given.spec}" if isinstance(given, Handle) else shown(given)
        loader = "".join(word.capitalize() for word in role.split("_")).replace("Vae", "VAE")
        raise InputError(f"{role} is {what}. Connect the output of FireRedLoad{loader}.")
    return given


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

    from .engine.models import loading

    spec, patcher = handle.spec, handle.patcher
    if working is None:
        working = working_bytes(spec)
    at_least = working - RESERVED_BYTES  # which is the driver's, and no longer free where it counts
    require_room(spec, at_least, room(spec), "This", "Choose another device, or a precision that takes less.")
    _release_replaced(spec)
    _forget_unloaded()
    if spec.device.type == "cpu":
        _make_room_in_host_memory(patcher, patcher.model_size() + int(working))
    mm.load_models_gpu([patcher], memory_required=working, force_full_load=True)
    loading.mark_used(spec, disk_cache())
    if spec.card.is_gpu:
        _on_cards[spec] = patcher
    component = patcher.model.component
    module = getattr(component, "model", component)
    stop = before_each_block(module, spec.device, check_cancelled)
    alive = heartbeat_where_compiled(f"running the {spec}", spec.device)
    with _kept_loaded(patcher), mm.cuda_device_context(spec.device), stop, alive:
        yield component


@contextmanager
def _kept_loaded(patcher: Any) -> Iterator[None]:
    """Nobody unloads the weights inside this block, whatever a preview or another node needs.

    ComfyUI strikes a model that it asked to unload off its list, so one that stayed is put back afterwards:
    else nothing could ever evict it.
    """
    import comfy.model_management as mm

    patcher.model.borrowed += 1
    try:
        yield
    finally:
        patcher.model.borrowed -= 1
        listed = any(loaded.model is patcher for loaded in mm.current_loaded_models)
        if patcher.loaded_size() and not listed:
            loaded = mm.LoadedModel(patcher)
            loaded.model_load()
            mm.current_loaded_models.insert(0, loaded)


def _release_replaced(spec: ComponentSpec) -> None:
    """Free what `spec` replaces, before it loads: its role on its device, or its checkpoint in host memory.

    Copies on several cards live together, and ComfyUI evicts them where it needs the card. From host memory
    it evicts nothing, so a component that moves from the CPU to a card leaves none behind.
    """
    for other, patcher in list(_patchers.items()):
        in_host_memory = other.device.type == "cpu" or machine().unified
        moved = other.checkpoint == spec.checkpoint and in_host_memory
        if other != spec and other.role == spec.role and (other.device == spec.device or moved):
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


def room(spec: ComponentSpec) -> int:
    """Bytes a component's device can give to it alone: with everything evicted, or, of memory that the system
    pages, all.
    """
    if spec.device.type in ("cpu", "mps"):
        return spec.card.memory
    return free_memory(spec.device, evicting=True)


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
            before = self.loaded_size()
            self.detach()
            return before - self.loaded_size()

        def detach(self, unpatch_all: bool = True) -> Resident:
            # load_models_gpu calls detach(False) each time it is asked for a model it already has loaded
            if unpatch_all and not self.model.borrowed:
                self.model.unload()
            return self.model

    return WholeModelPatcher


# Progress and cancelling


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
