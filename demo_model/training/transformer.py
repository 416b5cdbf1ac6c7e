"""The demo model's transformer: diffusers' class for parameters and files, a forward of its own to train."""

from __future__ import annotations

import functools
import math
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from autoencoder import Autoencoder, Progress
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
from edits import ANY_SHARE, KIND, EditMaker, kind_shares
from instructions import ANY, COLOUR_NAMES, HAT, Instruction
from muon import Muon
from text_encoder import READ_TOKENS, Encoder
from text_encoder import WIDTH as TEXT_WIDTH
from tiny_checkpoint import SCHEDULER_CONFIG
from torch import autocast
from torchvision.transforms.functional import to_pil_image

LAYERS, HEADS, HEAD_SIZE = 4, 4, 64
AXES = (16, 24, 24)  # of a head's channels: picture number, row, column
PATCH, VAE_SCALE, CHANNELS = 2, 8, 16
TOKEN_PIXELS = PATCH * VAE_SCALE
SHIFT = math.exp(0.55)  # of noise levels: what the scheduler's config makes of 256 to 1024 tokens
MUON_RATE = 4e-3  # of the blocks' matrices, by Muon
ADAM_RATE = 1e-3  # of all the rest
WEIGHT_DECAY = 0.01
TOKENS_A_STEP = 46_000  # of targets, references and text together
AVERAGE = 0.9993  # of the weights that are written, a step
# Rows and columns of tokens of a target, and how often a batch has them.
GRIDS = {
    (16, 16): 4, (20, 20): 3, (16, 24): 4, (24, 16): 3, (24, 24): 2, (21, 32): 2, (32, 24): 1, (32, 32): 2,
    (40, 40): 0.3,
}  # fmt: skip
OTHER_REFERENCE, SECOND_PICTURE = 0.25, 0.12  # shares of batches: another size of reference; two pictures
OTHER_REFERENCES = (0.5, 0.7, 0.85, 1.2, 1.5, 2.0)  # times a target's sides
AT_HAND, USES = 12, 3  # batches waiting, and how often each is used: making one costs as much as a step
MOST_SECONDS = 1.0  # that ten of the first 100 steps count as: compiling them is no training
PICTURES_A_GRID = 6  # different pictures whose tokens stand before the prompts'


def config(layers: int = LAYERS) -> dict[str, object]:
    return dict(
        patch_size=PATCH,
        in_channels=CHANNELS * PATCH**2,
        out_channels=CHANNELS,
        num_layers=layers,
        attention_head_dim=HEAD_SIZE,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=AXES,
    )


def build(layers: int = LAYERS) -> QwenImageTransformer2DModel:
    """A new transformer whose blocks do nothing yet: their gates and the last layer are zero."""
    model = QwenImageTransformer2DModel(**config(layers))
    for name, parameter in model.named_parameters():
        if "_mod.1" in name or "norm_out.linear" in name or "proj_out" in name:
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            torch.nn.init.xavier_uniform_(parameter)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return model


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, 16, h, w) to tokens (B, h/2 * w/2, 64)."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH**2)


