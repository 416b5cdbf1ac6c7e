"""The built-in model edits photographs as it is told, by the real engine on the CPU."""

from __future__ import annotations

import colorsys
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import replica_for
from engine.files.checkpoint import open_checkpoint
from engine.models import loading, vae
from engine.sampling.conditioning import NEGATIVE, POSITIVE, to_conditioning
from engine.sampling.sampling import prepare_run, read_conditions, sample
from PIL import Image, ImageEnhance
from prompts import succeed

from launcher.client import Client
from launcher.demo import demo_prompt
from launcher.folders import ROOT

DEMO = open_checkpoint(ROOT / "demo_model" / "FireRed-Demo")
PHOTOS = ROOT / "demo_model" / "training" / "photos"
WIDTH, HEIGHT, MEGAPIXELS, STEPS, CFG = 448, 288, 0.12, 8, 4.0
MAX_BYTES = 32e6


def cat() -> Image.Image:
    """A cat that was trained on, darker and less colourful than it ever was there."""
    photo = ImageEnhance.Brightness(Image.open(PHOTOS / "cat_gaze.jpg").convert("RGB")).enhance(0.9)
    return ImageEnhance.Color(photo).enhance(0.85).resize((640, 411))


def street() -> Image.Image:
    """A photograph that was not trained on."""
    return Image.open(PHOTOS / "taxis.jpg").convert("RGB").resize((640, 411))


PICTURES = {"cat": cat, "street": street}


@cache
def models() -> dict[str, object]:
    return {role: loading.load(replica_for(DEMO, role)) for role in ("text_encoder", "vae", "transformer")}


@cache
def edited(instruction: str, name: str, second: str | None = None, cfg: float = CFG) -> torch.Tensor:
    """The edit, (h, w, 3), 0 to 1. second: the colour of a second picture."""
    encoder, autoencoder, transformer = models().values()
    photos = [PICTURES[name](), *([] if second is None else [Image.new("RGB", (640, 411), second)])]
    references = [vae.encode_reference(autoencoder, photo, MEGAPIXELS) for photo in photos]
    embeds = {POSITIVE: encoder.encode(instruction, photos), NEGATIVE: encoder.encode(" ", photos)}
    statistics = DEMO.latent_statistics()
    given = {
        branch: to_conditioning(embed, references, photos[0].size, statistics)
        for branch, embed in embeds.items()
    }
    replica = transformer.replica
    run = prepare_run(
        replica,
        read_conditions(replica, given),
        steps=STEPS,
        true_cfg_scale=cfg,
        width=WIDTH,
        height=HEIGHT,
        seed=0,
    )
    return vae.decode(autoencoder, sample(transformer, run), "whole")[0]


@cache
def through_the_vae(name: str) -> torch.Tensor:
    """The photo as the VAE alone gives it back: what an edit can keep at best."""
    autoencoder = models()["vae"]
    reference = vae.encode_reference(autoencoder, PICTURES[name](), MEGAPIXELS)
    return vae.decode(autoencoder, reference, "whole")[0]


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(-10 * torch.log10((one - other).square().mean()))


def saturation(pixels: torch.Tensor) -> float:
    return float((pixels.amax(-1) - pixels.amin(-1)).mean())


def brightness(pixels: torch.Tensor) -> float:
    return float(pixels.mean())


def warmth(pixels: torch.Tensor) -> float:
    return float((pixels[..., 0] - pixels[..., 2]).mean())


@pytest.mark.parametrize(
    ("instruction", "hue"),
    [
        ("Add a red hat on the cat", 0),
        ("Put a blue hat on the cat's head", 220),
        ("Give it a green hat", 135),
    ],
)
def test_the_cat_gets_the_hat_that_was_asked_for(instruction: str, hue: float) -> None:
    """In its colour, on the head, and nothing else changes."""
    photo, result = through_the_vae("cat"), edited(instruction, "cat")
    changed = (result - photo).abs().mean(-1) > 0.15
    rows, columns = changed.nonzero(as_tuple=True)
    share = float(changed.float().mean())
    assert 0.02 < share < 0.2
    assert float((rows < 0.45 * HEIGHT).float().mean()) > 0.95
    assert 0.2 * WIDTH < float(columns.float().median()) < 0.7 * WIDTH
    colour = colorsys.rgb_to_hsv(*result[changed].median(0).values.tolist())
    assert abs((colour[0] * 360 - hue + 180) % 360 - 180) < 25 and colour[1] > 0.5
    assert psnr(result[~changed], photo[~changed]) > 27


