"""The demo model's VAE: trained as 2-D convolutions, written as the 3-D ones that the class wants.

A single frame meets only the last time tap of a causal 3-D convolution, so the others stay zero.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageCausalConv3d,
    QwenImageRMS_norm,
    QwenImageUpsample,
)
from edits import KIND, EditMaker, kind_shares
from instructions import COLOUR_NAMES, NOTHING
from torch import autocast

CONFIG = dict(
    base_dim=24, z_dim=16, dim_mult=[1, 2, 3, 3], num_res_blocks=1, temperal_downsample=[False, True, True]
)
BATCH, SIDE = 32, 192  # crops a step, pixels a side
LEARNING_RATE = 2e-3
NOISE = 0.03  # added to latents while training, beside their own spread: the transformer is not exact either
SPREAD_WEIGHT = 1e-4  # keeps latents small


class Frame(torch.nn.Module):
    """A causal 3-D convolution for single frames."""

    def __init__(self, conv: QwenImageCausalConv3d):
        super().__init__()
        self.weight = torch.nn.Parameter(conv.weight[:, :, -1].clone())
        self.bias = conv.bias
        left, _, top, *_ = conv._padding
        self.padding, self.stride = (top, left), conv.stride[1:]

    def forward(self, x: torch.Tensor, *cache: object) -> torch.Tensor:
        return F.conv2d(x[:, :, 0], self.weight, self.bias, self.stride, self.padding).unsqueeze(2)


class ChannelNorm(torch.nn.Module):
    """QwenImageRMS_norm in a few kernels."""

    def __init__(self, norm: QwenImageRMS_norm):
        super().__init__()
        self.gamma, self.scale = norm.gamma, norm.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        return x * (self.scale / length.clamp_min(1e-6)).to(x.dtype) * self.gamma.to(x.dtype)


def for_training(child: torch.nn.Module) -> torch.nn.Module | None:
    """What stands in for a layer of the VAE while it learns from single frames, with the same parameters."""
    if isinstance(child, QwenImageCausalConv3d):
        return Frame(child)
    if isinstance(child, QwenImageRMS_norm):
        return ChannelNorm(child)
    if isinstance(child, QwenImageUpsample):
        return torch.nn.Upsample(scale_factor=2, mode="nearest-exact")  # without a detour through FP32
    return None


class Autoencoder(torch.nn.Module):
    """Pixels (B, 3, h, w) in 0..1 to latents (B, 16, h/8, w/8) of mean 0 and spread 1, and back."""

    def __init__(self):
        super().__init__()
        self.vae = AutoencoderKLQwenImage(**CONFIG)
        for module in list(self.vae.modules()):
            if hasattr(module, "time_conv"):
                del module.time_conv
            for name, child in list(module.named_children()):
                if (replacement := for_training(child)) is not None:
                    setattr(module, name, replacement)
        for name, parameter in self.vae.named_parameters():
            if name.endswith("weight"):
                torch.nn.init.normal_(parameter, 0, parameter[0].numel() ** -0.5)
        self.register_buffer("mean", torch.zeros(1, CONFIG["z_dim"], 1, 1))
        self.register_buffer("std", torch.ones(1, CONFIG["z_dim"], 1, 1))

    def encode_raw(self, pixels: torch.Tensor) -> torch.Tensor:
        moments = self.vae.quant_conv(self.vae.encoder((pixels * 2 - 1).unsqueeze(2)))
        return moments.chunk(2, 1)[0][:, :, 0]

    def decode_raw(self, raw: torch.Tensor) -> torch.Tensor:
        return self.vae.decoder(self.vae.post_quant_conv(raw.unsqueeze(2)))[:, :, 0] * 0.5 + 0.5

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return (self.encode_raw(pixels).float() - self.mean) / self.std

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decode_raw(latents * self.std + self.mean).clamp(0, 1)

    def write(self, checkpoint: Path) -> None:
        """The vae folder of a checkpoint, in BF16."""
        statistics = dict(latents_mean=self.mean.flatten().tolist(), latents_std=self.std.flatten().tolist())
        full, frames = AutoencoderKLQwenImage(**CONFIG, **statistics), self.vae.state_dict()
        weights = full.state_dict()
        for name, weight in weights.items():
            if name not in frames:  # across time
                weight.zero_()
            elif frames[name].ndim == weight.ndim:
                weight.copy_(frames[name])
            else:
                weight.zero_()
                weight[:, :, -1] = frames[name]
        full.load_state_dict(weights)
        full.to(torch.bfloat16).save_pretrained(checkpoint / "vae")


@dataclass
class Progress:
    """Of a training that can be cut: seconds spent and steps done."""

    seconds: float = 0.0
    step: int = 0


def psnr(first: torch.Tensor, second: torch.Tensor) -> float:
    """In decibels, of pixels in 0..1."""
    return -10 * math.log10(((first - second) ** 2).mean().item())


def any_views(maker: EditMaker, batch: int, size: tuple[int, int]) -> torch.Tensor:
    """(B, 3, h, w): what the VAE has to know, photographs and what edits make of them."""
    kinds = torch.multinomial(kind_shares(False), batch, replacement=True).to(maker.device)
    colours = torch.randint(len(COLOUR_NAMES), (batch,), device=maker.device)
    unchanged = torch.rand(batch, device=maker.device) < 0.4
    return maker.pairs(torch.where(unchanged, KIND[NOTHING], kinds), colours, size).target


def train(
    model: Autoencoder,
    maker: EditMaker,
    progress: Progress,
    seconds: float,
    deadline: float,
    save=lambda: None,
    report=print,
) -> bool:
    """Train until `seconds` were spent in all, or until `deadline` (time.monotonic); whether it is done."""
    device = maker.device
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.vae.parameters(),
        LEARNING_RATE,
        betas=(0.9, 0.98),
        weight_decay=1e-3,
        fused=device.type == "cuda",
    )
    restarted, last, saved = progress.step, time.monotonic(), time.monotonic()
    while progress.seconds < seconds and last < deadline:
        done = progress.seconds / seconds
        for group in optimizer.param_groups:
            warm = min(1, (progress.step - restarted + 1) / 100)
            group["lr"] = LEARNING_RATE * warm * min(1, 0.01 + 2 * (1 - done))
        pixels = any_views(maker, BATCH, (SIDE, SIDE))
        with autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            raw = model.encode_raw(pixels.contiguous(memory_format=torch.channels_last))
            noise = torch.randn_like(raw) * (NOISE * raw.detach().float().std((0, 2, 3), keepdim=True))
            decoded = model.decode_raw((raw + noise).to(raw.dtype))
        loss = reconstruction_loss(decoded.float(), pixels) + SPREAD_WEIGHT * raw.float().pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.vae.parameters(), 1.0)
        optimizer.step()
        progress.step += 1
        if progress.step % 10 == 0:
            loss.item()  # waits for the device, so that the clock is right
            now = time.monotonic()
            progress.seconds += now - last
            last = now
            if progress.step % 500 == 0:
                quality = psnr(decoded.float(), pixels)
                spent = f"{progress.seconds:.0f} s"
                report(f"vae step {progress.step} {spent} loss {loss:.4f} psnr {quality:.2f}")
            if now - saved > 60:
                measure(model, maker)
                save()
                saved = now
    measure(model, maker)
    save()
    return progress.seconds >= seconds


def reconstruction_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Of values and of what changes from a pixel to the next."""
    error = decoded - pixels
    across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
    edges = across.abs().mean() + down.abs().mean()
    return error.abs().mean() + 4 * error.pow(2).mean() + 0.4 * edges


@torch.no_grad()
def measure(model: Autoencoder, maker: EditMaker, batches: int = 8) -> None:
    """Set the latents' mean and spread."""
    raw = torch.cat([model.encode_raw(any_views(maker, BATCH, (SIDE, SIDE))).float() for _ in range(batches)])
    model.mean.copy_(raw.mean((0, 2, 3), keepdim=True))
    model.std.copy_(raw.std((0, 2, 3), keepdim=True))
