"""An edit through a real ComfyUI: the API, the websocket, caches, devices and memory."""

from __future__ import annotations

import io
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import replica_for
from engine.files.checkpoint import open_checkpoint
from engine.images import to_pil
from engine.models import loading, vae
from engine.sampling import sampling
from engine.sampling.conditioning import NEGATIVE, POSITIVE, from_conditioning, to_conditioning
from PIL import Image
from prompts import (
    DECODE,
    ENCODE,
    LOADERS,
    PHOTO,
    SAMPLE,
    SAVE,
    changed,
    edit_prompt,
    keep_tensor,
    kept_tensor,
    succeed,
    with_node,
)

from launcher.client import Client
from launcher.folders import ROOT
from launcher.server import Server


def test_an_edit_makes_a_picture_of_the_asked_size(client: Client) -> None:
    run = succeed(client, changed(edit_prompt(), SAMPLE, width=96, height=64, seed=1))
    picture = Image.open(io.BytesIO(client.image(run.outputs[SAVE]["images"][0])))
    assert picture.size == (96, 64)
    assert picture.convert("L").getextrema()[0] != picture.convert("L").getextrema()[1]


def test_the_server_computes_what_the_engine_computes(client: Client, work: Path) -> None:
    prompt = keep_tensor(changed(edit_prompt(), SAMPLE, seed=2), [SAMPLE, 0], "latent")
    succeed(client, keep_tensor(keep_tensor(prompt, [DECODE, 0], "image"), [ENCODE, 0], "positive"))
    checkpoint = open_checkpoint(work / "models" / "diffusers" / "tiny")
    (picture,) = to_pil([torch.from_numpy(cat_pixels())])
    autoencoder, encoder = (loading.load(replica_for(checkpoint, role)) for role in ("vae", "text_encoder"))
    references = [vae.encode_reference(autoencoder, picture, 0.01)]
    conditions = {}
    for branch, text in ((POSITIVE, "Add a red hat on the cat"), (NEGATIVE, " ")):
        conditioning = to_conditioning(encoder.encode(text, [picture]), references, picture.size)
        conditions[branch] = from_conditioning(conditioning, branch, 128)
    transformer = replica_for(checkpoint, "transformer")
    plan = sampling.prepare_run(
        transformer, conditions, steps=2, true_cfg_scale=4.0, width=64, height=64, seed=2
    )
    latents = sampling.sample(loading.load(transformer), plan)
    kept = kept_tensor(work, "latent")["samples"]
    assert kept.dtype is torch.float32 and kept.shape == (1, 16, 1, 8, 8)
    assert torch.allclose(kept, latents, atol=1e-5)
    assert torch.allclose(kept_tensor(work, "image"), vae.decode(autoencoder, latents), atol=1e-5)
    ((embeds, extras),) = kept_tensor(work, "positive")
    assert (
        embeds.dtype is torch.float32
        and embeds.shape[2] == 128
        and set(extras) == {"reference_latents", "image_size", "latent_statistics"}
    )


def cat_pixels():
    import numpy as np

    return (
        np.asarray(Image.open(ROOT / "workflows/input/cat.png").convert("RGB"), dtype=np.float32)[None] / 255
    )


def test_every_step_is_reported_with_a_preview(client: Client) -> None:
    run = succeed(client, changed(edit_prompt(), SAMPLE, steps=4, seed=3, width=256, height=256))
    steps = [value for value, total in run.progress(SAMPLE) if total == 4]
    assert steps == [1, 2, 3, 4]
    assert run.previews >= 4


def test_a_cancelled_prompt_stops_at_the_step_and_the_next_one_runs(client: Client) -> None:
    long = changed(edit_prompt(), SAMPLE, steps=1000, seed=7)
    seen: list[int] = []

    def cancel(name: str, data: dict) -> None:
        if name == "progress" and data["node"] == SAMPLE and data["max"] == 1000:
            seen.append(data["value"])
            if len(seen) == 1:
                client.post("/interrupt")

    assert client.run(long, cancel).status == "interrupted"
    assert seen and seen[-1] < 500
    succeed(client, changed(edit_prompt(), SAMPLE, seed=8))


