"""Fill a model that was built on torch's meta device with its weights.

They are read one by one, and converted to their final form on the model's device. Host memory holds two
tensors at a time, whatever the checkpoint's size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, TypeGuard

import torch
from accelerate.utils import set_module_tensor_to_device

from ..cards.transfer import moved
from ..cuda.rows import row_kernels
from ..errors import AGAIN, CheckpointError
from ..files.cache import DiskCache
from ..files.encodings import Encoded, Encoding, Stored
from ..files.tensors import TensorTypes, read_header, read_tensors, stored_bytes
from ..progress import OnProgress
from .components import ComponentSpec, Replica
from .formats import QuantizedLinear
from .layers import UpcastLinear, has_storage_dtype, prepare_layers
from .names import is_big_matrix

log = logging.getLogger("FireRed")

Shape = tuple[int, ...]


def fill(
    model: torch.nn.Module, replica: Replica, on_progress: OnProgress, cache: DiskCache | None = None
) -> str:
    """Give a model on meta its weights, in their final form on the replica's device.

    Reads them from the cache if it has them. Otherwise converts the checkpoint's and adds them to the cache,
    but for those that stay as the files have them.
    Returns the names of the kernels that its layers chose.
    Raises CheckpointError for a tensor that is missing, unknown or of another shape.
    """
    spec = replica.spec
    prepare_layers(model, spec.role, spec.precision)
    name = cache_name(spec)
    kept = cache.find(name) if cache and name else None
    if kept is not None:
        encoded = _encoded_names(model, spec)
        try:
            _restore(model, kept, encoded, replica.device, on_progress)
        except (OSError, CheckpointError) as error:  # another process may delete it at any time
            log.warning("the cached weights are damaged, so they are made again (%s)", error)
        else:
            _add_encoded(model, replica, encoded)
            return _finish(model, replica)
    _convert(model, replica, on_progress, cache, name)
    return _finish(model, replica)


def fill_from(model: torch.nn.Module, source: torch.nn.Module, replica: Replica) -> str:
    """Give a model on meta the weights of an equal model on another card. Returns as fill does."""
    prepare_layers(model, replica.spec.role, replica.spec.precision)
    move = functools.partial(moved, device=replica.device)
    for path, layer in source.named_modules():
        if isinstance(layer, QuantizedLinear | UpcastLinear):
            same: Any = model.get_submodule(path)
            same.copy_from(layer, move)
    for name, parameter in source.named_parameters():
        _set_parameter(model, name, move(parameter.detach()), parameter.dtype)
    return _finish(model, replica)


def cache_name(spec: ComponentSpec) -> str | None:
    """The name of a component's file in the cache; None where nothing is gained by one.

    That is so for precisions that are quick to make, for matrices that are used as their files have them, and
    for a part of the transformer.
    """
    layer = spec.precision.layer
    if layer is None or layer.cached_as is None or spec.held is not None:
        return None
    if any(
        is_big_matrix(spec.role, name) and layer.takes(each.encoding) for name, each in spec.stored().items()
    ):
        return None
    compute = str(spec.math).removeprefix("torch.")
    return f"{spec.checkpoint.name}-{spec.role}-{layer.cached_as}-{compute}-{spec.identity}"


class _Missing:
    """The tensors that a model still lacks: their shapes by their names in the model."""

    def __init__(self, shapes: Mapping[str, Shape], source: Path):
        self._shapes, self._source = dict(shapes), source

    def take(self, name: str, shape: Shape, stored: str) -> None:
        """Remove a tensor that arrived. stored: its name in the files. Raises CheckpointError."""
        if name not in self._shapes:
            raise CheckpointError(f"{self._source} has a tensor this model does not know: {stored}.")
        expected = self._shapes.pop(name)
        if tuple(shape) != expected:
            raise CheckpointError(
                f"{self._source}: {stored} is {tuple(shape)}, and the model needs {expected}. {AGAIN}"
            )

    def require_none(self) -> None:
        """Raise CheckpointError when a tensor is still missing."""
        if self._shapes:
            raise CheckpointError(
                f"{self._source} lacks {len(self._shapes)} of the model's tensors, the first being "
                f"{next(iter(self._shapes))}. {AGAIN}"
            )


def _convert(
    model: torch.nn.Module,
    replica: Replica,
    on_progress: OnProgress,
    cache: DiskCache | None,
    cached_as: str | None,
) -> None:
    """Fill the model from the checkpoint's tensors, and write the results to the cache under that name."""
    spec, device = replica.spec, replica.device
    component, modules = spec.checkpoint.component(spec.role), dict(model.named_modules())
    found = spec.stored()
    missing = _Missing(_unquantised_shapes(model), component.path)
    writer = cache.create(cached_as, _final_layout(model, spec, found)) if cache and cached_as else None
    done, total = 0, sum(stored.nbytes for stored in found.values())
    try:
        for in_files, in_host in component.tensors(lambda each: spec.name_in_model(each) is not None, device):
            name = spec.name_in_model(in_files)
            assert name is not None
            missing.take(name, in_host.shape, in_files)
            parts = _set(model, modules, name, in_host.to(device), spec)
            if writer is not None:
                path = name.rpartition(".")[0]
                for part in parts:
                    writer.write(f"{path}.{part}", getattr(modules[path], part))
            done += found[name].nbytes
            on_progress(done, total)
        missing.require_none()
        spec.require_unchanged()  # the cached file is named after the identity
        if writer is not None:
            writer.finish()
    finally:
        if writer is not None:
            writer.abandon()


