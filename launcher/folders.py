"""ComfyUI's folder, and the work folder with its models, pictures and node packs."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACK_FOLDER = "firered-image-edit"
EXAMPLE_PHOTO = "firered_cat.jpg"


def comfyui_folder() -> Path:
    """ComfyUI's folder, as run.py found or fetched it."""
    return _folder_from("COMFYUI_PATH")


def work_folder() -> Path:
    """The folder where run.py keeps this checkout's inputs, outputs and demo models."""
    return _folder_from("FIRERED_WORK")


def _folder_from(variable: str) -> Path:
    if variable not in os.environ:
        raise SystemExit(f"{variable} is not set: start this through run.py.")
    return Path(os.environ[variable])


def prepare_work_folder(comfyui: Path, work: Path) -> None:
    """Link this pack into the work folder, and copy the example pictures into its input folder."""
    for name in ("custom_nodes", "input", "output", "user", "models/diffusers"):
        (work / name).mkdir(parents=True, exist_ok=True)
    if not (work / "custom_nodes" / PACK_FOLDER).exists():
        add_pack(work, ROOT, PACK_FOLDER)
    for picture in [comfyui / "input" / "example.png", *(ROOT / "workflows" / "input").glob("*.??g")]:
        if picture.is_file() and not (work / "input" / picture.name).exists():
            shutil.copy(picture, work / "input")
    folders = "".join(f"  {path.name}: {path.name}\n" for path in sorted((comfyui / "models").glob("*/")))
    paths = f"comfyui:\n  base_path: {(comfyui / 'models').as_posix()}\n{folders}"
    extra_model_paths(work).write_text(paths, encoding="utf-8")


def extra_model_paths(work: Path) -> Path:
    """The file in a work folder that tells ComfyUI to list its own models too."""
    return work / "extra_model_paths.yaml"


def add_pack(work: Path, pack: Path, name: str = "") -> None:
    """Link a node pack into the work folder. name: the link's, the pack folder's by default."""
    (work / "custom_nodes").mkdir(parents=True, exist_ok=True)
    link_folder(work / "custom_nodes" / (name or pack.name), pack)


def link_folder(link: Path, target: Path) -> None:
    """Make a symbolic link, or on Windows a junction, which needs no administrator. Replaces an old link."""
    if sys.platform == "win32":
        import _winapi

        if os.path.lexists(link):
            link.rmdir()  # removes the junction, not its target
        _winapi.CreateJunction(str(target), str(link))
    else:
        link.unlink(missing_ok=True)
        link.symlink_to(target, target_is_directory=True)