def test_only_what_changed_runs_again(client: Client) -> None:
    succeed(client, changed(edit_prompt(), SAMPLE, seed=4))
    again = succeed(client, changed(edit_prompt(), SAMPLE, seed=5))
    assert set(again.executed) == {SAMPLE, DECODE, SAVE}


def test_a_scheduler_edited_under_the_server_makes_a_new_picture(
    client: Client, server: Server, work: Path, tiny_folder: Path
) -> None:
    """The weights stay loaded, also if the checkpoint's name comes over a link."""
    folder = work / "models" / "diffusers" / "edited"
    shutil.copytree(tiny_folder, folder)
    prompt = keep_tensor(changed(edit_prompt("edited"), SAMPLE, resume="off"), [SAMPLE, 0], "latent")
    linked = with_node(prompt, "choice", "ProbeValue", json='"edited"')
    try:
        config = folder / "scheduler" / "scheduler_config.json"
        linked = changed(linked, "1", checkpoint=["choice", 0])
        pictures = []
        for shift, asked in ((0.9, prompt), (1.4, prompt), (1.4, linked), (0.9, linked)):
            shifts = {"max_shift": shift, "base_shift": shift}
            config.write_text(json.dumps(json.loads(config.read_text()) | shifts))
            loaded_before = server.text().count("transformer fp32 on cpu loaded")
            succeed(client, asked)
            pictures.append(kept_tensor(work, "latent")["samples"])
        first, second, third, fourth = pictures
        assert not torch.equal(first, second) and torch.equal(second, third) and torch.equal(first, fourth)
        assert server.text().count("transformer fp32 on cpu loaded") == loaded_before
    finally:
        shutil.rmtree(folder)


def test_a_repaired_processor_is_not_mistaken_for_the_old_one(
    client: Client, work: Path, tiny_folder: Path
) -> None:
    folder = work / "models" / "diffusers" / "repaired"
    shutil.copytree(tiny_folder, folder)
    tokenizer = folder / "processor" / "tokenizer_config.json"
    good = tokenizer.read_text(encoding="utf-8")
    try:
        tokenizer.write_text(json.dumps(json.loads(good) | {"model_max_length": 2048}), encoding="utf-8")
        succeed(client, edit_prompt("repaired"))
        tokenizer.write_text(good, encoding="utf-8")
        assert ENCODE in succeed(client, edit_prompt("repaired")).executed
    finally:
        shutil.rmtree(folder)


def test_a_new_checkpoint_is_listed_and_a_byte_order_mark_does_not_hide_it(
    client: Client, work: Path, tiny_folder: Path
) -> None:
    def listed() -> list[str]:
        info = client.get("/object_info/FireRedLoadVAE")["FireRedLoadVAE"]
        return info["input"]["required"]["checkpoint"][1]["options"]

    folder = work / "models" / "diffusers" / "marked"
    assert "marked" not in listed()
    shutil.copytree(tiny_folder, folder)
    try:
        index = folder / "model_index.json"
        index.write_text(index.read_text(encoding="utf-8"), encoding="utf-8-sig")
        deadline = time.monotonic() + 10  # the list is remembered for ten times as long as the search took
        while "marked" not in listed() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert "marked" in listed()
        succeed(client, edit_prompt("marked"))
    finally:
        shutil.rmtree(folder)


def test_defaults_need_not_be_sent(client: Client) -> None:
    """The server adds no defaults to API prompts, so every input with a default is optional."""
    prompt = edit_prompt()
    for loader in LOADERS:
        prompt = changed(prompt, loader, precision=None, device=None, math=None)
    prompt = changed(prompt, ENCODE, negative_prompt=None)
    prompt = changed(changed(prompt, SAMPLE, cfg=None, seed=None, negative=None), DECODE, tiling=None)
    succeed(client, prompt)


