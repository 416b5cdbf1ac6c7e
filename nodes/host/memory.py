"""Components in memory, under ComfyUI's memory manager."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch

from ..engine.cards.heartbeat import heartbeat_where_compiled
from ..engine.errors import InputError
from ..engine.limits import shown
from ..engine.progress import before_each_block
from ..engine.weights.components import Replica
from ..engine.weights.estimates import RESERVED_BYTES
from ..engine.weights.room import require_room, working_bytes
from .devices import free_memory, machine
from .progress import check_cancelled, progress_reporter
from .storage import disk_cache

log = logging.getLogger("FireRed")


class Resident(torch.nn.Module):
    """What ComfyUI's memory manager sees of a component: whole on its device, or not in memory at all.

    Unloading drops the weights instead of parking them in host memory, which a 41 GB transformer would fill;
    they stream back from disk.
    """

    def __init__(self, replica: Replica):
        super().__init__()
        self.replica = replica
        self.device = torch.device("cpu")
        self.component: Any = None
        self.model_loaded_weight_memory = 0
        self.borrowed = 0  # how many borrow it now; while anybody does, nobody unloads it

    def load(self, nbytes: int) -> None:
        import comfy.model_management as mm

        from ..engine.models import loading

        started = time.monotonic()
        with mm.cuda_device_context(self.replica.device):  # layers test kernels on the current device
            self.component = loading.load(self.replica, progress_reporter(), disk_cache())
        log.info("%s loaded in %.1f s", self.replica, time.monotonic() - started)
        self.device, self.model_loaded_weight_memory = self.replica.device, nbytes

    def unload(self) -> None:
        self.component = None
        self.device, self.model_loaded_weight_memory = torch.device("cpu"), 0


@dataclass(frozen=True, eq=False)
class Handle:
    """What a loader node hands on: it lives in ComfyUI's cache and owns the patcher, which owns the weights.

    When ComfyUI forgets the node's output, weights in host memory go; when that runs short, outputs with a
    `patcher` are forgotten first.
    """

    replica: Replica
    patcher: Any


def require_handle(given: Any, role: str) -> Handle:
    """What a loader of that role made, unchanged. Raises InputError for anything else, such as a name."""
    if not isinstance(given, Handle) or given.replica.spec.role != role:
        what = f"a {given.replica}" if isinstance(given, Handle) else shown(given)
        loader = "".join(word.capitalize() for word in role.split("_")).replace("Vae", "VAE")
        raise InputError(f"{role} is {what}. Connect the output of FireRedLoad{loader}.")
    return given


_patchers: WeakValueDictionary[Replica, Any] = WeakValueDictionary()  # equal handles share one
# Weights on a card stay when their node's output is forgotten: they cost no host memory, another prompt may
# want them, and ComfyUI evicts them when it needs the card.
_on_cards: dict[Replica, Any] = {}


def handle_for(replica: Replica) -> Handle:
    """What a loader node hands on for that replica."""
    return Handle(replica, _patchers.get(replica) or _make_patcher(replica))


@contextmanager
def borrow(handle: Handle, working: float | None = None) -> Iterator[Any]:
    """The handle's component, loaded on its device, the current one inside the block.

    working: bytes it needs there beside its weights; for an edit of usual size if nobody knows. Its forward
    raises ComfyUI's interrupt before the next block if the user cancels.
    """
    import comfy.model_management as mm

    from ..engine.models import loading

    replica, patcher = handle.replica, handle.patcher
    if working is None:
        working = working_bytes(replica)
    at_least = working - RESERVED_BYTES  # which is the driver's, and no longer free where it counts
    remedy = "Choose another device, or a precision that takes less."
    require_room(replica, at_least, room(replica), "This", remedy)
    _release_replaced(replica)
    _forget_unloaded()
    if replica.device.type == "cpu":
        _make_room_in_host_memory(patcher, patcher.model_size() + int(working))
    mm.load_models_gpu([patcher], memory_required=working, force_full_load=True)
    loading.mark_used(replica.spec, disk_cache())
    if replica.card.is_gpu:
        _on_cards[replica] = patcher
    component = patcher.model.component
    stop = before_each_block(component.model, replica.device, check_cancelled)
    alive = heartbeat_where_compiled(f"running the {replica}", replica.device)
    with _kept_loaded(patcher), mm.cuda_device_context(replica.device), stop, alive:
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


def _release_replaced(replica: Replica) -> None:
    """Free what a replica replaces, before it loads: its role on its device, its checkpoint in host memory.

    Replicas on several cards stay together, and ComfyUI evicts them where it needs the card. From host memory
    it evicts nothing, so a component that moves from the CPU to a card leaves none behind.
    """
    for other, patcher in list(_patchers.items()):
        in_host_memory = other.device.type == "cpu" or machine().unified
        moved = other.spec.checkpoint == replica.spec.checkpoint and in_host_memory
        same_role = other != replica and other.spec.role == replica.spec.role
        if same_role and (other.device == replica.device or moved):
            patcher.detach()


def _forget_unloaded() -> None:
    """Forget what ComfyUI has evicted. Never called while it evicts: it goes through that list."""
    for replica, patcher in list(_on_cards.items()):
        if not patcher.loaded_size():
            del _on_cards[replica]


def _make_room_in_host_memory(wanted: Any, nbytes: int) -> None:
    """ComfyUI moves models between accelerators and host memory; on the CPU ours make room for each other."""
    import comfy.model_management as mm

    for patcher in list(_patchers.values()):
        on_cpu = patcher.load_device.type == "cpu" and patcher is not wanted
        if on_cpu and not wanted.loaded_size() and mm.get_free_memory(patcher.load_device) < nbytes:
            patcher.detach()


def room(replica: Replica) -> int:
    """Bytes a component's device can give to it alone: with everything evicted, or, of memory that the system
    pages, all.
    """
    if replica.device.type in ("cpu", "mps"):
        return replica.card.memory
    return free_memory(replica.device, evicting=True)


def _make_patcher(replica: Replica) -> Any:
    make, nbytes = _whole_model_patcher(), replica.spec.nbytes()
    patcher = make(Resident(replica), replica.device, torch.device("cpu"), size=nbytes)
    _patchers[replica] = patcher
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
