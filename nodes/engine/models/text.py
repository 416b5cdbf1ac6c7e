"""The text encoder: prompt and pictures to the embeddings of diffusers' QwenImageEditPlusPipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from PIL import Image

from ..arithmetic import exact_fp32
from ..cards.kernels import as_current
from ..errors import InputError
from ..latents import dimensions_for_area
from ..limits import require_text
from ..weights.components import Replica
from .guard import STOP, Guard

# Source of the template, its token count and the picture's size: diffusers' pipeline_qwenimage_edit_plus.py.
PROMPT_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a "
    "new image that meets the user's requirements while maintaining consistency with the original input "
    "where appropriate.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
PROMPT_TEMPLATE_TOKENS = 64  # before the user's text; dropped from the embeddings
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
