"""The subgraph blueprint "FireRed Edit": one node that edits, as a user finds and runs it."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from browser import open_page, show_graph, submitted
from playwright.sync_api import Page

from launcher.client import Client, PromptRejected
from launcher.folders import PACK_FOLDER, ROOT
from launcher.server import Server

NAME = "FireRed Edit"
BLUEPRINT = json.loads((ROOT / "subgraphs" / f"{NAME}.json").read_text(encoding="utf-8"))
WIDGETS = ["prompt", "checkpoint", "steps", "cfg", "seed"]
Graph = dict[str, Any]


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Page]:
    with open_page(server.address) as opened:
        yield opened


def inner_node(blueprint: Graph, kind: str) -> Graph:
    """The node of that type inside the blueprint's subgraph."""
    return next(node for node in blueprint["definitions"]["subgraphs"][0]["nodes"] if node["type"] == kind)


def test_the_server_offers_it_as_this_packs(client: Client) -> None:
    offered = [entry for entry in client.get("/global_subgraphs").values() if entry["name"] == NAME]
    assert [entry["info"]["node_pack"] for entry in offered] == [f"custom_nodes.{PACK_FOLDER}"]


def test_it_is_found_by_its_name_and_is_one_node_with_one_checkpoint(page: Page) -> None:
    page.evaluate("() => window.app.graph.clear()")
    page.evaluate("() => window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.wait_for_selector("input:focus")
    page.keyboard.type(NAME)
    page.wait_for_function(f"() => document.body.innerText.includes('{NAME}')")
    page.wait_for_timeout(1000)  # the list is filtered a moment after the last key
    page.keyboard.press("Enter")
    page.mouse.click(900, 520)  # newer pages hang the node on the pointer
    page.wait_for_function("() => window.app.graph.nodes.length === 1")
    shown = "() => window.app.graph.nodes.map(node => [node.title, node.widgets.map(w => w.name)])"
    assert page.evaluate(shown) == [[NAME, WIDGETS]]


def put_into_a_graph(page: Page, blueprint: Graph) -> None:
    """Open the blueprint, link a photo to it and it to Save Image, and choose `tiny` and small sizes."""
    show_graph(page, blueprint, NAME)
    page.evaluate(
        """() => {
            const graph = window.app.graph, [edit] = graph.nodes
            const set = (node, values) => {
                for (const widget of node.widgets ?? [])
                    if (widget.name in values) widget.callback?.(widget.value = values[widget.name])
            }
            const [photo, save] = ['LoadImage', 'SaveImage'].map(type => window.LiteGraph.createNode(type))
            graph.add(photo); graph.add(save)
            set(photo, {image: 'example.png'})
            photo.connect(0, edit, edit.inputs.findIndex(input => input.name === 'image'))
            edit.connect(0, save, 0)
            set(edit, {checkpoint: 'tiny', steps: 2})
            const small = {width: 64, height: 64, reference_megapixels: 0.01}
            for (const node of edit.subgraph.nodes) set(node, small)
        }"""
    )


def queue(page: Page, client: Client) -> Graph:
    """Press Run, and return the history of what ran."""
    before = set(client.get("/history"))
    page.evaluate("() => window.app.queuePrompt(0)")
    deadline = time.monotonic() + 120
    while not (new := set(client.get("/history")) - before) and time.monotonic() < deadline:
        page.wait_for_timeout(200)
    (prompt_id,) = new
    return client.get(f"/history/{prompt_id}")[prompt_id]


def test_it_edits_with_the_chosen_checkpoint_in_all_three_loaders(page: Page, client: Client) -> None:
    put_into_a_graph(page, BLUEPRINT)
    ran = queue(page, client)
    assert ran["status"]["status_str"] == "success"
    inputs = [node["inputs"] for node in ran["prompt"][2].values()]
    assert [entry["checkpoint"] for entry in inputs if "checkpoint" in entry] == ["tiny"] * 3
    assert [entry["steps"] for entry in inputs if "steps" in entry] == [2]
    assert [output for output in ran["outputs"].values() if "images" in output]


def with_a_newer_input(blueprint: Graph) -> Graph:
    """The blueprint as a later version of the pack might save it: the sampler has one more input."""
    newer = copy.deepcopy(blueprint)
    subgraph, sampler = newer["definitions"]["subgraphs"][0], inner_node(newer, "FireRedSampler")
    slot = {"name": "later", "type": "COMBO", "shape": 7, "widget": {"name": "later"}}
    link = {"id": 99, "origin_id": -10, "origin_slot": len(subgraph["inputs"]), "type": "COMBO"}
    subgraph["links"].append(link | {"target_id": sampler["id"], "target_slot": len(sampler["inputs"])})
    sampler["inputs"].append(slot | {"link": 99})
    sampler["widgets_values"].append("value")
    identifier = "5eb1a3f0-2c55-4d4e-9a37-4bb6a5f4a7f1"
    subgraph["inputs"].append({"id": identifier, "name": "later", "type": "COMBO", "linkIds": [99]})
    newer["nodes"][0]["inputs"].append(slot | {"link": None})
    return newer


def test_one_of_a_newer_pack_with_one_more_input_runs_without_it(page: Page, client: Client) -> None:
    put_into_a_graph(page, BLUEPRINT)
    usual = submitted(page)
    put_into_a_graph(page, with_a_newer_input(BLUEPRINT))
    assert submitted(page) == usual
    assert queue(page, client)["status"]["status_str"] == "success"


def test_a_node_that_this_pack_lacks_is_marked_and_refused_by_its_name(page: Page, client: Client) -> None:
    newer = copy.deepcopy(BLUEPRINT)
    inner_node(newer, "FireRedDecode")["type"] = "FireRedLater"
    put_into_a_graph(page, newer)
    marked = "() => window.app.graph.nodes[0].subgraph.nodes.filter(n => n.has_errors).map(n => n.type)"
    assert page.evaluate(marked) == ["FireRedLater"]
    page.keyboard.press("Escape")  # the page's own list of missing nodes
    prompt = submitted(page)
    (missing,) = [node for node in prompt.values() if node["class_type"] is None]
    missing["class_type"] = "FireRedLater"  # as a program would send it
    with pytest.raises(PromptRejected) as refused:
        client.run(prompt)
    assert "FireRedLater" in str(refused.value.answer["error"])
