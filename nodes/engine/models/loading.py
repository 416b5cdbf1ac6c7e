"""From a spec to a component in memory: built empty, then filled tensor by tensor straight on its device.

Host memory stays small whatever the checkpoint's size: two tensors are in flight at a time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device

from ..arithmetic import exact_fp32
from ..errors import CheckpointError
from ..files.cache import CacheWriter, DiskCache
from ..files.checkpoint import DTYPES, Component, Layout, read_header, read_json, read_tensors, stored_bytes
from ..progress import OnProgress, ignore_progress
from ..weights.components import ComponentSpec, model_name
from ..weights.formats import FORMATS, QuantizedLinear
from ..weights.layers import is_stored, keep_single_frames, prepare_layers
from .config import TransformerConfig
from .modulation import Modulation
from .text import PROMPT_TEMPLATE, PROMPT_TEMPLATE_TOKENS, TextEncoder
from .transformer import QwenImageTransformer, Transformer

log = logging.getLogger("FireRed")

TRANSFORMERS_4 = transformers.__version__.startswith("4.")
KNOWN_WORD = "Describe"  # of the template: every tokenizer of this model has tokens for it


@exact_fp32()
def load(
    spec: ComponentSpec, on_progress: OnProgress = ignore_progress, cache: DiskCache | None = None
) -> Any:
    """Load the component that `spec` describes onto its device.

    Returns a Transformer, a TextEncoder or an AutoencoderKLQwenImage, in evaluation mode. cache: where
    quantised weights are kept, if anywhere. Raises CheckpointError for files that are missing, truncated or
    of another model. `on_progress` may raise to cancel.
    """
    spec.require_unchanged()
    component = LOADERS[spec.role](spec, on_progress, cache)
    spec.require_unchanged()
    return component


def mark_used(spec: ComponentSpec, cache: DiskCache) -> None:
    """Keep the copy of weights that are in use from becoming the oldest file: while they stay in memory
    nobody opens it.
    """
    if name := _cache_name(spec):
        cache.find(name)


def load_transformer(spec: ComponentSpec, on_progress: OnProgress, cache: DiskCache | None) -> Transformer:
    config = TransformerConfig.of(spec.checkpoint.component(spec.role).config())
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
    config = _text_encoder_config(component)
    folder = spec.checkpoint.component("processor").folder
    processor = _load_processor(folder)
    _require_this_models(processor, config, folder)
    with _described_by(component), init_empty_weights():
        model = transformers.Qwen2_5_VLModel(config)
    _fill(model, spec, on_progress, cache)
    return TextEncoder(model.eval(), processor, spec)


def _text_encoder_config(component: Component) -> transformers.Qwen2_5_VLConfig:
    content = component.config()
    text = content.get("text_config") or content  # flat in the oldest checkpoints
    rope = text.get("rope_parameters")  # as transformers 5 spells it
    if TRANSFORMERS_4 and isinstance(rope, dict) and not text.get("rope_scaling"):
        text["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        text["rope_theta"] = rope.get("rope_theta", 1e6)
    with _described_by(component):
        return transformers.Qwen2_5_VLConfig.from_dict(content)


def _load_processor(folder: Path) -> transformers.Qwen2VLProcessor:
    # transformers 5 stores these as a list, at which 4.57 stumbles; the tokenizer's own file has them too.
    options: dict[str, Any] = {"extra_special_tokens": {}} if TRANSFORMERS_4 else {}
    try:
        with _without_byte_order_marks(folder) as readable:
            return transformers.Qwen2VLProcessor.from_pretrained(readable, local_files_only=True, **options)
    except Exception as error:  # whatever a damaged file makes the two libraries raise
        raise CheckpointError(f"{folder} cannot be read ({error}). Download this folder again.") from error


@contextlib.contextmanager
def _without_byte_order_marks(folder: Path) -> Iterator[Path]:
    """The folder, or for as long as the block runs a copy whose JSON files the libraries can read too.

    Raises CheckpointError for a file that is not JSON.
    """
    contents = {path: read_json(path) for path in sorted(folder.glob("[!.]*.json"))}
    marked = [path for path in contents if path.read_bytes()[:2] in (b"\xef\xbb", b"\xff\xfe", b"\xfe\xff")]
    if not marked:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(shutil.copytree(folder, Path(temporary) / folder.name))
        for path in marked:
            (copy / path.name).write_text(json.dumps(contents[path]), encoding="utf-8")
        yield copy


def _require_this_models(
    processor: transformers.Qwen2VLProcessor, config: transformers.Qwen2_5_VLConfig, folder: Path
) -> None:
    """Raise CheckpointError unless the processor is the one that this text encoder was trained with.

    transformers takes a folder without its vocabulary for a tokenizer that knows no word.
    """
    tokenizer, images, vision = processor.tokenizer, processor.image_processor, config.vision_config
    words = tokenizer(KNOWN_WORD).input_ids
    template = tokenizer(PROMPT_TEMPLATE.partition("{}")[0]).input_ids
    found: dict[str, tuple[object, object]] = {
        f"tokens before the prompt ({KNOWN_WORD!r} has {len(words)})": (len(template), PROMPT_TEMPLATE_TOKENS)
    }
    for name in ("image", "video"):
        token = f"<|{name}_pad|>"
        expected = getattr(config, f"{name}_token_id")
        found[f"the number of the token {token}"] = (tokenizer.convert_tokens_to_ids(token), expected)
    for name in ("patch_size", "temporal_patch_size"):
        found[f"the image processor's {name}"] = (getattr(images, name), getattr(vision, name))
    found["the image processor's merge_size"] = (images.merge_size, vision.spatial_merge_size)
    for what, (here, expected) in found.items():
        if here != expected:
            raise CheckpointError(
                f"{folder} is not the processor of this text encoder, or its vocabulary is missing: {what} "
                f"is {here}, not {expected}. Download the {folder.name} folder of the same checkpoint again."
            )
    highest, words_known = max(tokenizer.get_vocab().values()), config.text_config.vocab_size
    if highest >= words_known:
        raise CheckpointError(
            f"{folder} is not the processor of this text encoder: it has a token {highest}, the text "
            f"encoder knows {words_known}. Download the {folder.name} folder of the same checkpoint again."
        )


@contextlib.contextmanager
def _described_by(component: Component) -> Iterator[None]:
    """Say which config.json it is that a library cannot build its model from."""
    try:
        yield
    except Exception as error:  # the libraries check values each in its own way
        raise CheckpointError(
            f"{component.folder / 'config.json'} does not describe a model that can be built ({error}). "
            "Download this file again."
        ) from error


LOADERS: dict[str, Callable[[ComponentSpec, OnProgress, DiskCache | None], Any]] = {
    "transformer": load_transformer,
    "text_encoder": load_text_encoder,
    "vae": load_vae,
}


def _build_diffusers(model_class: Any, spec: ComponentSpec) -> Any:
    component = spec.checkpoint.component(spec.role)
    config = component.config()
    with _described_by(component), init_empty_weights():
        return model_class.from_config(config)


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
        spec.require_unchanged()  # before what was made of the files is kept under their identity
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
