"""Load, borrow and unload components through ComfyUI's memory manager."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import torch

from ..engine.cards.card import Card
from ..engine.cards.heartbeat import heartbeat_where_compiled
from ..engine.errors import InputError
from ..engine.limits import shown
from ..engine.progress import before_each_block
from ..engine.sampling.layout import Layout
from ..engine.sampling.options import DEFAULT_OPTIONS, SamplingOptions
from ..engine.weights.components import Replica
from ..engine.weights.estimates import RESERVED_BYTES
from ..engine.weights.room import has_room, require_room, working_bytes
from .cluster import ClusterUse, release_card
from .devices import free_memory, machine
from .progress import check_cancelled, progress_reporter
from .storage import disk_cache

log = logging.getLogger("FireRed")


class Resident(torch.nn.Module):
    """A component as ComfyUI's memory manager sees it: whole on its device, or not in memory.

    Unloading deletes the weights, and loading reads them from disk again. A 41 GB transformer moved to host
    memory would fill it.
    """

    def __init__(self, replica: Replica):
        super().__init__()
        self.replica = replica
        self.device = torch.device("cpu")
        self.component: Any = None
        self.model_loaded_weight_memory = 0
        self.borrowed = 0  # how many blocks use it now; above 0 it is not unloaded

    def load(self, nbytes: int) -> None:
        from ..engine.models import loading

        started = time.monotonic()
        source = _same_elsewhere(self.replica)
        doing = "loading" if source is None else "copying"
        self.component = loading.load(
            self.replica, progress_reporter(f"{doing} the {self.replica}"), disk_cache(), source
        )
        how = "loaded" if source is None else f"copied from {source.replica.card.label}"
        log.info("%s %s in %.1f s", self.replica, how, time.monotonic() - started)
        self.device, self.model_loaded_weight_memory = self.replica.device, nbytes

    def unload(self) -> None:
        self.component = None
        self.device, self.model_loaded_weight_memory = torch.device("cpu"), 0


@dataclass(frozen=True, eq=False)
class Handle:
    """The output of a loader node. It owns the patcher, which owns the weights.

    ComfyUI's cache holds it. Weights in host memory are freed when the cache drops it. When host memory runs
    short, the cache drops outputs with an attribute `patcher` first. layout: of a transformer, how several
    cards share its runs; the weights on each belong to one of `patchers`. cluster: of a transformer whose
    runs go to a cluster.
    """

    replica: Replica
    patcher: Any
    options: SamplingOptions = DEFAULT_OPTIONS
    layout: Layout | None = None
    patchers: tuple[Any, ...] = ()
    cluster: ClusterUse | None = None

    def with_options(self, **changes: Any) -> Handle:
        """The same weights, sampled otherwise: fields of SamplingOptions. Nothing is loaded again."""
        return replace(self, options=replace(self.options, **changes))

    def shared_by(self, layout: Layout) -> Handle:
        """The same transformer on the cards of the layout."""
        patchers = tuple(handle_for(replica).patcher for replica in layout.replicas)
        return replace(
            self,
            replica=layout.replicas[0],
            patcher=patchers[0],
            layout=layout,
            patchers=patchers,
            cluster=None,
        )

    def on_cluster(self, use: ClusterUse) -> Handle:
        """The same transformer, whose runs go to a cluster."""
        return replace(self.alone(self.replica.card), cluster=use)

    def off_cluster(self) -> Handle:
        """The same transformer, whose runs stay on this machine."""
        return replace(self, cluster=None)

    def alone(self, card: Card) -> Handle:
        """The same transformer whole on one card."""
        whole = replace(self.replica, card=card).holding(None)
        return replace(handle_for(whole), options=self.options)


def require_handle(given: Any, role: str) -> Handle:
    """The handle unchanged. Raises InputError for anything but the output of this role's loader."""
    if not isinstance(given, Handle) or given.replica.spec.role != role:
        what = f"a {given.replica}" if isinstance(given, Handle) else shown(given)
        loader = "".join(word.capitalize() for word in role.split("_")).replace("Vae", "VAE")
        raise InputError(f"{role} is {what}. Connect the output of FireRedLoad{loader}.")
    return given


