"""Pictures are checked when they come in, and the VAE's faster ways to compute are exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import replica_for
from diffusers import AutoencoderKLQwenImage
from engine.errors import InputError, NonFiniteError
from engine.files.checkpoint import Checkpoint
from engine.images import to_pil
from engine.models import loading, vae
from engine.weights.estimates import decode_bytes
from engine.weights.room import DoesNotFitError
from PIL import Image


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grey_rgb_and_rgba_become_rgb(channels: int) -> None:
    (picture,) = to_pil([torch.full((1, 4, 6, channels), 0.5)])
    assert picture.mode == "RGB" and picture.size == (6, 4)
    assert picture.getpixel((0, 0)) == (128, 128, 128)


def test_batches_count_as_several_pictures_in_order() -> None:
    pictures = to_pil([torch.zeros(2, 4, 4, 3), torch.ones(4, 4, 3)])
    assert [picture.getpixel((0, 0))[0] for picture in pictures] == [0, 0, 255]


def test_eight_bit_pictures_come_through_unchanged() -> None:
    values = torch.arange(256, dtype=torch.float32).view(16, 16, 1).expand(16, 16, 3) / 255
    (picture,) = to_pil([values])
    assert [picture.getpixel((x, y))[0] for y in range(16) for x in range(16)] == list(range(256))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((1, 4, 4, 3), float("nan")), "Picture 1 holds NaN"),
        (torch.ones(1, 4, 4, 2), r"Picture 1 has shape \(4, 4, 2\)"),
        (torch.ones(1, 0, 4, 3), "Picture 1 has shape"),
        (torch.ones(1, 8000, 1, 3), "Picture 1 is 1x8000: more than 16 times"),
    ],
)
def test_unusable_pictures_are_named(image: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_pil([image])


@pytest.mark.parametrize("size", [(1, 1), (8000, 6000), (3, 48)])
def test_extreme_sizes_become_a_reference_of_the_asked_area(tiny: Checkpoint, size: tuple[int, int]) -> None:
    autoencoder = loading.load(replica_for(tiny, "vae"))
    latent = vae.encode_reference(autoencoder, Image.new("RGB", size, "red"), 0.02)
    pixels = latent.shape[-1] * latent.shape[-2] * 64
    assert 0.5 < pixels / (0.02 * 1024 * 1024) < 2
    assert latent.shape[-1] % 4 == 0 and latent.shape[-2] % 4 == 0


def test_single_frame_convolutions_equal_the_causal_ones(tiny: Checkpoint) -> None:
    original = AutoencoderKLQwenImage.from_pretrained(tiny.folder / "vae").to(torch.float32)
    ours = loading.load(replica_for(tiny, "vae"))
    latents = torch.randn(1, 16, 1, 8, 12)
    with torch.inference_mode():
        expected = original.decode(latents).sample[:, :, 0].movedim(1, -1).add(1).div(2).clamp(0, 1)
        assert torch.allclose(vae.decode(ours, latents, "whole"), expected, atol=1e-5)
    stored = sum(parameter.numel() for parameter in original.parameters())
    assert sum(parameter.numel() for parameter in ours.model.parameters()) < 0.45 * stored


@pytest.mark.parametrize("size", [(80, 40), (41, 97), (100, 100)])
def test_tiles_equal_the_whole(tiny: Checkpoint, size: tuple[int, int]) -> None:
    autoencoder = loading.load(replica_for(tiny, "vae"))
    latents = torch.randn(1, 16, *size)
    whole = vae.decode(autoencoder, latents, "whole")
    tiled = vae.decode(autoencoder, latents, "tiled")
    assert whole.shape == tiled.shape == (1, 8 * size[0], 8 * size[1], 3)
    assert float((whole - tiled).abs().max()) < 1e-5


def test_a_smaller_halo_would_leave_seams(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles equal the whole because of the halo: with half of it they differ."""
    autoencoder = loading.load(replica_for(tiny, "vae"))
    latents = torch.randn(1, 16, 80, 40)
    whole = vae.decode(autoencoder, latents, "whole")
    monkeypatch.setattr(vae, "HALO", 6)
    assert float((whole - vae.decode(autoencoder, latents, "tiled")).abs().max()) > 1e-4


def test_auto_decodes_whole_where_it_fits_and_in_the_largest_tiles_that_do(tiny: Checkpoint) -> None:
    autoencoder = loading.load(replica_for(tiny, "vae"))
    seen: list[int] = []
    autoencoder.model.decoder.up_blocks[0].register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape[-1])
    )
    latents = torch.zeros(1, 16, 8, 120)
    for tile, windows in ((120, 1), (96, 2), (64, 3), (40, 7)):
        seen.clear()
        free = decode_bytes(tiny, torch.float32, 8, 120, tile)
        vae.decode(autoencoder, latents, "auto", free)
        assert (len(seen), max(seen) <= tile) == (windows, True)


def test_running_out_of_memory_retries_in_tiles_only_when_auto(
    tiny: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    autoencoder = loading.load(replica_for(tiny, "vae"))

    def small_memory(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if inputs[0].shape[-1] > 64:
            raise torch.OutOfMemoryError("no room")

    latents = torch.randn(2, 16, 8, 110)
    expected = vae.decode(autoencoder, latents, "whole")
    autoencoder.model.decoder.up_blocks[0].register_forward_pre_hook(small_memory)
    assert float((vae.decode(autoencoder, latents, "auto") - expected).abs().max()) < 1e-5
    assert caplog.text.count("is out of memory for tiles of 880 pixels") == 1  # not for each picture
    with pytest.raises(torch.OutOfMemoryError):
        vae.decode(autoencoder, latents, "whole")


def test_what_cannot_be_decoded_is_said_with_what_to_do(tiny: Checkpoint) -> None:
    replica = replica_for(tiny, "vae")
    vae.require_room_to_decode(replica, 512, 512, "auto", 2**30)
    with pytest.raises(
        DoesNotFitError, match=r"4096x4096 whole takes .* vae fp32 on cpu.*Set tiling to auto"
    ):
        vae.require_room_to_decode(replica, 512, 512, "whole", 2**30)
    with pytest.raises(DoesNotFitError, match=r"4096x4096 even in tiles .* Choose another device"):
        vae.require_room_to_decode(replica, 512, 512, "auto", 2**20)
    unfused = replace(replica, card=replace(replica.card, unfused=frozenset({("vae", torch.float32)})))
    with pytest.raises(DoesNotFitError, match=r"no fused attention kernel"):  # 512^4 scores, tiles or not
        vae.require_room_to_decode(unfused, 512, 512, "auto", 2**36)


def test_nan_never_becomes_a_picture(tiny: Checkpoint) -> None:
    autoencoder = loading.load(replica_for(tiny, "vae"))
    with pytest.raises(NonFiniteError, match="The latent to decode holds 1 NaN"):
        latents = torch.zeros(1, 16, 4, 4)
        latents[0, 0, 0, 0] = float("nan")
        vae.decode(autoencoder, latents)
    with pytest.raises(NonFiniteError, match=r"The picture being decoded.*vae fp32 on cpu"):
        vae.decode(autoencoder, torch.full((1, 16, 4, 4), 3e38))
