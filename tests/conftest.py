"""What the tests share: a tiny checkpoint of the real format and a running ComfyUI.

Modules that take seconds to import, diffusers among them, are imported where they are needed: pytest's own
process, which hands out the tests, imports this file too.
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import core_vae
import pytest
import torch
from engine.cards.card import Card
from engine.files.checkpoint import Checkpoint, open_checkpoint
from engine.weights.checks import require_usable
from engine.weights.components import ComponentSpec, Replica
from engine.weights.precision import ROLE_PRECISIONS, resolve
from warm_server import Server

from launcher.client import Client
from launcher.folders import ROOT, add_pack, comfyui_folder

os.environ["TOKENIZERS_PARALLELISM"] = "false"
PROBE_NODES = ROOT / "tests" / "probe_nodes"
SERVER_ARGUMENTS = (
    "--disable-api-nodes",
    "--database-url",
    "sqlite:///:memory:",
    "--preview-method",
    "latent2rgb",
)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def versions(record_testsuite_property: Callable[[str, object], None]) -> None:
    """Name the versions in pytest's XML report, from which tests/versions.py makes the page's table."""
    record_testsuite_property("Python", platform.python_version())
    for name, package in (
        ("frontend", "comfyui-frontend-package"),
        *((name, name) for name in ("torch", "diffusers", "transformers")),
    ):
        record_testsuite_property(name, metadata.version(package))
    version = runpy.run_path(str(comfyui_folder() / "comfyui_version.py"))["__version__"]
    record_testsuite_property("ComfyUI", version)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint. Do not change it; `tiny_copy` is a copy for that."""
    import tiny_checkpoint

    return tiny_checkpoint.build(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Checkpoint:
    return open_checkpoint(tiny_folder)


@pytest.fixture(scope="session")
def real_size(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint of FireRed's sizes without its data, for code that reads headers and configs only."""
    import real_checkpoint

    return open_checkpoint(real_checkpoint.build(tmp_path_factory.mktemp("real_size") / "real"))


@pytest.fixture
def tiny_copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may change."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The server's work folder: checkpoints `tiny`, `zero_cond_t`, `wide`, core's VAE, probe nodes."""
    import tiny_checkpoint

    folder = make_work_folder(tmp_path_factory.mktemp("comfyui"), tiny_folder)
    models = folder / "models" / "diffusers"
    tiny_checkpoint.build(models / "zero_cond_t", zero_cond_t=True)
    tiny_checkpoint.build(models / "wide", joint_attention_dim=3584)
    core_vae.write(folder, "tiny")
    lightning = folder / "models" / "loras" / "FireRed-Image-Edit-1.0-Lightning-8steps-v1.1.safetensors"
    lightning.parent.mkdir()
    lightning.touch()  # which firered_lightning names; a page marks a node whose file is missing
    return folder


@pytest.fixture
def own_work(tmp_path: Path, tiny_folder: Path) -> Path:
    """A work folder for a test that starts a server of its own."""
    return make_work_folder(tmp_path / "comfyui", tiny_folder)


def make_work_folder(folder: Path, tiny_folder: Path) -> Path:
    """A work folder with the checkpoint `tiny` and the probe nodes."""
    shutil.copytree(tiny_folder, folder / "models" / "diffusers" / "tiny")
    add_pack(folder, PROBE_NODES)
    return folder


@pytest.fixture(scope="session")
def server(work: Path) -> Iterator[Server]:
    with Server(work, SERVER_ARGUMENTS) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Client:
    return server.client


def replica_for(checkpoint: Checkpoint, role: str, precision: str = "fp32") -> Replica:
    """A component on a CPU without BF16."""
    cpu = torch.device("cpu")
    return replica_on(Card("cpu", "cpu", cpu, False, 2**35, is_gpu=False), checkpoint, role, precision)


def replica_on(card: Card, checkpoint: Checkpoint, role: str, precision: str) -> Replica:
    """A component on a card, after the checks of its files that a loader makes."""
    require_usable(role, checkpoint)
    resolved = resolve(ROLE_PRECISIONS[role][precision], card)
    return Replica(ComponentSpec.of(role, checkpoint, resolved), card)
