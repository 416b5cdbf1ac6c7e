"""The text encoder: its loader, and prompt and pictures to embeddings.

They are the embeddings of diffusers' QwenImageEditPlusPipeline.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from PIL import Image

from ..arithmetic import exact_fp32
from ..cards.kernels import as_current
from ..errors import CheckpointError, InputError
from ..files.cache import DiskCache
from ..files.checkpoint import Component
from ..files.configs import copy_files, read_json
from ..latents import dimensions_for_area
from ..limits import require_text
from ..progress import OnProgress
from ..weights.components import Replica
from ..weights.filling import fill
from .config import config_errors
from .guard import STOP, Guard

TRANSFORMERS_4 = transformers.__version__.startswith("4.")
# Source of the template, its token count and the picture's size: diffusers' pipeline_qwenimage_edit_plus.py.
PROMPT_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a "
    "new image that meets the user's requirements while maintaining consistency with the original input "
    "where appropriate.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
PROMPT_TEMPLATE_TOKENS = 64  # before the user's text; dropped from the embeddings
KNOWN_WORD = "Describe"  # in the template, so the right tokenizer has tokens for it
PICTURE_TEMPLATE = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"
CONDITION_PIXELS = 384 * 384  # about the size at which the text encoder sees a picture
MAX_PROMPT_TOKENS = 1024  # of the user's text; diffusers' limit for this model


@dataclass(frozen=True)
class TextEncoder:
    """Qwen2.5-VL without its output head, and the processor of its text and pictures."""

    replica: Replica
    model: transformers.Qwen2_5_VLModel
    processor: transformers.Qwen2VLProcessor

    @torch.inference_mode()
    @exact_fp32()
    def encode(
        self,
        prompt: str,
        pictures: Sequence[Image.Image],
        what: str = "The prompt",
        guard: str = STOP,
    ) -> torch.Tensor:
        """Embed a prompt with its pictures: (1, L, width) FP32 on the encoder's device.

        The template's tokens are dropped. what: the prompt's name for errors. guard: what to do about NaN and
        infinity, one of guard.GUARDS. Raises InputError as require_prompt does, and NonFiniteError.
        """
        self.require_prompt(prompt, what)
        resized = [_resize(picture) for picture in pictures]
        numbered = "".join(PICTURE_TEMPLATE.format(number) for number in range(1, len(pictures) + 1))
        # In transformers 5 these include mm_token_type_ids. Without them, the model silently gives picture
        # tokens 1-D positions, see https://github.com/huggingface/diffusers/issues/14194.
        inputs = self.processor(
            text=[PROMPT_TEMPLATE.format(numbered + prompt)],
            images=resized or None,
            padding=True,
            return_tensors="pt",
        ).to(self.replica.device)

        def embed() -> torch.Tensor:
            hidden_states = self.model(**inputs, use_cache=False).last_hidden_state
            return hidden_states[:, PROMPT_TEMPLATE_TOKENS:].float()

        with as_current(self.replica.device):
            return Guard(self.replica, guard).run(embed, f"{what}'s embedding", self.model)

    def require_prompt(self, prompt: str, what: str) -> None:
        """Raise InputError for a prompt that is too long or holds one of the model's special tokens."""
        tokenizer = self.processor.tokenizer
        reserved = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        used = [token for token in reserved if token in require_text(prompt, what)]
        if used:
            raise InputError(
                f"{what} holds {' and '.join(used)}, which the model keeps for itself. Take it out: pictures "
                "are added by the node, and a prompt calls them Picture 1, Picture 2 and so on."
            )
        tokens = len(tokenizer(prompt).input_ids)
        if tokens > MAX_PROMPT_TOKENS:
            raise InputError(f"{what} has {tokens} tokens, the model takes {MAX_PROMPT_TOKENS}. Shorten it.")


def _resize(picture: Image.Image) -> Image.Image:
    width, height = dimensions_for_area(CONDITION_PIXELS, picture.width / picture.height)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def load_text_encoder(replica: Replica, on_progress: OnProgress, cache: DiskCache | None) -> TextEncoder:
    checkpoint = replica.spec.checkpoint
    component = checkpoint.component("text_encoder")
    config = _text_encoder_config(component)
    beside = checkpoint.component("processor")
    with beside.readable() as folder:
        processor = _load_processor(folder)
    _require_matching_processor(processor, config, beside.path)
    with config_errors(component), init_empty_weights():
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
    with config_errors(component):
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