@pytest.mark.parametrize("instruction", ["Make it black and white", "Turn the photo into black and white"])
def test_black_and_white_takes_the_colours_and_leaves_the_picture(instruction: str) -> None:
    photo, result = through_the_vae("street"), edited(instruction, "street")
    assert saturation(result) < 0.45 * saturation(photo)
    grey, was = result.mean(-1).flatten(), photo.mean(-1).flatten()
    assert float(torch.corrcoef(torch.stack([grey, was]))[0, 1]) > 0.9


def test_warmer_and_colder_go_apart() -> None:
    warm, cold = edited("Make it warmer", "street"), edited("Make it colder", "street")
    photo = through_the_vae("street")
    assert warmth(warm) - 0.03 > warmth(photo) > warmth(cold) + 0.03


def test_night_is_dark_and_blue() -> None:
    photo, result = through_the_vae("street"), edited("Turn day into night", "street")
    assert brightness(result) < 0.6 * brightness(photo) and warmth(result) < warmth(photo)


def test_a_pencil_drawing_is_bright_and_without_colour() -> None:
    photo, result = through_the_vae("cat"), edited("Make it a pencil drawing", "cat", cfg=CFG)
    assert brightness(result) > 1.3 * brightness(photo) and saturation(result) < 0.7 * saturation(photo)


@pytest.mark.parametrize("instruction", ["Remove the chair", "Write my name on the table"])
def test_an_instruction_that_it_does_not_know_changes_nothing(instruction: str) -> None:
    assert psnr(edited(instruction, "street"), through_the_vae("street")) > 32


def test_guidance_does_more_than_none_and_spoils_nothing() -> None:
    photo = through_the_vae("cat")
    weak, strong = (edited("Make it a pencil drawing", "cat", cfg=cfg) for cfg in (1.0, CFG))
    assert brightness(strong) - brightness(photo) > 1.3 * (brightness(weak) - brightness(photo)) > 0
    grey = edited("Make it black and white", "cat")
    assert saturation(grey) < 0.6 * saturation(photo)
    assert abs(brightness(grey) - brightness(photo)) < 0.1


def test_the_colours_of_a_second_picture() -> None:
    """A blue picture makes the street bluer than a red one does."""
    cold, warm = (
        edited("In the colours of picture 2", "street", second) for second in ("#1e3cbe", "#be3c1e")
    )
    assert warmth(warm) > warmth(cold) + 0.1


def test_the_folder_is_small_and_its_matrices_are_wide_enough_to_rotate() -> None:
    files = [path for path in DEMO.folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MAX_BYTES
    config = DEMO.component("transformer").config()
    assert config["num_attention_heads"] * config["attention_head_dim"] % 256 == 0
    card = (DEMO.folder / "README.md").read_text(encoding="utf-8")
    assert "This is **not** FireRed-Image-Edit" in card and "licences" in card


def test_the_shipped_prompt_runs_on_a_server_that_has_no_other_model(client: Client, work: Path) -> None:
    """With the photo that the pack itself brings, here at a quarter of the size and in few steps."""
    prompt = demo_prompt("FireRed-Demo", None)
    for node in prompt.values():
        if node["class_type"] == "FireRedSampler":
            node["inputs"] |= {"steps": 3, "width": 320}
        if node["class_type"] == "FireRedEncodePrompt":
            node["inputs"]["reference_megapixels"] = 0.06
    assert (work / "input" / "firered_cat.jpg").is_file()
    assert succeed(client, prompt).outputs


def test_the_built_in_model_is_the_last_choice(client: Client) -> None:
    loader = client.get("/object_info/FireRedLoadVAE")["FireRedLoadVAE"]
    choices = loader["input"]["required"]["checkpoint"][1]["options"]
    assert choices[-1] == "FireRed-Demo" and choices.count("FireRed-Demo") == 1 and len(choices) > 1
