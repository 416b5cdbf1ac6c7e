"""What ComfyUI's own start flags change. Each set of flags needs a server of its own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import SERVER_ARGUMENTS, make_work_folder
from prompts import (
    COMPONENTS,
    SAMPLE,
    changed,
    edit_prompt,
    loaded_components,
    succeed,
    wait_until_empty,
)
from warm_server import Server

PRECISIONS = "--bf16-unet --force-fp32 --cpu-vae"
WITH_PRECISIONS = f"--cache-lru 10 {PRECISIONS}"
CACHES = ("--cache-none", "--cache-classic --disable-smart-memory", WITH_PRECISIONS, "--cache-ram 2 1")
AT_ONCE = 2  # a server that starts keeps one core busy


def check_caching(flags: str, work: Path) -> None:
    with Server(work, (*SERVER_ARGUMENTS, *flags.split())) as server:
        client = server.client
        if flags == WITH_PRECISIONS:
            check_precisions(server)
        for seed, precision in enumerate(("fp32", "int8", "bf16")):
            prompt = changed(changed(edit_prompt(), "1", precision=precision), "2", precision="fp32")
            succeed(client, changed(prompt, SAMPLE, seed=seed))
            loaded = list(loaded_components(client, work))
            for role in COMPONENTS:
                assert len([name for name in loaded if name.startswith(role)]) <= 1, loaded
            assert not loaded or any(name.startswith(f"transformer {precision}") for name in loaded)
        client.post("/free", json={"unload_models": True, "free_memory": True})
        assert wait_until_empty(client, work) == {}


def check_precisions(server: Server) -> None:
    """What the user left free is decided by the flags."""
    succeed(server.client, edit_prompt())
    log = server.text()
    assert "transformer bf16, fp32 math, on cpu, about 0.0 GiB (--bf16-unet)" in log
    assert "text encoder fp32 on cpu, about 0.0 GiB (--force-fp32)" in log
    assert "vae fp32 on cpu, about 0.0 GiB (--force-fp32)" in log


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[dict[str, Future[None]]]:
    """The checks by their flags. They run in the background, two at a time."""
    works = {
        flags: make_work_folder(tmp_path_factory.mktemp("flags") / "comfyui", tiny_folder) for flags in CACHES
    }
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {flags: pool.submit(check_caching, flags, works[flags]) for flags in CACHES}


@pytest.mark.parametrize("flags", CACHES)
def test_no_way_of_caching_ever_holds_a_component_twice(checks: dict[str, Future[None]], flags: str) -> None:
    checks[flags].result()
