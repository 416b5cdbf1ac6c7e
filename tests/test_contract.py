"""What shared workflows, API programs and the ComfyUI registry depend on."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import replica_for
from engine.cards.libraries import OLDEST
from engine.cluster.task import Task
from engine.cluster.wire import packed
from engine.files.checkpoint import Checkpoint
from engine.models.guard import STOP
from PIL import Image
from test_sampling import plan

from launcher.client import Client
from launcher.folders import ROOT
from launcher.server import Server

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which mypy and pytest bring along there

SNAPSHOT = Path(__file__).with_name("contract.json")


def node_contract(info: dict) -> dict:
    """The part of a node's /object_info that saved workflows and API prompts rely on."""
    inputs = {
        kind: {name: describe_input(*spec) for name, spec in info["input"].get(kind, {}).items()}
        for kind in ("required", "optional")
    }
    outputs = [list(pair) for pair in zip(info["output_name"], info["output"], strict=True)]
    return inputs | {"order": info["input_order"], "outputs": outputs, "category": info["category"]}


def describe_input(kind: str, options: dict | None = None) -> dict:
    options = options or {}
    described = {"type": kind} | {
        key: options[key] for key in ("default", "min", "max", "advanced") if key in options
    }
    if kind == "COMBO" and options.get("default") is not None:
        described["options"] = [option for option in options["options"] if not option.startswith("gpu:")]
    return described


def test_nodes_inputs_and_outputs_are_frozen(client: Client) -> None:
    """A new input must be the last and optional. Then add it to contract.json."""
    frozen = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    nodes = {name: info for name, info in client.get("/object_info").items() if info["category"] == "FireRed"}
    assert {name: node_contract(info) for name, info in nodes.items()} == frozen


def test_every_input_with_a_default_is_optional() -> None:
    for name, node in json.loads(SNAPSHOT.read_text(encoding="utf-8")).items():
        assert not [key for key, spec in node["required"].items() if "default" in spec], name


def test_requirements_are_the_projects_dependencies_and_what_loaders_check() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert requirements == project["project"]["dependencies"]
    assert "comfyui" not in project["project"]["name"].lower()
    minimums = dict(line.split(">=") for line in requirements if ">=" in line)
    assert minimums == {name: oldest for name, oldest in OLDEST.items() if name != "torch"}
    assert "torch" in requirements  # free: pip must not replace ComfyUI's