_patchers: WeakValueDictionary[Replica, Any] = WeakValueDictionary()  # handles of equal replicas share one
# These keep weights on a card when ComfyUI drops the node's output. They cost no host memory, another prompt
# may use them, and ComfyUI unloads them when it needs the card.
_on_cards: dict[Replica, Any] = {}


def _same_elsewhere(replica: Replica) -> Any:
    """The same transformer on another card, if it is loaded there."""
    for other, patcher in list(_patchers.items()):
        component = patcher.model.component
        same = other.spec == replica.spec and other != replica and replica.spec.role == "transformer"
        if same and other.card.is_gpu and component is not None:
            return component
    return None


def handle_for(replica: Replica) -> Handle:
    """A handle for the replica. Handles of equal replicas share the weights."""
    return Handle(replica, _patchers.get(replica) or _make_patcher(replica))


@contextmanager
def borrow(handle: Handle, working: float | None = None) -> Iterator[Any]:
    """The handle's component, loaded on its device, which is the current device inside the block.

    working: bytes it needs beside its weights; by default, those of a usual edit. When the user cancels, the
    forward raises ComfyUI's interrupt before its next block. Raises DoesNotFitError.
    """
    import comfy.model_management as mm

    from ..engine.models import loading

    replica, patcher = handle.replica, handle.patcher
    if working is None:
        working = working_bytes(replica)
    at_least = working - RESERVED_BYTES  # the driver's part is not counted as free in room()

    def has_enough() -> bool:
        return has_room(replica, at_least, room(replica))

    if not has_enough():
        release_card(replica.device, has_enough)
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
def borrow_all(working: Mapping[Replica, float]) -> Iterator[list[Any]]:
    """As borrow, several replicas at once. working: for each of them."""
    with ExitStack() as borrowed:
        yield [
            borrowed.enter_context(borrow(handle_for(replica), nbytes)) for replica, nbytes in working.items()
        ]


@contextmanager
def _kept_loaded(patcher: Any) -> Iterator[None]:
    """Keep the weights loaded inside this block, whatever memory a preview or another node needs.

    ComfyUI removes a model from its list when it asks the model to unload. The block's end puts it back on
    the list: without that, ComfyUI could never unload it.
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
    """Unload what this replica replaces: its role on its device, and the same component in host memory.

    Replicas of one role may stay on several cards: ComfyUI unloads them when it needs a card. It unloads
    nothing from host memory, so a component that moved from the CPU to a card is unloaded here.
    """
    for other, patcher in list(_patchers.items()):
        in_host_memory = other.device.type == "cpu" or machine().unified
        moved = other.spec.checkpoint == replica.spec.checkpoint and in_host_memory
        same_role = other != replica and other.spec.role == replica.spec.role
        if same_role and (other.device == replica.device or moved):
            patcher.detach()


def _forget_unloaded() -> None:
    """Drop patchers that ComfyUI has unloaded. Not to be called while ComfyUI unloads."""
    for replica, patcher in list(_on_cards.items()):
        if not patcher.loaded_size():
            del _on_cards[replica]


def _make_room_in_host_memory(wanted: Any, nbytes: int) -> None:
    """Unload our other components on the CPU until `nbytes` are free: ComfyUI does not do it."""
    import comfy.model_management as mm

    for patcher in list(_patchers.values()):
        on_cpu = patcher.load_device.type == "cpu" and patcher is not wanted
        if on_cpu and not wanted.loaded_size() and mm.get_free_memory(patcher.load_device) < nbytes:
            patcher.detach()


def room(replica: Replica) -> int:
    """Bytes that the device can give to this component, with every other model unloaded.

    For the CPU and MPS it is all their memory, because the system pages it.
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
    """A ModelPatcher class that loads and unloads a whole model: diffusers' modules do not load in parts."""
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
            # load_models_gpu calls detach(False) for a model that is loaded already
            if unpatch_all and not self.model.borrowed:
                self.model.unload()
            return self.model

    return WholeModelPatcher
