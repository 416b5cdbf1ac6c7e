"""From a spec to a component in memory: built empty, then filled tensor by tensor straight on its device.

Host memory stays small whatever the checkpoint's size: two tensors are in flight at a time.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device

from .arithmetic import exact_fp32
from .cache import CacheWriter, DiskCache
from .checkpoint import DTYPES, Component, Layout, read_header, read_tensors, stored_bytes
from .components import ComponentSpec, model_name
from .config import TransformerConfig
from .errors import CheckpointError
from .formats import FORMATS, QuantizedLinear
from .layers import is_stored, keep_single_frames, prepare_layers
from .modulation import Modulation
from .progress import OnProgress, untold
from .text import TextEncoder
from .transformer import QwenImageTransformer, Transformer

log = logging.getLogger("FireRed")


@exact_fp32()
def load(spec: ComponentSpec, on_progress: OnProgress = untold, cache: DiskCache | None = None) -> Any:
    """Load the component that `spec` describes onto its device.

    Returns a Transformer, a TextEncoder or an AutoencoderKLQwenImage, in evaluation mode. cache: where
    quantised weights are kept, if anywhere. Raises CheckpointError for files that are missing, truncated or
    of another model. `on_progress` may raise to cancel.
    """
    return LOADERS[spec.role](spec, on_progress, cache)


def load_transformer(spec: ComponentSpec, on_progress: OnProgress, cache: DiskCache | None) -> Transformer:
    component = spec.checkpoint.component(spec.role)
    config = TransformerConfig.of(_config_of(component, "QwenImageTransformer2DModel"))
    with init_empty_weights():
        model = QwenImageTransformer(config)
    arithmetic = _fill(model, spec, on_progress, cache)
    return Transformer(model.eval(), Modulation(spec, config, cache), arithmetic)


def load_vae(
    spec: ComponentSpec, on_progress: OnProgress, cache: DiskCache | None
) -> diffusers.AutoencoderKLQwenImage:
    vae = _build_diffusers(diffusers.AutoencoderKLQwenImage, spec)
    _fill(vae, spec, on_progress, cache)
    keep_single_frames(vae)
    return vae.eval()


def load_text_encoder(spec: ComponentSpec, on_progress: OnProgress, cache: DiskCache | None) -> TextEncoder:
    component = spec.checkpoint.component(spec.role)
    config = transformers.Qwen2_5_VLConfig.from_dict(
        _config_of(component, "Qwen2_5_VLForConditionalGeneration")
    )
    processor_folder = spec.checkpoint.component("processor").folder
    try:
        processor = transformers.Qwen2VLProcessor.from_pretrained(processor_folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{processor_folder} cannot be read ({error}). Download this folder again."
        ) from error
    with init_empty_weights():
        model = transformers.Qwen2_5_VLModel(config)
    _fill(model, spec, on_progress, cache)
    return TextEncoder(model.eval(), processor, spec.device)


LOADERS: dict[str, Callable[[ComponentSpec, OnProgress, DiskCache | None], Any]] = {
    "transformer": load_transformer,
    "text_encoder": load_text_encoder,
    "vae": load_vae,
}


def _build_diffusers(model_class: Any, spec: ComponentSpec) -> Any:
    config = _config_of(spec.checkpoint.component(spec.role), model_class.__name__)
    with init_empty_weights():
        return model_class.from_config(config)


def _config_of(component: Component, expected: str) -> dict[str, Any]:
    config = component.config()
    found = config.get("_class_name") or (config.get("architectures") or [None])[0]
    if found != expected:
        raise CheckpointError(
            f"{component.folder} holds a {found}, not a {expected}. Download the checkpoint again."
        )
    return config


def _fill(
    model: torch.nn.Module, spec: ComponentSpec, on_progress: OnProgress, cache: DiskCache | None
) -> str:
    """Give a model on meta its weights in their final form on its device, from the cache if kept there.

    Returns the kernels its layers chose, in words.
    """
    prepare_layers(model, spec.role, spec.precision)
    name = _cache_name(spec)
    kept = cache.find(name) if cache and name else None
    if kept is not None:
        try:
            with contextlib.closing(_kept_tensors(kept, spec)) as tensors:
                total = sum(map(stored_bytes, read_header(kept).values()))
                _fill_from(model, spec, tensors, total, on_progress, None)
            return _finish(model, spec)
        except CheckpointError as error:
            log.warning("the cached weights are damaged and made again (%s)", error)
    component = spec.checkpoint.component(spec.role)
    stored = {model_name(spec.role, name): info for name, info in component.stored().items()}
    stored.pop(None, None)
    writer = cache.create(name, _layout(model, spec, stored)) if cache and name else None
    total = sum(map(stored_bytes, stored.values()))
    try:
        _fill_from(model, spec, _renamed_tensors(component, spec), total, on_progress, writer)
        if writer is not None:
            writer.finish()
    finally:
        if writer is not None:
            writer.abandon()
    return _finish(model, spec)


def _cache_name(spec: ComponentSpec) -> str | None:
    """The cache file of a component at a precision, None where nothing is kept of it."""
    cached_as = FORMATS[spec.precision.format].cached_as if spec.precision.format else None
    if cached_as is None:
        return None
    compute = str(spec.math).removeprefix("torch.")
    return f"{spec.checkpoint.name}-{spec.role}-{cached_as}-{compute}-{spec.identity}"


def _layout(model: torch.nn.Module, spec: ComponentSpec, stored: Mapping[str | None, Any]) -> Layout:
    """What the filled model holds. stored: the checkpoint's tensors by their names in the model."""
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            layout |= {f"{path}.{name}": described for name, described in module.layout().items()}
    for name, parameter in model.named_parameters():
        owner, _, attribute = name.rpartition(".")
        dtype = spec.precision.storage if is_stored(model.get_submodule(owner), attribute) else spec.math
        if name in stored:
            layout[name] = (dtype or DTYPES[stored[name]["dtype"]], tuple(parameter.shape))
    return layout