def test_the_oldest_comfyui_and_python_are_said_alike_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (oldest,) = re.findall(r'OLDEST_COMFYUI = "([\d.]+)"', (ROOT / "__init__.py").read_text(encoding="utf-8"))
    assert project["tool"]["comfy"]["requires-comfyui"] == f">={oldest}.0"
    python = project["project"]["requires-python"].removeprefix(">=")
    assert project["tool"]["mypy"]["python_version"] == python
    assert project["tool"]["ruff"]["target-version"] == f"py{python.replace('.', '')}"
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"Python {python} or later" in readme and f"ComfyUI {oldest} or later" in readme
    run = subprocess.run(
        [sys.executable, "run.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"Python {python} or later" in " ".join(run.stdout.split())


def test_the_registrys_archive_holds_what_its_files_start() -> None:
    """comfy-cli packs the files that git tracks, without those that .comfyignore names."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ignored = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
    packed = {path for path in tracked.splitlines() if not any(path.startswith(entry) for entry in ignored)}
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"} <= packed
    script = (ROOT / "run.py").read_text(encoding="utf-8")
    started = {f"launcher/{name}.py" for name in re.findall(r'"launcher\.(\w+)"', script)}
    assert started == {"launcher/convert.py", "launcher/demo.py", "launcher/serve.py"}
    assert started <= set(tracked.splitlines())
    assert "run.py" not in packed or started <= packed
    assert not [path for path in packed if path.startswith(("demo_model/training", ".github"))]
    assert "subgraphs/FireRed Edit.json" in packed and "locales/zh/nodeDefs.json" in packed
    assert (
        "demo_model/FireRed-Demo/model_index.json" in packed and "workflows/input/firered_cat.jpg" in packed
    )


def test_the_registry_gets_an_icon_and_a_banner_of_the_sizes_it_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    repository = project["project"]["urls"]["Repository"].removeprefix("https://github.com/")
    raw = f"https://raw.githubusercontent.com/{repository}/main/"
    links = [project["tool"]["comfy"][name] for name in ("Icon", "Banner")]
    icon, banner = (Image.open(ROOT / link.removeprefix(raw)).size for link in links)
    assert icon[0] == icon[1] <= 400
    assert banner[0] * 9 == banner[1] * 21


def test_the_registrys_action_publishes_for_the_publisher_when_the_project_file_changes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    action = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8"))
    (job,) = action["jobs"].values()
    assert f"'{project['tool']['comfy']['PublisherId']}'" in job["if"]
    assert action[True]["push"]["paths"] == ["pyproject.toml"]  # YAML reads the key `on` as true
    assert "secrets.REGISTRY_ACCESS_TOKEN" in job["steps"][-1]["with"]["personal_access_token"]


def test_the_version_is_the_changelogs_and_the_workflows() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for path in (ROOT / "workflows").glob("*.json"):
        nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
        ours = [node["properties"] for node in nodes if node["type"].startswith("FireRed")]
        assert {(node["cnr_id"], node["ver"]) for node in ours} == {("firered-image-edit", version)}


COMFYUI_MODULES = {"comfy", "comfy_api", "folder_paths", "nodes", "latent_preview", "server", "execution"}


def test_the_engine_knows_nothing_of_comfyui_and_host_is_the_one_door() -> None:
    engine = ROOT / "nodes" / "engine"
    for path in engine.rglob("*.py"):
        depth = len(path.relative_to(engine).parts)
        for level, module in imported_modules(path):
            assert level <= depth and (level or module.split(".")[0] not in COMFYUI_MODULES), (
                f"{path}: {module}"
            )
    for path in (ROOT / "nodes").glob("*.py"):  # not those of nodes/host
        core = {
            module.split(".")[0] for level, module in imported_modules(path) if not level
        } & COMFYUI_MODULES
        assert core <= {"comfy_api"}, f"{path.name} goes around host: {core}"


ROOMS = ("cards", "files", "cuda", "weights", "models", "sampling", "numerics", "planning", "cluster")


def test_the_engines_rooms_stand_on_those_before_them() -> None:
    engine = ROOT / "nodes" / "engine"
    packages = {path.parent.name for path in engine.glob("*/__init__.py")}
    assert packages == set(ROOMS)
    for path in engine.rglob("*.py"):
        *folders, _ = path.relative_to(engine).parts
        may_use = ROOMS[: ROOMS.index(folders[0]) + 1] if folders else ()
        for level, module in imported_modules(path):
            if level == len(folders) + 1:  # from the engine itself
                room = module.split(".")[0]
                assert room not in ROOMS or room in may_use, f"{path}: {module}"


def imported_modules(path: Path) -> list[tuple[int, str]]:
    """For each import of a file: how many levels up it starts, and the name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    plain = [
        (0, alias.name) for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    ]
    return plain + [
        (node.level, node.module or "") for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    ]


def test_importing_the_pack_costs_comfyui_less_than_a_second(server: Server, client: Client) -> None:
    (seconds,) = re.findall(r"([\d.]+) seconds: \S*firered-image-edit", server.text())
    assert float(seconds) < 1.0


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_a_worker_of_a_cluster_imports_only_what_the_transformer_needs(
    tiny: Checkpoint, precision: str
) -> None:
    """The other libraries take seconds and 300 MB. A process of its own is used, as this one has them."""
    code = """if True:
        import sys
        from engine.cluster.worker import EngineWorker
        worker = EngineWorker({"number": 1, "card": False, "threads": 1, "torch": {}})
        result = worker.sample(sys.stdin.buffer.read(), "run", 1, 0, None, "")
        assert result["latents"].isfinite().all()
        print(*sys.modules)
    """
    run = replace(plan(tiny), replica=replica_for(tiny, "transformer", precision))
    task = packed(Task(run, STOP).plain())
    environment = os.environ | {"PYTHONPATH": str(ROOT / "nodes"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], input=task, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    imported = set(done.stdout.decode().split())
    assert "torch" in imported
    assert not imported & {"diffusers", "transformers", "bitsandbytes", "peft", "scipy"}


def test_every_node_has_a_help_page(client: Client) -> None:
    for node in json.loads(SNAPSHOT.read_text(encoding="utf-8")):
        page = (ROOT / "nodes" / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
        assert page.startswith("# ") and len(page) > 300


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]])
def test_the_code_is_clean(command: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
