"""ComfyUI's page in a real Chromium."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Page, sync_playwright

READY = "() => window.app?.graph && window.app.extensionManager"


@contextmanager
def open_page(address: str, **settings: Any) -> Iterator[Page]:
    """ComfyUI's page when it has loaded and knows our nodes.

    settings: of the page, with "_" for ".". The server keeps them for pages opened later.
    """
    settings = {"Comfy_TutorialCompleted": True} | settings  # without the templates of a first visit
    browser = os.environ["FIRERED_BROWSER"]  # run.py finds or installs one
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = launched.new_page(viewport={"width": 1800, "height": 1000})
        stored = {name.replace("_", "."): value for name, value in settings.items()}
        assert page.request.post(f"{address}/settings", data=stored).ok
        page.goto(address)
        wait_until_ready(page)
        yield page
        launched.close()


def wait_until_ready(page: Page) -> None:
    page.wait_for_function(READY, timeout=60_000)
    page.wait_for_function("() => window.LiteGraph.registered_node_types.FireRedSampler", timeout=60_000)


def show_graph(page: Page, workflow: dict[str, Any], name: str) -> None:
    """Load a workflow as when its file is opened."""
    page.evaluate(
        "([workflow, name]) => window.app.loadGraphData(workflow, true, true, name)", [workflow, name]
    )
    page.wait_for_function(f"() => window.app.graph.nodes.length === {len(workflow['nodes'])}")


def submitted(page: Page) -> dict[str, dict[str, Any]]:
    """The prompt that the Run button would send, without `_meta`, which is for readers."""
    prompt = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    return {key: {name: node[name] for name in ("class_type", "inputs")} for key, node in prompt.items()}
