"""Load a component: build its model on torch's meta device, then fill it on the replica's device."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import transformers
from accelerate import init_empty_weights

from ..arithmetic import exact_fp32
from ..cards.kernels import as_current
from ..errors import CheckpointError
from ..files.cache import DiskCache
from ..files.checkpoint import Component
from ..files.configs import copy_files, read_json
from ..progress import OnProgress, ignore_progress
from ..weights.components import ComponentSpec, Replica
from ..weights.filling import cache_name, fill, fill_from
from ..weights.layers import keep_single_frames
from .config import TransformerConfig
from .modulation import Modulation
from .text import PROMPT_TEMPLATE, PROMPT_TEMPLATE_TOKENS, TextEncoder
from .transformer import QwenImageTransformer, Transformer
from .vae import VAE

TRANSFORMERS_4 = transformers.__version__.startswith("4.")
KNOWN_WORD = "Describe"  # in the template, so the right tokenizer has tokens for it


@exact_fp32()
def load(
    replica: Replica,
    on_progress: OnProgress = ignore_progress,
    cache: DiskCache | None = None,
    source: Any = None,
) -> Any:
    """Load a component onto the replica's device.

    Returns a Transformer, a TextEncoder or a VAE, in evaluation mode. cache: for quantised weights and
    modulation. source: the same transformer on another card, to copy instead of reading files. on_progress:
    may raise, to cancel. Raises CheckpointError for files that are missing, truncated, of another model or
    changed.
    """
    replica.spec.require_unchanged()
    with as_current(replica.device):  # layers choose kernels on the current device
        if source is not None:
            component = copy_transformer(replica, source, cache)
        else:
            component = LOADERS[replica.spec.role](replica, on_progress, cache)
    replica.spec.require_unchanged()
    return component


def mark_used(spec: ComponentSpec, cache: DiskCache) -> None:
    """Mark the cached copy of weights in memory as used. Otherwise it would be deleted first."""
    if name := cache_name(spec):
        cache.find(name)


def load_transformer(replica: Replica, on_progress: OnProgress, cache: DiskCache | None) -> Transformer:
    model = _empty_transformer(replica)
    arithmetic = fill(model, replica, on_progress, cache)
    return Transformer(replica, model.eval(), Modulation(replica, model.config, cache), arithmetic)


def copy_transformer(replica: Replica, source: Transformer, cache: DiskCache | None) -> Transformer:
    """The same transformer on another card."""
    model = _empty_transformer(replica)
    arithmetic = fill_from(model, source.model, replica)
    modulation = Modulation(replica, model.config, cache, source.modulation)
    return Transformer(replica, model.eval(), modulation, arithmetic)


def _empty_transformer(replica: Replica) -> QwenImageTransformer:
    config = TransformerConfig.of(replica.spec.checkpoint.component("transformer").config())
    with init_empty_weights():
        return QwenImageTransformer(config, replica.spec.held)


def load_vae(replica: Replica, on_progress: OnProgress, cache: DiskCache | None) -> VAE:
    component = replica.spec.checkpoint.component("vae")
    config = component.config()
    with _config_errors(component), init_empty_weights():
        model = diffusers.AutoencoderKLQwenImage.from_config(config)
    fill(model, replica, on_progress)
    keep_single_frames(model)
    return VAE(replica, model.eval())


def load_text_encoder(replica: Replica, on_progress: OnProgress, cache: DiskCache | None) -> TextEncoder:
    checkpoint = replica.spec.checkpoint
    component = checkpoint.component("text_encoder")
    config = _text_encoder_config(component)
    beside = checkpoint.component("processor")
    with beside.readable() as folder:
        processor = _load_processor(folder)
    _require_matching_processor(processor, config, beside.path)
    with _config_errors(component), init_empty_weights():
        model = transformers.Qwen2_5_VLModel(config)
    fill(model, replica, on_progress, cache)
    return TextEncoder(replica, model.eval(), processor)


def _text_encoder_config(component: Component) -> transformers.Qwen2_5_VLConfig:
    content = component.config()
    text = content.get("text_config") or content  # the oldest checkpoints have no text_config
    rope = text.get("rope_parameters")  # the name in transformers 5
    if TRANSFORMERS_4 and isinstance(rope, dict) and not text.get("rope_scaling"):
        text["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        text["rope_theta"] = rope.get("rope_theta", 1e6)
    with _config_errors(component):
        return transformers.Qwen2_5_VLConfig.from_dict(content)


def _load_processor(folder: Path) -> transformers.Qwen2VLProcessor:
    # transformers 5 writes these as a list, which 4.57 cannot read. The tokenizer's own file has them too.
    options: dict[str, Any] = {"extra_special_tokens": {}} if TRANSFORMERS_4 else {}
    try:
        with _without_byte_order_marks(folder) as readable:
            return transformers.Qwen2VLProcessor.from_pretrained(readable, local_files_only=True, **options)
    except Exception as error:  # damaged files raise many types in the two libraries
        raise CheckpointError(f"{folder} cannot be read ({error}). Download this folder again.") from error


@contextlib.contextmanager
def _without_byte_order_marks(folder: Path) -> Iterator[Path]:
    """The folder or, if a JSON file of it has a byte order mark, a temporary copy without the marks.

    The libraries cannot read such marks. Raises CheckpointError for a file that is not JSON.
    """
    contents = {path: read_json(path) for path in sorted(folder.glob("[!.]*.json"))}
    marked = [path for path in contents if path.read_bytes()[:2] in (b"\xef\xbb", b"\xff\xfe", b"\xfe\xff")]
    if not marked:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        copy = copy_files(folder, Path(temporary, folder.name))
        for path in marked:
            (copy / path.name).write_text(json.dumps(contents[path]), encoding="utf-8")
        yield copy


def _require_matching_processor(
    processor: transformers.Qwen2VLProcessor, config: transformers.Qwen2_5_VLConfig, folder: Path
) -> None:
    """Raise CheckpointError unless the processor belongs to this text encoder.

    Without a vocabulary, transformers loads a tokenizer that knows no words, and raises nothing.
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
def _config_errors(component: Component) -> Iterator[None]:
    """Turn a library's error about a config into a CheckpointError that names the config.json."""
    try:
        yield
    except Exception as error:  # the libraries raise many types
        raise CheckpointError(
            f"{component.path}: its configuration does not describe a model that can be built ({error}). "
            "Download this file again."
        ) from error


LOADERS: dict[str, Callable[[Replica, OnProgress, DiskCache | None], Any]] = {
    "transformer": load_transformer,
    "text_encoder": load_text_encoder,
    "vae": load_vae,
}