def _renamed_tensors(component: Component, spec: ComponentSpec) -> Iterator[tuple[str, str, torch.Tensor]]:
    for stored, tensor in component.tensors(
        lambda stored: model_name(spec.role, stored) is not None, spec.device
    ):
        name = model_name(spec.role, stored)
        assert name is not None
        yield stored, name, tensor.to(spec.device, copy=True)


def _kept_tensors(path: Path, spec: ComponentSpec) -> Generator[tuple[str, str, torch.Tensor], None, None]:
    for name, tensor in read_tensors(path, borrowed_for=spec.device):
        yield name, name, tensor.to(spec.device, copy=True)


def _fill_from(
    model: torch.nn.Module,
    spec: ComponentSpec,
    tensors: Iterator[tuple[str, str, torch.Tensor]],
    total: int,
    on_progress: OnProgress,
    writer: CacheWriter | None,
) -> None:
    """Put (stored name, name, tensor on the device) after tensor into the model, and what became of them into
    the writer.

    Raises CheckpointError for a tensor of another shape, one too many or one missing.
    """
    folder = spec.checkpoint.folder / spec.role
    modules = dict(model.named_modules())
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for path, module in modules.items():
        if isinstance(module, QuantizedLinear):
            wanted[f"{path}.weight"] = (module.out_features, module.in_features)
            wanted |= {f"{path}.{name}": shape for name, (_, shape) in module.layout().items()}
    done = 0
    for stored, name, tensor in tensors:
        done += tensor.nbytes
        if name not in wanted:
            raise CheckpointError(f"{folder} has a tensor this model does not know: {stored}.")
        if tuple(tensor.shape) != wanted[name]:
            raise CheckpointError(
                f"{folder}: {stored} is {tuple(tensor.shape)}, its config.json says {wanted[name]}."
            )
        path, _, attribute = name.rpartition(".")
        owner = modules[path]
        filled = [attribute]
        if isinstance(owner, QuantizedLinear) and owner.layout().get(attribute, (None,))[0] == tensor.dtype:
            owner.restore(attribute, tensor)
        elif isinstance(owner, QuantizedLinear) and attribute == "weight":
            owner.set_weight(tensor)
            filled = list(owner.layout()) or filled
        else:
            dtype = spec.precision.storage if is_stored(owner, attribute) else spec.math
            set_module_tensor_to_device(
                model, name, spec.device, value=tensor, dtype=dtype or tensor.dtype, clear_cache=False
            )
        for part in filled:
            del wanted[f"{path}.{part}"]
            if writer is not None:
                writer.write(f"{path}.{part}", getattr(owner, part))
        on_progress(done, total)
    if wanted:
        raise CheckpointError(
            f"{folder} lacks {len(wanted)} of the model's tensors, the first being {next(iter(wanted))}. "
            "Download the folder again."
        )


def _finish(model: torch.nn.Module, spec: ComponentSpec) -> str:
    """Move what is no weight, and let layers test what the device can do; log their choices in one line."""
    for name, buffer in model.named_buffers():
        if buffer.device != spec.device:
            set_module_tensor_to_device(model, name, spec.device, value=buffer, clear_cache=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    chosen = [module.prepare() for module in model.modules() if isinstance(module, QuantizedLinear)]
    arithmetic = ", ".join(sorted({report for report in chosen if report}))
    if arithmetic:
        log.info("%s: %s", spec, arithmetic)
    return arithmetic
