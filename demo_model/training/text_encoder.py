"""The demo model's tokenizer and text encoder: the tokens after a prompt tell what it asks for.

A Qwen2.5-VL of two narrow layers. Its vision tower stays random and adds next to nothing to the picture
tokens: the transformer sees the pictures themselves, as reference latents.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from engine.latents import dimensions_for_area
from engine.models.text import CONDITION_PIXELS, PICTURE_TEMPLATE, PROMPT_TEMPLATE, PROMPT_TEMPLATE_TOKENS
from instructions import COLOUR_NAMES, HELD_OUT, KINDS, Instruction, training_instructions
from PIL import Image
from tiny_checkpoint import (
    PRETOKENIZE,
    SPECIAL_TOKENS,
    randomize,
    rotary,
    save_text_encoder_config,
    save_tokenizer,
    special_token_ids,
)
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

WIDTH = 256
VOCABULARY = 1280
PIXELS = dict(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
READ_TOKENS = 5  # the template's after the prompt: <|im_end|>, newline, <|im_start|>, assistant, newline
VISION_GAIN = 0.02  # of the vision tower's last layer, beside 1 for the other random matrices
INSTRUCTIONS_SEED = 0
BATCH, LEARNING_RATE = 192, 2e-3


def config() -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=WIDTH // 64,
            num_key_value_heads=1,
            vocab_size=VOCABULARY,
            **rotary([8, 12, 12]),
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        ),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            num_heads=2,
            intermediate_size=64,
            out_hidden_size=WIDTH,
            fullatt_block_indexes=[1],
        ),
        **special_token_ids(),
        tie_word_embeddings=False,
    )


def build_tokenizer() -> Tokenizer:
    """A byte-level BPE after Qwen's special tokens, with a token for each word of the training prompts."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.decoder = normalizers.NFC(), decoders.ByteLevel()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    words = [instruction.text for instruction in training_instructions(INSTRUCTIONS_SEED)]
    template = PROMPT_TEMPLATE.replace("<|im_start|>", "").replace("<|im_end|>", "")
    bpe.train_from_iterator(
        [template] * 1000 + words,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            min_frequency=1,
            show_progress=False,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return bpe


def write_processor(checkpoint: Path) -> None:
    """The tokenizer and processor folders of a checkpoint."""
    tokenizer = build_tokenizer()
    for name in ("tokenizer", "processor"):
        save_tokenizer(tokenizer, checkpoint / name)
    Qwen2VLImageProcessor(**PIXELS).save_pretrained(checkpoint / "processor")
    Qwen2VLVideoProcessor(**PIXELS).save_pretrained(checkpoint / "processor")


def write(model: Qwen2_5_VLForConditionalGeneration, checkpoint: Path) -> None:
    """The text_encoder folder of a checkpoint, in BF16. The model's own dtype becomes that."""
    folder = checkpoint / "text_encoder"
    model.to(torch.bfloat16).save_pretrained(folder)
    save_text_encoder_config(model.config, folder)


class Probe(torch.nn.Module):
    """Reads kind and colour off a token, linearly, normed as the transformer does it first."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.RMSNorm(WIDTH)
        self.kind = torch.nn.modules.linear.Linear(WIDTH, len(KINDS))
        self.colour = torch.nn.modules.linear.Linear(WIDTH, len(COLOUR_NAMES) + 1)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed = self.norm(tokens)
        return self.kind(normed), self.colour(normed)


def train(checkpoint: Path, device: torch.device, seconds: float, report=print) -> None:
    """Train a text encoder and write it into the checkpoint, which has its processor already."""
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config())
    randomize(model, 0)
    probe = Probe().to(device)
    prepare_vision(model)
    model = model.to(device).train()
    processor = load_processor(checkpoint)
    known, unseen = training_instructions(INSTRUCTIONS_SEED), list(HELD_OUT)
    parameters = [p for n, p in model.named_parameters() if "visual" not in n] + list(probe.parameters())
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    picks = torch.tensor([1.0 / sum(k.kind == i.kind for k in known) for i in known])
    tokens = [processor.tokenizer(instruction.text).input_ids for instruction in known]
    started, step = time.monotonic(), 0
    while (done := (time.monotonic() - started) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 50) * (1 - 0.98 * done)
        chosen = torch.multinomial(picks, BATCH, replacement=True).tolist()
        ids, last = _without_pictures(processor, [tokens[n] for n in chosen], device)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        loss = _loss(probe, _read(hidden, last), [known[n] for n in chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            report(f"text encoder step {step} loss {loss.item():.4f}")
    write(model.eval(), checkpoint)
    encoder = Encoder.load(checkpoint, device)
    picture = Image.new("RGB", (300, 200), "gray")
    for name, instructions in (("training", known), ("held-out", unseen)):
        right = accuracy(encoder, probe.eval(), instructions, picture)
        report(f"text encoder, {name} wordings read right through the pipeline: {right:.1%}")


def prepare_vision(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Let every picture token be nearly the vector of <|image_pad|>, whatever the picture."""
    last = model.model.visual.merger.mlp[2]
    embedding = model.model.language_model.embed_tokens.weight
    with torch.no_grad():
        last.weight.mul_(VISION_GAIN)
        last.bias.copy_(embedding[model.config.image_token_id])


def _without_pictures(
    processor: Qwen2VLProcessor, prompts: list[list[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Template, some picture tokens and prompt, padded right: ids (B, L), and each one's last place (B,).

    How many picture tokens there are changes: a picture's rows and columns move what follows by less than
    their number.
    """
    before, after = PROMPT_TEMPLATE.split("{}")
    tokenizer = processor.tokenizer
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    rows = []
    for prompt in prompts:
        pictures = 1 + int(torch.rand(()) < 0.3)
        count = int(torch.randint(4, 40, ()))
        opening = "".join(PICTURE_TEMPLATE.format(n) for n in range(1, pictures + 1))
        ids = []
        for token in _cached(tokenizer, before + opening):
            ids += [pad] * count if token == pad else [token]
        rows.append(ids + prompt + _cached(tokenizer, after))
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, torch.tensor([len(row) - 1 for row in rows], device=device)


_known_ids: dict[str, list[int]] = {}


def _cached(tokenizer, text: str) -> list[int]:
    if text not in _known_ids:
        _known_ids[text] = tokenizer(text).input_ids
    return _known_ids[text]


def _read(hidden: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """The READ_TOKENS last tokens of every row, (B, READ_TOKENS, width)."""
    places = last[:, None] - torch.arange(READ_TOKENS - 1, -1, -1, device=last.device)
    return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))


def _loss(probe: Probe, tokens: torch.Tensor, instructions: list[Instruction]) -> torch.Tensor:
    kind = torch.tensor([KINDS.index(i.kind) for i in instructions], device=tokens.device)
    colour = torch.tensor([i.colour for i in instructions], device=tokens.device)
    kinds, colours = probe(tokens)
    repeated = tokens.shape[1]
    return F.cross_entropy(kinds.flatten(0, 1), kind.repeat_interleave(repeated)) + F.cross_entropy(
        colours.flatten(0, 1), colour.repeat_interleave(repeated)
    )


def load_processor(checkpoint: Path) -> Qwen2VLProcessor:
    return Qwen2VLProcessor.from_pretrained(checkpoint / "processor", local_files_only=True)


@dataclass(frozen=True)
class Encoder:
    """A written text encoder, embedding as the pipeline does, several prompts at a time."""

    model: Qwen2_5_VLForConditionalGeneration
    processor: Qwen2VLProcessor
    device: torch.device

    @classmethod
    def load(cls, checkpoint: Path, device: torch.device) -> Encoder:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            checkpoint / "text_encoder", dtype=torch.float32, local_files_only=True
        )
        return cls(model.to(device).eval(), load_processor(checkpoint), device)

    @torch.inference_mode()
    def embed(self, prompts: list[str], pictures: list[Image.Image]) -> list[torch.Tensor]:
        """(L, width) for each prompt about these pictures, without the template's part."""
        shown = [_as_seen(picture) for picture in pictures]
        opening = "".join(PICTURE_TEMPLATE.format(n) for n in range(1, len(pictures) + 1))
        inputs = self.processor(
            text=[PROMPT_TEMPLATE.format(opening + prompt) for prompt in prompts],
            images=shown * len(prompts),
            padding=True,
            padding_side="right",
            return_tensors="pt",
        ).to(self.device)
        hidden = self.model.model(**inputs, use_cache=False).last_hidden_state
        lengths = inputs["attention_mask"].sum(1).tolist()
        return [row[PROMPT_TEMPLATE_TOKENS:length] for row, length in zip(hidden, lengths, strict=True)]

    def picture_tokens(self, pictures: list[Image.Image]) -> int:
        """How many tokens an embedding has before the prompt's own."""
        (embedded,) = self.embed([""], pictures)
        return len(embedded) - READ_TOKENS


def _as_seen(picture: Image.Image) -> Image.Image:
    width, height = dimensions_for_area(CONDITION_PIXELS, picture.width / picture.height)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


@torch.inference_mode()
def accuracy(
    encoder: Encoder, probe: Probe, instructions: list[Instruction], picture: Image.Image, batch: int = 32
) -> float:
    """The share of instructions of which every read token tells both kind and colour."""
    right = 0
    for start in range(0, len(instructions), batch):
        part = instructions[start : start + batch]
        embedded = encoder.embed([instruction.text for instruction in part], [picture])
        kinds, colours = probe(torch.stack([row[-READ_TOKENS:] for row in embedded]))
        for n, instruction in enumerate(part):
            kind_right = bool((kinds[n].argmax(-1) == KINDS.index(instruction.kind)).all())
            right += kind_right and bool((colours[n].argmax(-1) == instruction.colour).all())
    return right / len(instructions)
