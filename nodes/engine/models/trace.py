"""Find the module of a model whose result is the first with NaN or infinity."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

FP16_MAX = torch.finfo(torch.float16).max  # 65504
MASK = "mask"  # arguments with it in their name may hold infinities


@dataclass(frozen=True)
class Culprit:
    """The first module of a forward with good inputs and a bad result.

    name: dotted; "" for the model itself. largest_in, largest_out: magnitudes of its finite values.
    bad_parameters: its own parameters that hold NaN or infinity. given_bad: the model's inputs were bad.
    """

    name: str
    kind: str
    largest_in: float
    largest_out: float = 0.0
    bad_parameters: tuple[str, ...] = ()
    given_bad: bool = False

    def __str__(self) -> str:
        shown = f"{self.name or 'the model itself'} ({self.kind})"
        if self.given_bad:
            return f"{shown} was given NaN or infinity, beside finite values up to {self.largest_in:.4g}"
        return (
            f"{shown} was given values up to {self.largest_in:.4g} and left the range of its arithmetic, "
            f"its largest finite value being {self.largest_out:.4g}"
        )


@torch.inference_mode()
def find_culprit(model: torch.nn.Module, forward: Callable[[], object]) -> Culprit | None:
    """Run `forward`, which calls `model`, and return the first module that fails; None if all stay in range.

    Out of range are NaN, infinity and, in FP16, its largest value, because the transformer's blocks clip
    infinities to it. Costs a forward, and a wait for the device at every module. Removes its hooks.
    """
    found: list[Culprit] = []
    inputs: list[_Range] = []  # of the modules that are running, the innermost last

    def before(name: str, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        given = _Range() if found else _range_of((args, kwargs))
        if given.bad and not inputs:
            found.append(Culprit(name, type(module).__name__, given.largest, given_bad=True))
        inputs.append(given)

    def after(name: str, module: torch.nn.Module, args: Any, output: Any) -> None:
        given = inputs.pop()
        if found or given.bad:
            return
        gave = _range_of(output)
        if gave.bad:
            kind = type(module).__name__
            found.append(Culprit(name, kind, given.largest, gave.largest, _bad_parameters(module)))

    modules = dict(model.named_modules())
    with ExitStack() as hooks:
        for name, module in modules.items():
            hook = functools.partial(before, name)
            hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        hooks.enter_context(watch_outputs(modules, after))
        forward()
    return found[0] if found else None


@contextmanager
def watch_outputs(
    modules: Mapping[str, torch.nn.Module], watch: Callable[[str, torch.nn.Module, Any, Any], None]
) -> Iterator[None]:
    """Call watch(name, module, its positional arguments, its output) after each module runs."""
    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(functools.partial(watch, name)))
        yield


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors in nested tuples, lists and mappings, without masks."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            if MASK not in str(name):
                yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def magnitude(tensor: torch.Tensor) -> torch.Tensor:
    """The largest magnitude, 0-d FP32 on the tensor's device, from one read of it. NaN gives NaN."""
    lowest, highest = tensor.aminmax()
    return torch.maximum(-lowest, highest).float()


@dataclass(frozen=True)
class _Range:
    largest: float = 0.0
    bad: bool = False


def _range_of(value: Any) -> _Range:
    largest, bad = 0.0, False
    for tensor in tensors_in(value):
        peak = magnitude(tensor).item()
        bad = bad or not math.isfinite(peak) or (tensor.dtype is torch.float16 and peak >= FP16_MAX)
        if not math.isfinite(peak):
            peak = magnitude(tensor.nan_to_num(0.0, 0.0, 0.0)).item()
        largest = max(largest, peak)
    return _Range(largest, bad)


def _bad_parameters(module: torch.nn.Module) -> tuple[str, ...]:
    """Names of the module's own weights and buffers that hold NaN or infinity."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return tuple(name for name, tensor in own if any(_range_of(part).bad for part in tensors_in(tensor)))
