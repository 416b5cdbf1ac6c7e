"""A checkpoint's text encoder and processor rewritten as transformers 4.57.6 stores them.

Compared with what transformers 5 writes: `architectures` only inside text_config, `rope_scaling` with
`rope_theta` beside it, another model_type of the vision part, and a processor in many files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def rewrite_as_transformers_4(folder: Path) -> None:
    """Rewrite text_encoder/config.json, processor/ and tokenizer/ of the checkpoint in `folder`."""
    config = folder / "text_encoder" / "config.json"
    write_json(config, text_encoder_config(read(config)))
    for name in ("processor", "tokenizer"):
        _rewrite_tokenizer(folder / name)
    stored = read(folder / "processor" / "processor_config.json")
    for part, name in (("image_processor", "preprocessor"), ("video_processor", "video_preprocessor")):
        described = stored[part] | {"processor_class": "Qwen2VLProcessor"}
        size = described["size"]
        described |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        described.pop("max_video_tokens", None)
        write_json(folder / "processor" / f"{name}_config.json", described)
    (folder / "processor" / "processor_config.json").unlink()


def text_encoder_config(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4.57.6 writes the config of a model built from such a config."""
    text, vision = dict(config["text_config"]), dict(config["vision_config"])
    text["architectures"] = config["architectures"]
    rope = dict(text.pop("rope_parameters"))
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope | {"type": rope["rope_type"]}
    vision.pop("rope_parameters")
    vision["model_type"] = "qwen2_5_vl"
    rest = {name: value for name, value in config.items() if name != "architectures"}
    return rest | {"text_config": text, "vision_config": vision, "transformers_version": "4.57.6"}


def flat_text_encoder_config(config: dict[str, Any]) -> dict[str, Any]:
    """As Qwen's own first upload has it: what text_config holds lies at the top."""
    older = text_encoder_config(config)
    text = older.pop("text_config")
    return text | older


def _rewrite_tokenizer(folder: Path) -> None:
    stored = read(folder / "tokenizer_config.json")
    whole = read(folder / "tokenizer.json")
    special = stored.pop("extra_special_tokens")
    for name in ("backend", "add_prefix_space"):
        stored.pop(name, None)
    added = {token["id"]: {k: v for k, v in token.items() if k != "id"} for token in whole["added_tokens"]}
    stored |= {"added_tokens_decoder": added, "additional_special_tokens": special, "errors": "replace"}
    write_json(folder / "tokenizer_config.json", stored)
    ends = {name: stored[name] for name in ("eos_token", "pad_token", "unk_token")}
    write_json(folder / "special_tokens_map.json", ends | {"additional_special_tokens": special})
    write_json(folder / "vocab.json", whole["model"]["vocab"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
