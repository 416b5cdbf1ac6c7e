"""The shipped workflows in the real frontend, in a real Chromium."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import open_page, show_graph, submitted
from playwright.sync_api import Error, Page

from launcher.client import Client
from launcher.folders import ROOT
from launcher.server import Server

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Page]:
    with open_page(server.address) as opened:
        yield opened


@pytest.fixture
def nodes_2(page: Page) -> Iterator[Page]:
    """The page while it draws nodes as elements, which ComfyUI calls Nodes 2.0, and not on its canvas."""
    switch = "on => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
    page.evaluate(switch, True)
    yield page
    page.evaluate(switch, False)


def open_workflow(page: Page, path: Path) -> dict:
    """Load a workflow as when its file is opened, and return it as the frontend saves it."""
    show_graph(page, json.loads(path.read_text(encoding="utf-8")), path.stem)
    return page.evaluate("() => window.app.graph.serialize()")


def used_slots(node: dict) -> list[str]:
    """A node's inputs without the free picture slots, because frontends show different numbers of them."""
    free = [
        slot["name"] for slot in node["inputs"] if slot["name"].startswith("images.") and slot["link"] is None
    ]
    return [slot["name"] for slot in node["inputs"] if slot["name"] not in free]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_opens_with_every_node_widget_and_link_in_place(
    page: Page, work: Path, path: Path
) -> None:
    """Only nodes whose files are missing are marked: the page then offers to download them."""
    shipped, opened = json.loads(path.read_text(encoding="utf-8")), open_workflow(page, path)
    assert sorted(map(json.dumps, opened["links"])) == sorted(map(json.dumps, shipped["links"]))
    nodes = {node["id"]: node for node in opened["nodes"]}
    for node in shipped["nodes"]:
        assert nodes[node["id"]]["type"] == node["type"]
        values, kept = (entry.get("widgets_values") or [] for entry in (node, nodes[node["id"]]))
        # core's own nodes get more widgets from one version to the next
        assert kept == values if node["type"].startswith("FireRed") else kept[: len(values)] == values
        assert used_slots(nodes[node["id"]]) == used_slots(node)
    unknown = page.evaluate(
        "() => window.app.graph.nodes.filter(node => node.has_errors).map(node => node.type)"
    )
    offered = [(node["type"], model) for node in shipped["nodes"] for model in _models(node)]
    there = work / "models"
    missing = [kind for kind, model in offered if not (there / model["directory"] / model["name"]).exists()]
    assert sorted(unknown) == sorted(missing)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_nodes_2_draw_every_node_with_its_title(nodes_2: Page, path: Path) -> None:
    """The page that comfy-test's level static_capture opens for a picture, from which it reads nothing."""
    errors: list[Error] = []
    nodes_2.on("pageerror", lambda error: errors.append(error))  # a method of list is refused
    opened = open_workflow(nodes_2, path)
    elements = "document.querySelectorAll('[data-node-id]')"
    nodes_2.wait_for_function(f"() => {elements}.length === {len(opened['nodes'])}")
    drawn = nodes_2.evaluate(f"() => Array.from({elements}, node => [node.dataset.nodeId, node.innerText])")
    titles = nodes_2.evaluate("() => window.app.graph.nodes.map(node => [node.id, node.title])")
    texts = dict(drawn)
    assert not [title for key, title in titles if title not in texts[str(key)]]
    assert not errors


def _models(node: dict) -> list[dict]:
    return node["properties"].get("models", [])


def computed(prompt: dict) -> dict:
    """The part of a prompt that ComfyUI computes. `_meta` is for readers and differs between frontends."""
    return {key: {name: node[name] for name in ("class_type", "inputs")} for key, node in prompt.items()}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_its_api_twin_is_what_the_frontend_would_submit(page: Page, path: Path) -> None:
    open_workflow(page, path)
    assert submitted(page) == computed(
        json.loads((path.parent / "api" / path.name).read_text(encoding="utf-8"))
    )


@pytest.mark.parametrize("name", ["edit", "demo", "mask", "numerics", "step_cache"])
def test_a_workflow_runs_from_the_page(page: Page, client: Client, name: str) -> None:
    """The shipped workflow is opened, made small in its widgets and queued as with the Run button.

    These are firered_edit and those of the built-in model, of which comfy-test executes two in full.
    """
    small = {"checkpoint": "tiny", "steps": 2, "reference_megapixels": 0.01}
    if name != "mask":  # its mask has the photo's size
        small |= {"width": 64, "height": 64}
    opened = open_workflow(page, ROOT / "workflows" / f"firered_{name}.json")
    before = set(client.get("/history"))
    page.evaluate(
        """small => {
            for (const node of window.app.graph.nodes.filter(node => node.type.startsWith('FireRed')))
                for (const widget of node.widgets ?? [])
                    if (widget.name in small) widget.value = small[widget.name]
        }""",
        small,
    )
    sent = ours(submitted(page))
    page.evaluate("() => window.app.queuePrompt(0)")
    deadline = time.monotonic() + 120
    while not (new := set(client.get("/history")) - before) and time.monotonic() < deadline:
        page.wait_for_timeout(200)
    (queued,) = [client.get(f"/history/{prompt_id}")[prompt_id] for prompt_id in new]
    assert queued["status"]["status_str"] == "success"
    assert ours(submitted(page)) == sent, "after a crash the next Run has to be the same prompt, to go on"
    ends = [str(node["id"]) for node in opened["nodes"] if node["type"] in ("SaveImage", "PreviewImage")]
    assert ends and all(queued["outputs"][key]["images"] for key in ends)


def ours(prompt: dict) -> dict:
    """The part of a prompt that is ours. Core's Compare Images keeps what it shows."""
    return {key: node for key, node in prompt.items() if node["class_type"].startswith("FireRed")}


def test_a_workflow_from_before_an_input_and_an_output_gets_them(page: Page, tmp_path: Path) -> None:
    """FireRed Encode Prompt without `size` and `latent`, as it was saved first."""
    workflow = json.loads((ROOT / "workflows" / "firered_demo.json").read_text(encoding="utf-8"))
    (encode,) = [node for node in workflow["nodes"] if node["type"] == "FireRedEncodePrompt"]
    assert encode["inputs"].pop()["name"] == "size" and encode["outputs"].pop()["name"] == "latent"
    assert encode["widgets_values"].pop() == "megapixels"
    older = tmp_path / "older.json"
    older.write_text(json.dumps(workflow), encoding="utf-8")
    (opened,) = [node for node in open_workflow(page, older)["nodes"] if node["id"] == encode["id"]]
    assert opened["widgets_values"] == [*encode["widgets_values"], "megapixels"]
    assert [slot["name"] for slot in opened["outputs"]] == ["positive", "negative", "latent"]
    assert [slot["links"] for slot in opened["outputs"]][:2] == [slot["links"] for slot in encode["outputs"]]
