"""A model built on meta gets its weights: streamed to its device, each in its final form.

Host memory stays small whatever the checkpoint's size: two tensors are in flight at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from accelerate.utils import set_module_tensor_to_device

from ..errors import CheckpointError
from ..files.cache import DiskCache
from ..files.tensors import DTYPES, Layout, read_header, read_tensors, stored_bytes
from ..progress import OnProgress
from .components import ComponentSpec, Replica
from .formats import QuantizedLinear
from .layers import has_storage_dtype, prepare_layers
from .names import model_name

log = logging.getLogger("FireRed")

Shape = tuple[int, ...]


def fill(
    model: torch.nn.Module, replica: Replica, on_progress: OnProgress, cache: DiskCache | None = None
) -> str:
    """Give a model on meta its weights, in their final form on the replica's device.

    They come from the cache if it keeps them in that form, else from the checkpoint, and are then kept.
    Returns the kernels that its layers chose, in words. Raises CheckpointError for a tensor that is missing,
    unknown or of another shape.
    """
    spec = replica.spec
    prepare_layers(model, spec.role, spec.precision)
    name = cache_name(spec)
    kept = cache.find(name) if cache and name else None
    if kept is not None:
        try:
            _restore(model, kept, replica.device, on_progress)
            return _finish(model, replica)
        except CheckpointError as error:
            log.warning("the cached weights are damaged and made again (%s)", error)
    _convert(model, replica, on_progress, cache if name else None)
    return _finish(model, replica)


def cache_name(spec: ComponentSpec) -> str | None:
    """The cache file of a component at a precision, None where nothing is kept of it."""
    layer = spec.precision.layer
    if layer is None or layer.cached_as is None:
        return None
    compute = str(spec.math).removeprefix("torch.")
    return f"{spec.checkpoint.name}-{spec.role}-{layer.cached_as}-{compute}-{spec.identity}"


class _Missing:
    """The tensors that a model still needs: their shapes by their names in the model."""

    def __init__(self, shapes: Mapping[str, Shape], source: Path):
        self._shapes, self._source = dict(shapes), source

    def take(self, name: str, tensor: torch.Tensor, stored: str) -> None:
        """Tick a tensor off. stored: its name in the file. Raises CheckpointError where none is needed so."""
        if name not in self._shapes:
            raise CheckpointError(f"{self._source} has a tensor this model does not know: {stored}.")
        expected = self._shapes.pop(name)
        if tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"{self._source}: {stored} is {tuple(tensor.shape)}, its config.json says {expected}."
            )

    def require_none(self) -> None:
        """Raise CheckpointError where something was not there."""
        if self._shapes:
            raise CheckpointError(
                f"{self._source} lacks {len(self._shapes)} of the model's tensors, the first being "
                f"{next(iter(self._shapes))}. Download the folder again."
            )


def _convert(
    model: torch.nn.Module, replica: Replica, on_progress: OnProgress, cache: DiskCache | None
) -> None:
    """Fill the model from the checkpoint's unquantised tensors; keep what became of them in the cache."""
    spec, device = replica.spec, replica.device
    component, modules = spec.checkpoint.component(spec.role), dict(model.named_modules())
    headers = {model_name(spec.role, name): info for name, info in component.stored().items()}
    headers.pop(None, None)
    missing = _Missing(_unquantised_shapes(model), component.folder)
    name = cache_name(spec)
    writer = cache.create(name, _final_layout(model, spec, headers)) if cache and name else None
    done, total = 0, sum(map(stored_bytes, headers.values()))
    try:
        for stored, in_host in component.tensors(
            lambda each: model_name(spec.role, each) is not None, device
        ):
            name = model_name(spec.role, stored)
            assert name is not None
            tensor = in_host.to(device, copy=True)
            missing.take(name, tensor, stored)
            path, _, attribute = name.rpartition(".")
            owner, parts = modules[path], [attribute]
            if isinstance(owner, QuantizedLinear) and attribute == "weight":
                owner.set_weight(tensor)
                parts = list(owner.layout())
            else:
                dtype = spec.precision.storage if has_storage_dtype(owner, attribute) else spec.math
                _set_parameter(model, name, tensor, dtype or tensor.dtype)
            if writer is not None:
                for part in parts:
                    writer.write(f"{path}.{part}", getattr(owner, part))
            done += tensor.nbytes
            on_progress(done, total)
        missing.require_none()
        spec.require_unchanged()  # before what was made of the files is kept under their identity
        if writer is not None:
            writer.finish()
    finally:
        if writer is not None:
            writer.abandon()


def _restore(model: torch.nn.Module, kept: Path, device: torch.device, on_progress: OnProgress) -> None:
    """Fill the model from a cache file, whose tensors have their final form."""
    modules = dict(model.named_modules())
    missing = _Missing(_final_shapes(model), kept)
    done, total = 0, sum(map(stored_bytes, read_header(kept).values()))
    for name, in_host in read_tensors(kept, reuse_buffers_for=device):
        tensor = in_host.to(device, copy=True)
        missing.take(name, tensor, name)
        path, _, attribute = name.rpartition(".")
        owner = modules[path]
        if isinstance(owner, QuantizedLinear) and attribute in owner.layout():
            owner.restore(attribute, tensor)
        else:
            _set_parameter(model, name, tensor, tensor.dtype)
        done += tensor.nbytes
        on_progress(done, total)
    missing.require_none()


def _quantized_layers(model: torch.nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    return ((path, module) for path, module in model.named_modules() if isinstance(module, QuantizedLinear))


def _unquantised_shapes(model: torch.nn.Module) -> dict[str, Shape]:
    """What a checkpoint stores of the model."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for path, layer in _quantized_layers(model):
        shapes[f"{path}.weight"] = (layer.out_features, layer.in_features)
    return shapes


def _final_shapes(model: torch.nn.Module) -> dict[str, Shape]:
    """What the filled model holds."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for path, layer in _quantized_layers(model):
        shapes |= {f"{path}.{part}": shape for part, (_, shape) in layer.layout().items()}
    return shapes


def _final_layout(model: torch.nn.Module, spec: ComponentSpec, headers: Mapping[str | None, dict]) -> Layout:
    """What the filled model holds, with dtypes. headers: the stored tensors', by their names in the model."""
    layout: dict[str, tuple[torch.dtype, Shape]] = {}
    for path, layer in _quantized_layers(model):
        layout |= {f"{path}.{part}": described for part, described in layer.layout().items()}
    for name, parameter in model.named_parameters():
        owner, _, attribute = name.rpartition(".")
        dtype = (
            spec.precision.storage if has_storage_dtype(model.get_submodule(owner), attribute) else spec.math
        )
        if name in headers:
            layout[name] = (dtype or DTYPES[headers[name]["dtype"]], tuple(parameter.shape))
    return layout


def _set_parameter(model: torch.nn.Module, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    set_module_tensor_to_device(model, name, tensor.device, value=tensor, dtype=dtype, clear_cache=False)


def _finish(model: torch.nn.Module, replica: Replica) -> str:
    """Move what is no weight, and let layers test what the device can do; log their choices in one line."""
    for name, buffer in model.named_buffers():
        if buffer.device != replica.device:
            set_module_tensor_to_device(model, name, replica.device, value=buffer, clear_cache=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    reports = [layer.prepare() for _, layer in _quantized_layers(model)]
    arithmetic = ", ".join(sorted({report for report in reports if report}))
    if arithmetic:
        log.info("%s: %s", replica, arithmetic)
    return arithmetic
