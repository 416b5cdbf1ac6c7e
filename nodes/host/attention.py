"""Which attention a transformer uses here, and what FireRed Numerics found out about it."""

from __future__ import annotations

import logging

import torch

from ..engine.cuda.attention import int8_attention
from ..engine.errors import FireRedError
from ..engine.limits import AUTO, EXACT, INT8
from ..engine.numerics.attention import AttentionVerdict, can_compare, keep_verdict, kept_verdict
from ..engine.planning.machine import Device
from ..engine.weights.components import Replica
from .checkpoints import get_checkpoint
from .storage import disk_cache

log = logging.getLogger("FireRed")

CLEARLY_FASTER = 1.1  # of exact attention's speed


def choose_attention(kind: str, replica: Replica, device: Device) -> str:
    """EXACT or INT8, logged where that is not what was asked for. kind: one of ATTENTION's."""
    if kind == INT8:
        return INT8 if _runs(replica) else EXACT
    speeds = device.speeds
    if kind == EXACT or speeds is None or not speeds.int8_attention or not can_compare(replica):
        return EXACT
    if speeds.int8_attention < CLEARLY_FASTER * speeds.fp32_attention:
        return EXACT
    verdict = kept_verdict(disk_cache(), replica.spec.identity)
    if verdict is None:
        log.info("attention is exact: run FireRed Numerics on this transformer once to see if int8 would do")
        return EXACT
    log.info("%s", verdict)
    return INT8 if verdict.safe else EXACT


def _runs(replica: Replica) -> bool:
    if replica.spec.math != torch.float32:
        log.warning("attention int8 is for FP32 arithmetic, so the %s computes it exactly", replica)
    elif int8_attention(replica.device) is None:
        log.warning("attention int8 does not run on %s, so it is computed exactly", replica.card)
    else:
        return True
    return False


def keep_attention_verdict(replica: Replica, verdict: AttentionVerdict) -> None:
    """For `auto`, from the next prompt on."""
    try:
        keep_verdict(disk_cache(), replica.spec.identity, verdict)
    except OSError as error:
        log.warning("what was found out about INT8 attention is not kept (%s)", error)


def attention_fingerprint(checkpoint: object, kind: object) -> str:
    """For a loader's fingerprint_inputs: changes when `auto` may choose otherwise. Never raises."""
    if kind not in (AUTO, None):
        return ""
    try:
        identity = get_checkpoint(checkpoint, "transformer").component("transformer").identity()
        return str(kept_verdict(disk_cache(), identity))
    except FireRedError:
        return ""
