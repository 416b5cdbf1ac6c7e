"""The nodes in Chinese: complete, in the right characters, shown by a real page. What a search finds."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from browser import open_page, show_graph

from launcher.client import Client
from launcher.folders import ROOT
from launcher.server import Server

HELP = ROOT / "nodes" / "web" / "docs"
# Python's names of the characters that each language is written in: neither has the other's
CHARACTERS = {"zh": "gb2312", "zh-TW": "big5"}
LANGUAGES = pytest.mark.parametrize("language", CHARACTERS)
Nodes = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def nodes(client: Client) -> Nodes:
    """Our nodes as the server describes them."""
    described = client.get("/object_info")
    return {name: node for name, node in described.items() if node["category"] == "FireRed"}


def translations(language: str) -> Nodes:
    path = ROOT / "locales" / language / "nodeDefs.json"
    return json.loads(path.read_text(encoding="utf-8"))


def texts(node: dict[str, Any]) -> list[str]:
    """All that a page shows of a translated node."""
    entries = [*node["inputs"].values(), *node["outputs"].values()]
    return [
        node["display_name"],
        node["description"],
        *(text for entry in entries for text in entry.values()),
    ]


@LANGUAGES
def test_every_node_input_output_and_tooltip_is_translated(nodes: Nodes, language: str) -> None:
    translated = translations(language)
    assert set(translated) == set(nodes)
    for name, node in nodes.items():
        described = node["input"].get("required", {}) | node["input"].get("optional", {})
        found = translated[name]["inputs"]
        assert set(found) == set(described), name
        explained = {key for key, (_, options) in described.items() if options.get("tooltip")}
        assert {key for key, text in found.items() if "tooltip" in text} == explained, name
        assert list(translated[name]["outputs"]) == [str(index) for index in range(len(node["output"]))], name


@LANGUAGES
def test_its_texts_are_written_in_the_languages_own_characters(language: str) -> None:
    for name, node in translations(language).items():
        for text in texts(node):
            text.encode(CHARACTERS[language])
            assert not re.search("[{}@|]", text), f"{name}: vue-i18n reads {text} as a pattern"
        assert re.search("[\u4e00-\u9fff]", node["display_name"] + node["description"])
        assert node["display_name"].startswith("FireRed")  # so that a search for it finds the node


@LANGUAGES
def test_every_help_page_is_there_with_the_same_names_and_images(nodes: Nodes, language: str) -> None:
    for name in nodes:
        english, chinese = (HELP / path for path in (f"{name}.md", f"{name}/{language}.md"))
        text = chinese.read_text(encoding="utf-8")
        text.encode(CHARACTERS[language])
        assert text.startswith(f"# {translations(language)[name]['display_name']}\n")
        assert named(text) >= named(english.read_text(encoding="utf-8")), name


def named(page: str) -> set[str]:
    """The inputs, outputs and choices in the first column of a page's tables, and its images."""
    cells = " ".join(re.findall(r"^\| *(.*?) *\|", page, re.MULTILINE))
    return {*re.findall(r"`(.+?)`", cells), *re.findall(r"\((\w+\.png)\)", page)}


def test_a_page_shows_the_nodes_and_their_help_in_chinese(server: Server, client: Client) -> None:
    workflow = json.loads((ROOT / "workflows" / "firered_demo.json").read_text(encoding="utf-8"))
    shown = """() => Object.fromEntries(window.app.graph.nodes.map(node => [node.type, [
        node.title,
        ...node.widgets.map(widget => widget.label),
        ...node.outputs.map(output => output.localized_name),
    ]]))"""
    try:
        for language in CHARACTERS:
            with open_page(server.address, Comfy_Locale=language) as page:
                show_graph(page, workflow, "firered_demo")
                graph, expected = page.evaluate(shown), translations(language)
                for name in set(graph) & set(expected):
                    outputs = [output["name"] for output in expected[name]["outputs"].values()]
                    assert {expected[name]["display_name"], *outputs} <= set(graph[name]), name
                sampler = expected["FireRedSampler"]
                assert sampler["inputs"]["steps"]["name"] in graph["FireRedSampler"]
                page.evaluate("() => window.app.canvas.selectNode(window.app.graph.getNodeById(5))")
                with page.expect_response(f"**/docs/FireRedSampler/{language}.md") as answer:
                    page.click("[data-testid='info-button']")
                assert answer.value.ok
                page.wait_for_selector(f"h1:has-text('{sampler['display_name']}')")
    finally:
        client.post("/settings", json={"Comfy.Locale": "en"})  # for the pages of the tests that follow


def test_nodes_are_found_by_the_names_of_what_they_replace(nodes: Nodes) -> None:
    found = {name: {alias.lower() for alias in node["search_aliases"]} for name, node in nodes.items()}
    assert all(found.values())
    assert "ksampler" in found["FireRedSampler"] and "vae decode" in found["FireRedDecode"]
    assert "multi gpu" in found["FireRedParallel"] and "black image" in found["FireRedNumerics"]