def test_negative_is_not_needed_and_its_absence_is_logged(client: Client, server: Server) -> None:
    succeed(client, changed(edit_prompt(), SAMPLE, negative=None, seed=6))
    assert "no negative conditioning is connected: sampling without guidance" in server.text()


@pytest.mark.parametrize("checkpoint", ["tiny", "zero_cond_t"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_plain_precision_runs_for_every_component(
    client: Client, server: Server, checkpoint: str, precision: str
) -> None:
    prompt = edit_prompt(checkpoint)
    for loader in LOADERS:
        prompt = changed(prompt, loader, precision=precision)
    succeed(client, prompt)
    assert f"transformer {precision} on cpu" in server.text()


@pytest.mark.parametrize("precision", ["int8", "int8-fast"])
def test_int8_runs_and_its_copy_is_kept_for_the_next_start(
    client: Client, work: Path, precision: str
) -> None:
    prompt = changed(changed(edit_prompt("zero_cond_t"), "1", precision=precision), "2", precision="int8")
    succeed(client, prompt)
    kept = [path.name for path in (work / "models" / "firered_cache").iterdir()]
    for role in ("transformer", "text_encoder"):
        assert [name for name in kept if name.startswith(f"zero_cond_t-{role}-int8-rot64-")]
    assert not [name for name in kept if name.endswith(".partial")]


def test_a_missing_device_falls_back_and_is_logged(client: Client, server: Server) -> None:
    prompt = edit_prompt()
    for number, loader in enumerate(LOADERS):
        prompt = changed(prompt, loader, device=f"gpu:{number + 5}")
    succeed(client, prompt)
    log = server.text()
    for number, role in enumerate(LOADERS.values()):
        assert (
            f"this machine has no gpu:{number + 5} for the {role.replace('_', ' ')}: falling back to auto"
            in log
        )


def test_several_pictures_of_different_sizes(client: Client) -> None:
    prompt = edit_prompt()
    prompt["11"] = {
        "class_type": "LoadImage",
        "inputs": {"image": "example.png"},
        "_meta": {"title": "second"},
    }
    succeed(client, changed(prompt, ENCODE, **{"images.image0": [PHOTO, 0], "images.image1": ["11", 0]}))


def test_forced_math_is_named_in_the_log(client: Client, server: Server) -> None:
    succeed(client, changed(edit_prompt(), "1", precision="bf16", math="fp32"))
    assert "transformer bf16, fp32 math, on cpu" in server.text()


def test_help_pages_and_templates_are_served(client: Client) -> None:
    templates = client.get("/api/workflow_templates")
    (names,) = [names for pack, names in templates.items() if pack.startswith("firered")]
    assert sorted(names) == sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))


@pytest.mark.parametrize("vae", [{"checkpoint": "Gone"}, {"precision": "int8"}, {"precision": "fp99"}, {}])
@pytest.mark.parametrize("only", [(), (SAVE,)], ids=["every branch", "one branch"])
def test_a_branch_that_cannot_run_stops_no_other(client: Client, vae: dict, only: tuple[str, ...]) -> None:
    """ComfyUI leaves out a branch whose inputs are wrong. A branch that fails has an error of its own."""
    prompt = changed(edit_prompt(), SAMPLE, seed=70 + len(str(vae)) + len(only))
    prompt = with_node(prompt, "33", "FireRedLoadVAE", **({"checkpoint": "tiny"} | vae))
    latent = [SAMPLE, 0] if vae else ["34", 0]
    prompt = with_node(prompt, "34", "ProbeLatent", shape="1,16,1,8,8", fill="nan")
    prompt = with_node(prompt, "35", "FireRedDecode", vae=["33", 0], latent=latent)
    prompt = with_node(prompt, "36", "PreviewImage", images=["35", 0])
    run = client.run(prompt, only=only)
    if vae or only:
        assert run.status == "success", run.error
        assert SAVE in run.outputs and "36" not in run.outputs
    else:
        assert run.error is not None and run.error["node_type"] == "FireRedDecode"
