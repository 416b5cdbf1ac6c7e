"""Whether INT8 attention changes a picture less than INT8 products do already. measure.py finds it out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..cuda.attention import HEAD_SIZE, int8_attention
from ..files.cache import DiskCache, digest
from ..limits import EXACT, INT8
from ..weights.components import Replica

CHANGES = "changes"  # the tensor of a kept verdict


@dataclass(frozen=True)
class AttentionVerdict:
    """The largest relative changes of a prediction, over the steps looked at.

    attention: by INT8 attention alone. products: by rounding activations for INT8 products alone.
    """

    attention: float
    products: float

    @property
    def safe(self) -> bool:
        """Whether `auto` may choose INT8 attention: it costs no more than the products do."""
        return self.attention <= self.products

    def __str__(self) -> str:
        return (
            f"INT8 attention changes a prediction by {self.attention:.2g}, INT8 products by "
            f"{self.products:.2g}: attention auto is {INT8 if self.safe else EXACT}"
        )


def why_exact(replica: Replica) -> str:
    """Why this transformer cannot compute INT8 attention on its card; empty where it can."""
    size = replica.spec.checkpoint.component("transformer").config()["attention_head_dim"]
    if size != HEAD_SIZE:
        return f"is for heads of {HEAD_SIZE} channels, and this model's have {size}"
    if replica.spec.math != torch.float32:
        return f"is for FP32 arithmetic, which the {replica} does not use"
    return "" if int8_attention(replica.device) else f"does not run on {replica.card}"


def can_compare(replica: Replica) -> bool:
    """Whether there is something to compare: INT8 products, and INT8 attention on this card."""
    precision = replica.spec.precision
    return precision.integer_products and not precision.fp16_inside and not why_exact(replica)


def keep_verdict(cache: DiskCache, identity: str, verdict: AttentionVerdict) -> None:
    """Keep it for a transformer's files. Raises OSError."""
    cache.write(_name(identity), {CHANGES: torch.tensor([verdict.attention, verdict.products])})


def kept_verdict(cache: DiskCache, identity: str) -> AttentionVerdict | None:
    """What was measured last for a transformer's files, if anything."""
    found = (cache.read(_name(identity)) or {}).get(CHANGES)
    return None if found is None or found.shape != (2,) else AttentionVerdict(*found.tolist())


def _name(identity: str) -> str:
    return f"attention-{digest(identity)}"
