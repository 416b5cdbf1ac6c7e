"""Load a component: build its model on torch's meta device, then fill it on the replica's device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import init_empty_weights

from ..arithmetic import exact_fp32
from ..cards.kernels import as_current
from ..files.cache import DiskCache
from ..progress import OnProgress, ignore_progress
from ..weights.components import ComponentSpec, Replica
from ..weights.filling import cache_name, fill, fill_from
from .config import TransformerConfig
from .modulation import Modulation
from .transformer import QwenImageTransformer, Transformer


@exact_fp32()
def load(
    replica: Replica,
    on_progress: OnProgress = ignore_progress,
    cache: DiskCache | None = None,
    source: Any = None,
) -> Any:
    """Load a component onto the replica's device.

    Returns a Transformer, a TextEncoder or a VAE, in evaluation mode. cache: for quantised weights and
    modulation. source: the same transformer on another card, to copy instead of reading files. on_progress:
    may raise, to cancel. Raises CheckpointError for files that are missing, truncated, of another model or
    changed.
    """
    replica.spec.require_unchanged()
    with as_current(replica.device):  # layers choose kernels on the current device
        if source is not None:
            component = copy_transformer(replica, source, cache)
        else:
            component = _loader(replica.spec.role)(replica, on_progress, cache)
    replica.spec.require_unchanged()
    return component


def mark_used(spec: ComponentSpec, cache: DiskCache) -> None:
    """Mark the cached copy of weights in memory as used. Otherwise it would be deleted first."""
    if name := cache_name(spec):
        cache.find(name)


def load_transformer(replica: Replica, on_progress: OnProgress, cache: DiskCache | None) -> Transformer:
    model = _empty_transformer(replica)
    arithmetic = fill(model, replica, on_progress, cache)
    return Transformer(replica, model.eval(), Modulation(replica, model.config, cache), arithmetic)


def copy_transformer(replica: Replica, source: Transformer, cache: DiskCache | None) -> Transformer:
    """The same transformer on another card."""
    model = _empty_transformer(replica)
    arithmetic = fill_from(model, source.model, replica)
    modulation = Modulation(replica, model.config, cache, source.modulation)
    return Transformer(replica, model.eval(), modulation, arithmetic)


def _empty_transformer(replica: Replica) -> QwenImageTransformer:
    config = TransformerConfig.of(replica.spec.checkpoint.component("transformer").config())
    with init_empty_weights():
        return QwenImageTransformer(config, replica.spec.held)


def _loader(role: str) -> Callable[[Replica, OnProgress, DiskCache | None], Any]:
    """The function that loads a component of this role.

    What the text encoder and the VAE import takes seconds: a process that only samples never imports it.
    """
    if role == "text_encoder":
        from .text import load_text_encoder

        return load_text_encoder
    if role == "vae":
        from .vae import load_vae

        return load_vae
    return load_transformer
