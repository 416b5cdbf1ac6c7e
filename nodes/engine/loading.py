"""From a spec to a component in memory: built empty, then filled tensor by tensor straight on its device.

Host memory stays small whatever the checkpoint's size: one memory-mapped tensor is in flight at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device

from .checkpoint import Component
from .components import ComponentSpec
from .errors import CheckpointError
from .layers import is_stored, keep_single_frames, prepare_layers
from .precision import Precision
from .text import TextEncoder

OnProgress = Callable[[int, int], None]  # bytes loaded so far, bytes in all
RenameKey = Callable[[str], str | None]  # a stored tensor's name in the model, or None to leave it out

# How transformers has stored Qwen2.5-VL over the years, as prefixes of its tensors' names; the language
# model's output head is left out because prompt embeddings are its input.
TEXT_ENCODER_PREFIXES = {
    "model.language_model.": "language_model.",
    "model.visual.": "visual.",
    "visual.": "visual.",
    "model.": "language_model.",
}


def load(spec: ComponentSpec, on_progress: OnProgress = lambda done, total: None) -> Any:
    """Load the component that `spec` describes onto its device.

    Returns a QwenImageTransformer2DModel, a TextEncoder or an AutoencoderKLQwenImage, in evaluation mode.
    Raises CheckpointError for files that are missing, truncated or of another model. `on_progress` may raise
    to cancel.
    """
    return LOADERS[spec.role](spec, on_progress)


def load_transformer(spec: ComponentSpec, on_progress: OnProgress) -> diffusers.QwenImageTransformer2DModel:
    return _load_diffusers(diffusers.QwenImageTransformer2DModel, spec, on_progress)


def load_vae(spec: ComponentSpec, on_progress: OnProgress) -> diffusers.AutoencoderKLQwenImage:
    vae = _load_diffusers(diffusers.AutoencoderKLQwenImage, spec, on_progress)
    keep_single_frames(vae)
    return vae


def load_text_encoder(spec: ComponentSpec, on_progress: OnProgress) -> TextEncoder:
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
    _fill(model, component, spec.precision, spec.device, _text_encoder_key, on_progress)
    return TextEncoder(model.eval(), processor, spec.device)


LOADERS: dict[str, Callable[[ComponentSpec, OnProgress], Any]] = {
    "transformer": load_transformer,
    "text_encoder": load_text_encoder,
    "vae": load_vae,
}


def _load_diffusers(model_class: Any, spec: ComponentSpec, on_progress: OnProgress) -> Any:
    component = spec.checkpoint.component(spec.role)
    config = _config_of(component, model_class.__name__)
    with init_empty_weights():
        model = model_class.from_config(config)
    _fill(model, component, spec.precision, spec.device, lambda name: name, on_progress)
    return model.eval()


def _config_of(component: Component, expected: str) -> dict[str, Any]:
    config = component.config()
    found = config.get("_class_name") or (config.get("architectures") or [None])[0]
    if found != expected:
        raise CheckpointError(
            f"{component.folder} holds a {found}, not a {expected}. Download the checkpoint again."
        )
    return config


def _text_encoder_key(stored: str) -> str | None:
    for old, new in TEXT_ENCODER_PREFIXES.items():
        if stored.startswith(old):
            return new + stored.removeprefix(old)
    return None


def _fill(
    model: torch.nn.Module,
    component: Component,
    precision: Precision,
    device: torch.device,
    rename: RenameKey,
    on_progress: OnProgress,
) -> None:
    """Put the component's tensors into a model on meta, each in its final dtype on its final device."""
    prepare_layers(model, precision)
    wanted = dict(model.named_parameters())
    modules = dict(model.named_modules())
    total = sum(shard.stat().st_size for shard in component.shards())
    done = 0
    for stored, tensor in component.tensors():
        done += tensor.nbytes
        name = rename(stored)
        if name is None:
            continue
        if name not in wanted:
            raise CheckpointError(f"{component.folder} has a tensor this model does not know: {stored}.")
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{component.folder}: {stored} is {tuple(tensor.shape)}, its config.json says "
                f"{tuple(wanted[name].shape)}."
            )
        owner, _, parameter = name.rpartition(".")
        dtype = precision.storage if is_stored(modules[owner], parameter) else precision.compute
        set_module_tensor_to_device(model, name, device, value=tensor, dtype=dtype or tensor.dtype)
        del wanted[name]
        on_progress(done, total)
    if wanted:
        raise CheckpointError(
            f"{component.folder} lacks {len(wanted)} of the model's tensors, the first being "
            f"{next(iter(wanted))}. "
            "Download the folder again."
        )
    for name, buffer in model.named_buffers():
        set_module_tensor_to_device(model, name, device, value=buffer)
    for parameter_ in model.parameters():
        parameter_.requires_grad_(False)
