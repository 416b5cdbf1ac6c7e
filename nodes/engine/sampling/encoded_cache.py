"""Embeddings and reference latents in the disk cache: the same prompt and pictures are encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from PIL import Image

from ..arithmetic import computing_environment
from ..files.cache import DiskCache, digest, warn_not_kept
from ..weights.components import Replica

RECIPE = 1  # raise it when the results of text.py or vae.encode_reference change
KEY = "encoded"  # the name of a file's only tensor


def embedding_name(replica: Replica, prompt: str, pictures: Sequence[Image.Image]) -> str:
    """The name of a prompt's embedding with these pictures (8-bit RGB, in order)."""
    computed = computing_environment(replica.device, "transformers", "bitsandbytes")
    key = digest(RECIPE, *_identity(replica), computed, prompt, *_contents(pictures))
    return f"{replica.spec.checkpoint.name}-embedding-{key}"


def reference_name(replica: Replica, picture: Image.Image, megapixels: float | None) -> str:
    """The name of a picture's reference latent at that size. megapixels: as for vae.encode_reference."""
    computed = computing_environment(replica.device, "diffusers")
    key = digest(
        RECIPE, *_identity(replica), computed, megapixels and float(megapixels), *_contents([picture])
    )
    return f"{replica.spec.checkpoint.name}-reference-{key}"


def load_or_encode(
    cache: DiskCache, names: Sequence[str], encode: Callable[[list[int]], Iterable[torch.Tensor]]
) -> list[torch.Tensor]:
    """The tensors of these names: from the cache, or encoded and then written to the cache.

    encode: called with the indices that the cache lacks, if there are any; yields their tensors in this
    order. A name that occurs twice is encoded once.
    """
    found = {name: kept[KEY] for name in names if (kept := cache.read(name)) and KEY in kept}
    missing = [index for index, name in enumerate(names) if name not in found and name not in names[:index]]
    if missing:
        for index, tensor in zip(missing, encode(missing), strict=True):
            found[names[index]] = tensor
            _keep(cache, names[index], tensor)
    return [found[name] for name in names]


def _keep(cache: DiskCache, name: str, tensor: torch.Tensor) -> None:
    if not bool(tensor.isfinite().all()):
        return  # the guard let it pass; the next run must check it again
    try:
        cache.write(name, {KEY: tensor})
    except OSError as error:
        warn_not_kept(cache.path(name), error)


def _identity(replica: Replica) -> tuple[object, ...]:
    """The parts of an encoder's description that its results depend on."""
    spec = replica.spec
    return spec.role, spec.identity, spec.processor, *spec.precision.identity


def _contents(pictures: Sequence[Image.Image]) -> list[bytes | tuple[int, int]]:
    return [part for picture in pictures for part in (picture.size, picture.tobytes())]
