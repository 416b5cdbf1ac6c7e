"""We compute FP32 as FP32 whatever the process allows, and restore the settings of the process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import replica_for
from engine.arithmetic import computing_environment, exact_fp32
from engine.files.checkpoint import Checkpoint
from engine.models import loading
from engine.models.vae import decode, encode_reference
from engine.sampling.sampling import sample
from fp32_settings import are_exact, settings
from PIL import Image
from test_sampling import plan

CPU = torch.device("cpu")
cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
newer_torch = pytest.mark.skipif(not hasattr(products, "fp32_precision"), reason="torch 2.9 and later")


@contextmanager
def allowed_to_round() -> Iterator[None]:
    """TF32 and BF16 are allowed wherever torch can use them for FP32."""
    torch.set_float32_matmul_precision("medium")
    assert cudnn.allow_tf32  # torch's own default
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def encode_text(tiny: Checkpoint, watch: Callable[[torch.nn.Module], None]) -> None:
    encoder = loading.load(replica_for(tiny, "text_encoder"))
    watch(encoder.model.visual.patch_embed)  # a convolution
    watch(encoder.model.language_model.layers[0])
    encoder.encode("Add a red hat", [Image.new("RGB", (64, 64))])


def encode_picture(tiny: Checkpoint, watch: Callable[[torch.nn.Module], None]) -> None:
    vae = loading.load(replica_for(tiny, "vae"))
    watch(vae.model.encoder.conv_in)
    encode_reference(vae, Image.new("RGB", (64, 64)), 0.01)


def decode_latents(tiny: Checkpoint, watch: Callable[[torch.nn.Module], None]) -> None:
    vae = loading.load(replica_for(tiny, "vae"))
    watch(vae.model.decoder.conv_in)
    watch(vae.model.decoder.conv_out)
    decode(vae, torch.zeros(1, 16, 1, 4, 4))


def sample_latents(tiny: Checkpoint, watch: Callable[[torch.nn.Module], None]) -> None:
    transformer = loading.load(replica_for(tiny, "transformer", "int8"))
    watch(transformer.model.block(0))
    sample(transformer, plan(tiny, steps=1))


@pytest.mark.parametrize("compute", [encode_text, encode_picture, decode_latents, sample_latents])
def test_nothing_of_ours_computes_fp32_as_anything_else(
    tiny: Checkpoint, compute: Callable[[Checkpoint, Callable[[torch.nn.Module], None]], None]
) -> None:
    seen: list[tuple[Any, ...]] = []

    def watch(module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda *_: seen.append(settings()))

    with allowed_to_round():
        before = settings()
        compute(tiny, watch)
        assert settings() == before
    assert seen and all(map(are_exact, seen)) and not are_exact(before)


def test_weights_are_quantised_in_fp32(tiny: Checkpoint) -> None:
    seen: list[tuple[Any, ...]] = []
    with allowed_to_round():
        loading.load(replica_for(tiny, "transformer", "int8"), lambda done, total: seen.append(settings()))
    assert seen and all(map(are_exact, seen))


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_the_process_is_as_it_was_after_an_error_too(before: str) -> None:
    torch.set_float32_matmul_precision(before)
    try:
        found = settings()
        with pytest.raises(KeyError), exact_fp32():
            assert are_exact(settings())
            raise KeyError
        assert settings() == found
        assert torch.get_float32_matmul_precision() == before and cudnn.allow_tf32
        assert products.allow_tf32 is (before != "highest")
    finally:
        torch.set_float32_matmul_precision("highest")


# A process for each part: what was set cannot be unset.
NEWER_SETTINGS = """
import os, torch
from engine.arithmetic import exact_fp32
from fp32_settings import *
for owner in ("", ".cudnn", ".cuda.matmul", ".cudnn.conv", ".mkldnn", ".mkldnn.conv"):
    if not (child := os.fork()):
        exec(f"torch.backends{owner}.fp32_precision = 'tf32'")
        before = settings()
        assert not are_exact(before), owner
        with exact_fp32():
            assert are_exact(settings()), (owner, settings())
        assert settings() == before, owner
        os._exit(0)
    assert not os.waitpid(child, 0)[1], owner
"""


@newer_torch
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows forks no process")
def test_what_newer_settings_allow_is_off_and_back_too() -> None:
    """Each part of torch has a setting of its own, or takes that of its parent."""
    run = subprocess.run([sys.executable, "-c", NEWER_SETTINGS], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@contextmanager
def as_it_was() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.cuda.enable_mem_efficient_sdp(True)
        cudnn.deterministic = False


@pytest.mark.parametrize(
    "change",
    [
        lambda: torch.set_num_threads(torch.get_num_threads() + 1),
        lambda: torch.use_deterministic_algorithms(True),
        lambda: torch.backends.cuda.enable_flash_sdp(False),
        lambda: torch.backends.cuda.enable_mem_efficient_sdp(False),
        lambda: setattr(cudnn, "deterministic", True),
    ],
    ids=["threads", "deterministic", "flash", "efficient", "cudnn"],
)
def test_what_changes_bits_changes_the_environment_and_the_run(
    tiny: Checkpoint, change: Callable[[], None]
) -> None:
    run = plan(tiny)
    before, name = computing_environment(CPU, "diffusers"), run.name()
    assert computing_environment(CPU, "diffusers") == before
    with as_it_was():
        change()
        assert computing_environment(CPU, "diffusers") != before and run.name() != name
    assert run.name() == name


def test_the_hosts_threads_do_not_matter_to_a_card() -> None:
    card = torch.device("cuda", 0)
    before = computing_environment(card)
    with as_it_was():
        torch.set_num_threads(torch.get_num_threads() + 1)
        assert computing_environment(card) == before