def _set(
    model: torch.nn.Module,
    modules: Mapping[str, torch.nn.Module],
    name: str,
    encoded: Encoded,
    spec: ComponentSpec,
) -> list[str]:
    """Give the model one of its tensors. Returns the attributes of its owner that now hold it."""
    path, _, attribute = name.rpartition(".")
    owner = modules[path]
    if isinstance(owner, QuantizedLinear) and attribute == "weight":
        if owner.takes(encoded.encoding):
            owner.take(encoded)
        else:
            owner.set_weight(encoded.decode())
        return list(owner.layout())
    in_storage = has_storage_dtype(owner, attribute)
    if _stays_encoded(owner, attribute, encoded.encoding, spec):
        owner.keep(encoded)
        return []
    tensor = encoded.decode()
    dtype = spec.precision.storage if in_storage else spec.math
    _set_parameter(model, name, tensor, dtype or tensor.dtype)
    return [attribute]


def _stays_encoded(
    owner: torch.nn.Module, attribute: str, encoding: Encoding, spec: ComponentSpec
) -> TypeGuard[UpcastLinear]:
    """Whether this tensor of a layer stays as the files store it."""
    return attribute == "weight" and isinstance(owner, UpcastLinear) and spec.precision.keeps(encoding)


def _encoded_names(model: torch.nn.Module, spec: ComponentSpec) -> set[str]:
    """The model's tensors that stay as the files store them."""
    found = spec.stored()
    owners = {name: name.rpartition(".") for name, _ in model.named_parameters() if name in found}
    return {
        name
        for name, (path, _, attribute) in owners.items()
        if _stays_encoded(model.get_submodule(path), attribute, found[name].encoding, spec)
    }


def _add_encoded(model: torch.nn.Module, replica: Replica, names: Set[str]) -> None:
    """Give a model from the cache those tensors from the checkpoint. Raises CheckpointError."""
    if not names:
        return
    spec, modules = replica.spec, dict(model.named_modules())
    component = spec.checkpoint.component(spec.role)
    for in_files, in_host in component.tensors(lambda each: spec.name_in_model(each) in names):
        name = spec.name_in_model(in_files)
        assert name is not None
        _set(model, modules, name, in_host.to(replica.device), spec)


def _restore(
    model: torch.nn.Module, kept: Path, encoded: Set[str], device: torch.device, on_progress: OnProgress
) -> None:
    """Fill the model from a file of the cache. Its tensors have their final form.

    encoded: what is not in that file.
    """
    modules = dict(model.named_modules())
    shapes = {name: shape for name, shape in _final_shapes(model).items() if name not in encoded}
    missing = _Missing(shapes, kept)
    done, total = 0, sum(map(stored_bytes, read_header(kept).tensors.values()))
    for name, in_host in read_tensors(kept, reuse_buffers_for=device):
        tensor = in_host.to(device, copy=True)
        missing.take(name, tuple(tensor.shape), name)
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
    """The tensors that a checkpoint stores for the model."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for path, layer in _quantized_layers(model):
        shapes[f"{path}.weight"] = (layer.out_features, layer.in_features)
    return shapes


def _final_shapes(model: torch.nn.Module) -> dict[str, Shape]:
    """The tensors of the filled model."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for path, layer in _quantized_layers(model):
        shapes |= {f"{path}.{part}": shape for part, (_, shape) in layer.layout().items()}
    return shapes


def _final_layout(model: torch.nn.Module, spec: ComponentSpec, found: Mapping[str, Stored]) -> TensorTypes:
    """The tensors of the filled model, with dtypes. found: the stored tensors, by names in the model."""
    layout: dict[str, tuple[torch.dtype, Shape]] = {}
    for path, layer in _quantized_layers(model):
        layout |= {f"{path}.{part}": described for part, described in layer.layout().items()}
    encoded = _encoded_names(model, spec)
    for name, parameter in model.named_parameters():
        owner, _, attribute = name.rpartition(".")
        in_storage = has_storage_dtype(model.get_submodule(owner), attribute)
        dtype = spec.precision.storage if in_storage else spec.math
        if name in found and name not in encoded:
            layout[name] = (dtype or found[name].decoded_dtype, tuple(parameter.shape))
    return layout


def _set_parameter(model: torch.nn.Module, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    set_module_tensor_to_device(model, name, tensor.device, value=tensor, dtype=dtype, clear_cache=False)


def _finish(model: torch.nn.Module, replica: Replica) -> str:
    """Move the buffers to the device and let the layers choose kernels. Logs and returns their choices."""
    for name, buffer in model.named_buffers():
        if buffer.device != replica.device:
            set_module_tensor_to_device(model, name, replica.device, value=buffer, clear_cache=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    reports = [layer.prepare() for _, layer in _quantized_layers(model)]
    if replica.spec.role == "transformer" and row_kernels(replica.device, replica.spec.math) is not None:
        reports.append("own kernels between products")
    arithmetic = ", ".join(sorted({report for report in reports if report}))
    if arithmetic:
        log.info("%s: %s", replica, arithmetic)
    return arithmetic