@functools.cache
def rotary_table(
    grids: tuple[tuple[int, int], ...], text_tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (tokens, HEAD_SIZE / 2) of the text's tokens and then of the pictures'.

    Positions as QwenEmbedRope counts them: from each picture's middle, the text's after the largest.
    """
    parts = []
    start = max(max(rows // 2, columns // 2) for rows, columns in grids)
    parts.append((start + torch.arange(text_tokens))[:, None].expand(-1, 3))
    for number, (rows, columns) in enumerate(grids):
        row, column = (torch.arange(side) - (side - side // 2) for side in (rows, columns))
        parts.append(torch.cartesian_prod(torch.tensor([number]), row, column))
    positions = torch.cat(parts).float()
    angles = [
        torch.outer(positions[:, axis], 10_000.0 ** -(torch.arange(0, channels, 2) / channels))
        for axis, channels in enumerate(AXES)
    ]
    angle = torch.cat(angles, 1).to(device)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x (B, heads, tokens, HEAD_SIZE), its channels in pairs as complex numbers, turned."""
    cos, sin = rotary
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
    return turned.flatten(-2).to(x.dtype)


def run_block(
    block: torch.nn.Module,
    image: torch.Tensor,
    text: torch.Tensor,
    time_embedding: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """QwenImageTransformerBlock's forward for a batch of levels: image (B, I, width), text (B, T, width)."""
    attention, text_tokens = block.attn, text.shape[1]
    of_image = block.img_mod(time_embedding)[:, None].chunk(6, -1)
    of_text = block.txt_mod(time_embedding)[:, None].chunk(6, -1)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2)

    def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    pixels, words = modulate(image, *of_image[:2]), modulate(text, *of_text[:2])
    query_of_text = attention.norm_added_q(heads(attention.add_q_proj(words)))
    key_of_text = attention.norm_added_k(heads(attention.add_k_proj(words)))
    query = torch.cat([query_of_text, attention.norm_q(heads(attention.to_q(pixels)))], 2)
    key = torch.cat([key_of_text, attention.norm_k(heads(attention.to_k(pixels)))], 2)
    value = torch.cat([heads(attention.add_v_proj(words)), heads(attention.to_v(pixels))], 2)
    query, key = rotate(query, (cos, sin)).to(value.dtype), rotate(key, (cos, sin)).to(value.dtype)
    attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    image = image + of_image[2] * attention.to_out[0](attended[:, text_tokens:])
    text = text + of_text[2] * attention.to_add_out(attended[:, :text_tokens])
    image = image + of_image[5] * block.img_mlp(modulate(image, *of_image[3:5]))
    text = text + of_text[5] * block.txt_mlp(modulate(text, *of_text[3:5]))
    return image, text


class Velocity:
    """Predicts velocities with a transformer, a noise level for each sample of the batch."""

    def __init__(self, model: QwenImageTransformer2DModel, compiled: bool):
        self.model = model
        self.block = torch.compile(run_block, dynamic=True) if compiled else run_block

    def __call__(
        self, noisy: torch.Tensor, references: list[torch.Tensor], text: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        """noisy (B, 16, h, w), references likewise, text (B, T, width), sigma (B,), to tokens (B, I, 64)."""
        model, pictures = self.model, [noisy, *references]
        grids = tuple((latents.shape[-2] // PATCH, latents.shape[-1] // PATCH) for latents in pictures)
        targets = grids[0][0] * grids[0][1]
        cos, sin = rotary_table(grids, text.shape[1], noisy.device)
        embedder = model.time_text_embed.timestep_embedder
        waves = get_timestep_embedding(sigma, 256, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000)
        time_embedding = embedder.linear_2(F.silu(embedder.linear_1(waves)))
        image = model.img_in(torch.cat([pack(latents) for latents in pictures], 1)).float()
        text = model.txt_in(model.txt_norm(text)).float()
        for block in model.transformer_blocks:
            image, text = self.block(block, image, text, time_embedding, cos, sin)
        scale, shift = model.norm_out.linear(F.silu(time_embedding))[:, None].chunk(2, -1)
        normed = F.layer_norm(image[:, :targets], image.shape[-1:], eps=1e-6)
        return model.proj_out(normed * (1 + scale) + shift)


@dataclass(frozen=True)
class PromptBank:
    """Embeddings of all training prompts, for every shape of picture, and whose windows make a batch.

    A prompt's embedding is the pictures' tokens followed by its own. Batches take windows of one length:
    a longer prompt has a few picture tokens less before it.
    """

    instructions: list[Instruction]
    before: dict[tuple[tuple[int, int], int], torch.Tensor]  # (grid, pictures): (views, P, width)
    after: torch.Tensor  # (prompts, longest, width), padded right
    lengths: torch.Tensor  # (prompts,)
    shortest: int  # of the lengths

    @classmethod
    @torch.no_grad()
    def build(cls, encoder: Encoder, maker: EditMaker, instructions: list[Instruction]) -> PromptBank:
        before = {}
        for grid in GRIDS:
            size = (grid[0] * TOKEN_PIXELS, grid[1] * TOKEN_PIXELS)
            for pictures in (1, 2):
                rows = []
                for _ in range(PICTURES_A_GRID):
                    numbers = torch.randint(len(maker.bank.photos), (pictures,), device=maker.device)
                    seen = [to_pil_image(view.cpu()) for view in maker.views(numbers, size).pixels]
                    (embedded,) = encoder.embed([""], seen)
                    rows.append(embedded[:-READ_TOKENS])
                before[grid, pictures] = torch.stack(rows)
        first_photo = torch.zeros(1, dtype=torch.long, device=maker.device)
        seen = [to_pil_image(maker.views(first_photo, (384, 384)).pixels[0].cpu())]
        start, found = encoder.picture_tokens(seen), []
        for first in range(0, len(instructions), 64):
            texts = [instruction.text for instruction in instructions[first : first + 64]]
            found += [embedded[start:] for embedded in encoder.embed(texts, seen)]
        return cls(
            instructions,
            before,
            torch.nn.utils.rnn.pad_sequence(found, batch_first=True),
            torch.tensor([len(row) for row in found], device=maker.device),
            min(len(row) for row in found),
        )

    def batch(self, numbers: torch.Tensor, grid: tuple[int, int], pictures: int) -> torch.Tensor:
        """(B, P + shortest prompt, width)."""
        views = self.before[grid, pictures]
        chosen = views[torch.randint(len(views), (len(numbers),), device=views.device)]
        joined = torch.cat([chosen, self.after[numbers]], 1)
        places = torch.arange(views.shape[1] + self.shortest, device=views.device)
        places = places[None] + (self.lengths[numbers] - self.shortest)[:, None]
        return joined.gather(1, places[..., None].expand(-1, -1, joined.shape[-1]))


class PromptPicker:
    """Chooses prompts: a kind by its share, then one of its wordings."""

    def __init__(self, instructions: list[Instruction], device: torch.device):
        self.kinds = torch.tensor([KIND[i.kind] for i in instructions], device=device)
        self.colours = torch.tensor([i.colour for i in instructions], device=device)
        totals: Counter[str] = Counter()
        for instruction in instructions:
            totals[instruction.kind] += _wording_weight(instruction)
        weights = [_wording_weight(i) / totals[i.kind] for i in instructions]
        self.within = torch.tensor(weights, device=device)

    def pick(self, batch: int, second_picture: bool) -> torch.Tensor:
        shares = kind_shares(second_picture) * (1 - ANY_SHARE)
        shares[KIND[ANY]] = ANY_SHARE
        weights = self.within * shares.to(self.within.device)[self.kinds]
        return torch.multinomial(weights, batch, replacement=True)


def _wording_weight(instruction: Instruction) -> float:
    if instruction.kind == ANY:
        return 20.0 if instruction.text == " " else 1.0
    return 2.0 if instruction.kind == HAT and COLOUR_NAMES[instruction.colour] == "red" else 1.0


def noise_levels(batch: int, device: torch.device) -> torch.Tensor:
    """(B,) in 0..1, spread evenly and then shifted as the sampler's are."""
    even = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
    return SHIFT * even / (1 + (SHIFT - 1) * even)


def build_optimizers(model: QwenImageTransformer2DModel) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices but those of the modulation, AdamW for the rest."""
    named = list(model.named_parameters())
    in_blocks = [(name, p) for name, p in named if name.startswith("transformer_blocks.")]
    matrices = [p for name, p in in_blocks if p.ndim == 2 and "_mod." not in name]
    taken = set(map(id, matrices))
    others = [p for _, p in named if id(p) not in taken]
    adam = torch.optim.AdamW(
        others, ADAM_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=others[0].is_cuda
    )
    optimizers = [adam, Muon(matrices, MUON_RATE, WEIGHT_DECAY)]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    return optimizers


Batch = tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]  # clean latents, references, text


@dataclass
class Trainer:
    """The transformer's training: everything that a step needs, and its average weights."""

    model: QwenImageTransformer2DModel
    average: list[torch.Tensor]
    autoencoder: Autoencoder
    maker: EditMaker
    prompts: PromptBank
    compiled: bool

    def __post_init__(self):
        self.velocity = Velocity(self.model, self.compiled)
        self.picker = PromptPicker(self.prompts.instructions, self.maker.device)
        self.random = random.Random(0)
        self.at_hand: list[list] = []  # batches, and how often each will still be used

    def loss(self) -> torch.Tensor:
        """Of one batch: the mean squared error of velocities."""
        clean, references, text = self._next_batch()
        sigma, noise = noise_levels(len(clean), clean.device), torch.randn_like(clean)
        with self._autocast():
            noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
            predicted = self.velocity(noisy, references, text, sigma)
        return (predicted.float() - pack(noise - clean)).pow(2).mean()

    def _next_batch(self) -> Batch:
        """One of a few batches at hand: each is used several times, in random order and with other noise."""
        if len(self.at_hand) < AT_HAND:
            self.at_hand.append([self._make_batch(), USES])
        chosen = self.random.choice(self.at_hand)
        chosen[1] -= 1
        self.at_hand = [entry for entry in self.at_hand if entry[1] > 0]
        return chosen[0]

    @torch.no_grad()
    def _make_batch(self) -> Batch:
        grid = self.random.choices(list(GRIDS), list(GRIDS.values()))[0]
        second = self.random.random() < SECOND_PICTURE
        factor = self.random.choice(OTHER_REFERENCES) if self.random.random() < OTHER_REFERENCE else 1
        other = tuple(round(side * factor / 2) * 2 for side in grid) if factor != 1 else grid
        tokens = grid[0] * grid[1] + (1 + second) * (other[0] * other[1] + 200)
        numbers = self.picker.pick(max(2, TOKENS_A_STEP // tokens), second)
        size, reference_size = (tuple(side * TOKEN_PIXELS for side in g) for g in (grid, other))
        pairs = self.maker.pairs(
            self.picker.kinds[numbers], self.picker.colours[numbers], size, reference_size, second
        )
        with self._autocast():
            clean, *references = (self._encode(pixels) for pixels in (pairs.target, *pairs.references))
        return clean, references, self.prompts.batch(numbers, grid, 1 + second)

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.autoencoder.encode(pixels.contiguous(memory_format=torch.channels_last))

    def _autocast(self):
        kind = self.maker.device.type
        return autocast(kind, torch.bfloat16, enabled=kind == "cuda")

    def train(
        self, progress: Progress, seconds: float, deadline: float, save=lambda: None, report=print
    ) -> bool:
        """As autoencoder.train: whether it is done."""
        parameters = list(self.model.parameters())
        optimizers = build_optimizers(self.model)
        restarted, last, saved, losses = progress.step, time.monotonic(), time.monotonic(), []
        warm_up = 500 if restarted == 0 else 200
        while progress.seconds < seconds and last < deadline:
            done, since = progress.seconds / seconds, progress.step - restarted
            share = min(1, (since + 1) / warm_up) * min(1, 0.01 + 2.2 * (1 - done))
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = group["initial_lr"] * share
            loss = self.loss()
            self.model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            losses.append(loss.detach())
            with torch.no_grad():
                keep = min(AVERAGE, (progress.step + 1) / (progress.step + 20))
                torch._foreach_lerp_(self.average, [p.detach() for p in parameters], 1 - keep)
            progress.step += 1
            if progress.step % 10 == 0:
                loss.item()
                now = time.monotonic()
                progress.seconds += now - last if since > 100 else min(now - last, MOST_SECONDS)
                last = now
                if progress.step % 250 == 0:
                    mean = torch.stack(losses).mean().item()
                    report(f"transformer step {progress.step} {progress.seconds:.0f} s loss {mean:.4f}")
                    losses.clear()
                if now - saved > 60:
                    save()
                    saved = now
        save()
        return progress.seconds >= seconds


@torch.no_grad()
def write(average: list[torch.Tensor], layers: int, checkpoint: Path) -> None:
    """The transformer and scheduler folders of a checkpoint, in BF16."""
    model = QwenImageTransformer2DModel(**config(layers))
    for parameter, value in zip(model.parameters(), average, strict=True):
        parameter.copy_(value)
    torch.nn.Module.to(model, torch.bfloat16)  # diffusers' own `to` would warn of modules to be kept in FP32
    model.save_pretrained(checkpoint / "transformer", max_shard_size="10MB")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG).save_pretrained(checkpoint / "scheduler")
