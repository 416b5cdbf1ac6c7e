"""Which attention a transformer uses here, and what FireRed Numerics found out about it."""

from __future__ import annotations

import logging

from ..engine.errors import FireRedError
from ..engine.limits import AUTO, EXACT, INT8
from ..engine.numerics.attention import (
    AttentionVerdict,
    can_compare,
    keep_verdict,
    kept_verdict,
    why_exact,
)
from ..engine.planning.machine import Device
from ..engine.weights.components import Replica
from .checkpoints import checkpoint_names, get_checkpoint
from .storage import disk_cache

log = logging.getLogger("FireRed")

WORTH = 1.1  # INT8 attention's speed, of exact attention's


def choose_attention(kind: str, replica: Replica, device: Device) -> str:
    """EXACT or INT8, logged where that is not what was asked for. kind: one of ATTENTION's."""
    if kind == INT8:
        if reason := why_exact(replica):
            log.warning("attention int8 %s, so it is computed exactly", reason)
            return EXACT
        log.info("attention int8 on %s", replica.card)
        return INT8
    speeds = device.speeds
    if kind == EXACT or speeds is None or not speeds.int8_attention or not can_compare(replica):
        return EXACT
    if speeds.int8_attention < WORTH * (speeds.fp32_attention or 0.0):
        return EXACT
    verdict = kept_verdict(disk_cache(), replica.spec.identity)
    if verdict is None:
        log.info("attention is exact: run FireRed Numerics on this transformer once to see if int8 would do")
        return EXACT
    log.info("%s", verdict)
    return INT8 if verdict.safe else EXACT


def keep_attention_verdict(replica: Replica, verdict: AttentionVerdict) -> None:
    """For `auto`, from the next prompt on."""
    try:
        keep_verdict(disk_cache(), replica.spec.identity, verdict)
    except OSError as error:
        log.warning("what was found out about INT8 attention is not kept (%s)", error)


def attention_fingerprint(checkpoint: object, precision: object, kind: object) -> str:
    """For a loader's fingerprint_inputs: changes when `auto` may choose otherwise. Never raises.

    An input is None where it comes from a link.
    """
    if kind not in (AUTO, None) or precision not in ("int8-fast", None):
        return ""
    names = [checkpoint] if checkpoint is not None else checkpoint_names("transformer")
    return "".join("1" if _is_safe(name) else "0" for name in names)


def _is_safe(checkpoint: object) -> bool:
    try:
        identity = get_checkpoint(checkpoint, "transformer").component("transformer").identity()
        verdict = kept_verdict(disk_cache(), identity)
    except FireRedError:
        return False
    return verdict is not None and verdict.safe
