"""Check results for NaN and infinity, which make a picture black, and name their cause."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import NonFiniteError, first_line
from ..limits import Choice
from ..weights.adapters import Adapter
from ..weights.components import ComponentSpec, Replica
from ..weights.precision import ROLE_PRECISIONS
from .trace import FP16_MAX, Culprit, find_culprit, magnitude, tensors_in, watch_outputs

log = logging.getLogger("FireRed")

STOP, WARN, OFF = GUARDS = ("stop", "warn", "off")
GUARD = Choice("guard", GUARDS)
Trace = Callable[[], Culprit | None]


class Guard:
    """Checks the results of one component during one run.

    level: `stop` raises NonFiniteError, `warn` logs the run's first bad result, `off` does not check.
    adapters: the LoRAs over the component, which may be the cause as well.
    """

    def __init__(self, replica: Replica, level: str = STOP, adapters: Sequence[Adapter] = ()):
        self.replica, self._level = replica, GUARD.require(level)
        self._adapters = [adapter for adapter in adapters if adapter.strength]
        self._largest = 0.0  # magnitude of the results so far
        self._warned = False

    def check(
        self,
        tensor: torch.Tensor,
        what: str,
        trace: Trace | None = None,
        peaks: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Return `tensor` unchanged. The check costs one read of it and a copy of a few bytes to the host.

        what: the tensor's name for errors. trace: finds the module that failed; called only for a bad tensor.
        peaks: from watch_clipping. Raises NonFiniteError for a bad tensor at level `stop`.
        """
        if self._level == OFF:
            return tensor
        largest, *inside = torch.stack([magnitude(tensor), *(p.to(tensor.device) for p in peaks)]).tolist()
        clipped = any(peak >= FP16_MAX for peak in inside)
        if math.isfinite(largest) and not clipped:
            self._largest = max(self._largest, largest)
        elif not self._warned:
            message = self._message(tensor, what, trace)
            if self._level == STOP:
                raise NonFiniteError(message)
            self._warned = True
            log.warning("%s", message)
        return tensor

    def run(self, forward: Callable[[], torch.Tensor], what: str, model: torch.nn.Module) -> torch.Tensor:
        """The checked result of `forward`, which calls `model`. It is repeated for a bad result."""
        with self.watch_clipping(model) as peaks:
            result = forward()
        return self.check(result, what, functools.partial(find_culprit, model, forward), peaks)

    @contextmanager
    def watch_clipping(self, transformer: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
        """Collect the largest magnitude (0-d) of each block's results, in FP16 arithmetic only.

        There, blocks clip infinities to +-65504 as diffusers does: a prediction can be finite and wrong.
        """
        peaks: list[torch.Tensor] = []

        def keep(name: str, block: torch.nn.Module, args: Any, output: Any) -> None:
            peaks.extend(magnitude(tensor) for tensor in tensors_in(output))

        blocks: Any = {}
        if self._level != OFF and self.replica.spec.math is torch.float16:
            blocks = getattr(transformer, "transformer_blocks", {})
        with watch_outputs(dict(blocks.items()), keep):
            yield peaks

    def _message(self, tensor: torch.Tensor, what: str, trace: Trace | None) -> str:
        finite = bool(tensor.isfinite().all())
        wrong = f"{what} was clipped to FP16's limit of 65504 inside" if finite else _count(tensor, what)
        said = [f"{wrong}, computed by the {self.replica}."]
        if self._largest:
            said.append(f"What it computed before stayed within {self._largest:.4g}.")
        culprit, repeated = None, trace is not None
        try:
            culprit = trace() if trace is not None else None
        except RuntimeError as error:  # such as a card without room for it
            repeated = False
            said.append(f"The module is not known: a traced repeat failed ({first_line(error)}).")
        if culprit is not None:
            said.append(f"First to break: {culprit}.")
        said.append("The image would be wrong." if finite else "The image would be black.")
        if repeated and culprit is None:
            said.append(
                "A traced repeat stayed finite, so this is not reproducible: suspect the card (memory, heat, "
                "copies between cards). Run it again, or on another device."
            )
        else:
            said.append(_remedy(self.replica.spec, culprit, self._adapters))
        return " ".join(said)


def require_finite_input(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """Return another node's tensor unchanged. Raises NonFiniteError with the number of bad values."""
    if bool(tensor.isfinite().all()):
        return tensor
    raise NonFiniteError(f"{_count(tensor, what)}. The image would be black: check the node that made it.")


def _remedy(spec: ComponentSpec, culprit: Culprit | None, adapters: Sequence[Adapter]) -> str:
    fp16 = spec.precision.is_fp16 or spec.precision.fp16_inside
    if culprit is not None and culprit.bad_parameters and not fp16:
        names = " and ".join(culprit.bad_parameters)
        return f"Its {names} holds NaN or infinity: the file is damaged. Download the {spec.role} again."
    if spec.math is torch.float32 and not fp16:
        if not adapters:
            return "Check the checkpoint: even FP32 arithmetic overflowed."
        laid_over = " and ".join(f"{adapter.lora.name} at {adapter.strength:g}" for adapter in adapters)
        return (
            f"Even FP32 arithmetic overflowed: lower the strength of the LoRA ({laid_over}), or take it out."
        )
    names = " or ".join(row.name for row in ROLE_PRECISIONS[spec.role].values() if row.remedy)
    forced = ", and math to fp32" if spec.role == "transformer" else ""
    return f"Set its precision to {names}{forced}: safe on every card."


def _count(tensor: torch.Tensor, what: str) -> str:
    bad = tensor[~tensor.isfinite()]
    nans = int(bad.isnan().sum())
    return f"{what} holds {nans} NaN and {bad.numel() - nans} infinite values of {tensor.numel()}"
