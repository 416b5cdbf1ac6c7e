"""What the server keeps on disk is taken up by the next prompt: after a cancel, an error and a restart."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import core_vae
import pytest
import torch
from conftest import SERVER_ARGUMENTS, make_work_folder
from engine.files.cache import SUFFIX
from prompts import (
    COMPONENTS,
    DECODE,
    PHOTO,
    SAMPLE,
    SAVE,
    at_step,
    changed,
    edit_prompt,
    fail,
    keep_tensor,
    kept_tensor,
    loaded_roles,
    soon,
    succeed,
    with_node,
)
from safetensors.torch import load_file, save_file
from tiny_checkpoint import WEIGHTS
from warm_server import Server

from launcher.client import Client, Prompt, ServerError

LONG, SIDE = 80, 256  # steps and pixels: long enough to interrupt


def long_prompt(**inputs: Any) -> Prompt:
    prompt = changed(edit_prompt(), SAMPLE, steps=LONG, width=SIDE, height=SIDE, **inputs)
    return keep_tensor(prompt, [SAMPLE, 0], "latent")


def runs(work: Path) -> set[Path]:
    """The files of unfinished runs."""
    return set((work / "models" / "firered_cache" / "runs").glob(f"*{SUFFIX}"))


def test_a_cancelled_prompt_goes_on_at_the_step_it_reached(client: Client, server: Server) -> None:
    prompt = long_prompt(seed=12)
    assert client.run(prompt, at_step(10, lambda: client.post("/interrupt"), LONG)).status == "interrupted"
    log_before = len(server.text())
    succeed(client, long_prompt(seed=13))  # as the page sends it next, where the seed is random
    assert re.search(r"not finished with seed 12: .* it goes on at step \d\d/80", server.text()[log_before:])
    log_before = len(server.text())
    succeed(client, prompt)
    assert "not finished with seed" not in server.text()[log_before:]
    (line,) = [line for line in server.text()[log_before:].splitlines() if "resuming" in line]
    assert int(line.rpartition("step ")[2].partition("/")[0]) > 10


def test_a_run_is_forgotten_when_its_prompt_ends_well_whoever_decodes(client: Client, work: Path) -> None:
    """Otherwise the same prompt would take the old latents for ever."""
    prompt = with_node(edit_prompt(), "30", "VAELoader", vae_name=core_vae.CORE_VAE)
    prompt = with_node(prompt, "31", "VAEDecode", samples=[SAMPLE, 0], vae=["30", 0])
    prompt = keep_tensor(changed(prompt, SAMPLE, seed=70), ["31", 0], "picture")
    del prompt[DECODE], prompt[SAVE]
    before = runs(work)
    succeed(client, prompt)
    assert soon(lambda: runs(work) <= before)
    turned = with_node(changed(prompt, SAMPLE, seed=71), "32", "LatentRotate", samples=[SAMPLE, 0])
    turned = with_node(changed(turned, "32", rotation="90 degrees"), "33", "FireRedDecode", vae=["3", 0])
    turned = keep_tensor(changed(turned, "33", latent=["32", 0]), ["33", 0], "turned")
    del turned["31"], turned["keep_picture"]
    assert fail(client, turned)["node_type"] == "FireRedDecode"  # no VAE decodes that shape
    time.sleep(1)
    assert len(runs(work) - before) == 1  # its picture is not there yet


# Two servers in one work folder. What a test has loaded stays. So the first test needs the fewest components,
# and the last one needs them all.


@dataclass(frozen=True)
class Left:
    """The work folder of a server that ended, and the files of two runs in it."""

    work: Path
    undecoded: Path
    unfinished: Path


def decode_with_repaired() -> Prompt:
    """An edit whose VAE for decoding is the checkpoint `damaged`."""
    prompt = with_node(edit_prompt(), "33", "FireRedLoadVAE", checkpoint="damaged")
    return changed(prompt, DECODE, vae=["33", 0])


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Left:
    """A server edits once, fails to decode with a damaged VAE, and is killed while it samples."""
    work = make_work_folder(tmp_path_factory.mktemp("restart"), tiny_folder)
    damaged = shutil.copytree(tiny_folder, work / "models" / "diffusers" / "damaged")
    tensors = load_file(damaged / WEIGHTS["vae"])
    tensors["decoder.conv_out.weight"].fill_(float("nan"))
    save_file(tensors, damaged / WEIGHTS["vae"])
    with Server(work, SERVER_ARGUMENTS) as server:
        succeed(server.client, changed(edit_prompt(), SAMPLE, seed=1))
        assert loaded_roles(server.client, work) == COMPONENTS and soon(lambda: not runs(work))
        assert fail(server.client, decode_with_repaired())["node_type"] == "FireRedDecode"
        (undecoded,) = runs(work)
        with pytest.raises(ServerError, match="it ended while the prompt ran"):
            server.client.run(long_prompt(seed=11), at_step(10, server.process.kill, LONG))
    (unfinished,) = runs(work) - {undecoded}
    shutil.copy(tiny_folder / WEIGHTS["vae"], damaged / WEIGHTS["vae"])
    return Left(work, undecoded, unfinished)


@pytest.fixture(scope="module")
def restarted(left: Left) -> Iterator[Server]:
    with Server(left.work, SERVER_ARGUMENTS) as server:
        yield server


def test_latents_whose_decode_failed_are_there_after_a_restart(left: Left, restarted: Server) -> None:
    """The VAE's file has been repaired: only decoding is left to do."""
    run = succeed(restarted.client, decode_with_repaired())
    assert DECODE in run.executed and run.progress(SAMPLE) == []
    assert loaded_roles(restarted.client, left.work) == {"vae"}
    assert soon(lambda: not left.undecoded.exists())


def test_after_kill_9_the_same_prompt_ends_in_the_same_bits(left: Left, restarted: Server) -> None:
    run = succeed(restarted.client, long_prompt(seed=11))
    resumed = kept_tensor(left.work, "latent")["samples"]
    first_reported = min(value for value, total in run.progress(SAMPLE) if total == LONG)
    assert "resuming the interrupted run at step " in restarted.text() and first_reported > 1
    assert loaded_roles(restarted.client, left.work) == {"transformer", "vae"}
    assert soon(lambda: not left.unfinished.exists())
    succeed(restarted.client, long_prompt(seed=11, resume="off"))
    assert torch.equal(resumed, kept_tensor(left.work, "latent")["samples"])
    assert soon(lambda: not runs(left.work))


def test_a_new_seed_after_a_restart_encodes_nothing(left: Left, restarted: Server) -> None:
    succeed(restarted.client, changed(edit_prompt(), SAMPLE, seed=2))
    assert loaded_roles(restarted.client, left.work) == {"transformer", "vae"}
    another_picture = changed(edit_prompt(), PHOTO, image="example.png")
    succeed(restarted.client, another_picture)
    assert loaded_roles(restarted.client, left.work) == COMPONENTS
