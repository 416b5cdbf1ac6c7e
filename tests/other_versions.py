"""A tiny checkpoint's files rewritten: as other versions of transformers store them, or with other values.

tiny_checkpoint writes a form that transformers 4 and 5 both read: `rope_scaling` and `rope_theta`, and a
processor in several files.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


def rewrite_as_transformers_5(folder: Path) -> None:
    """Rewrite text_encoder/config.json, processor/ and tokenizer/ as save_pretrained of 5.24 writes them."""
    config = folder / "text_encoder" / "config.json"
    stored = read(config)
    text = stored["text_config"]
    text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    write_json(config, stored)
    for name in ("processor", "tokenizer"):
        _rewrite_tokenizer(folder / name)
    processor = {"processor_class": "Qwen2VLProcessor"}
    for part, name in (("image_processor", "preprocessor"), ("video_processor", "video_preprocessor")):
        path = folder / "processor" / f"{name}_config.json"
        processor[part] = read(path)
        path.unlink()
    write_json(folder / "processor" / "processor_config.json", processor)


def _rewrite_tokenizer(folder: Path) -> None:
    """One file instead of three, and special tokens under another name."""
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    stored = read(folder / "tokenizer_config.json")
    del stored["added_tokens_decoder"]
    stored |= {"extra_special_tokens": stored.pop("additional_special_tokens"), "backend": "tokenizers"}
    write_json(folder / "tokenizer_config.json", stored)


def nest_architectures(config: dict[str, Any]) -> dict[str, Any]:
    """The text encoder's config as transformers 4.57 writes it for a model that was built from it."""
    text = config["text_config"] | {"architectures": config["architectures"]}
    vision = config["vision_config"] | {"model_type": "qwen2_5_vl"}
    rest = {name: value for name, value in config.items() if name != "architectures"}
    return rest | {"text_config": text, "vision_config": vision, "transformers_version": "4.57.6"}


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """The text encoder's config as in Qwen's first upload: the keys of text_config are at the top level."""
    rest = {name: value for name, value in config.items() if name != "text_config"}
    return config["text_config"] | rest


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def change_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = read(path) | values
    write_json(path, {name: value for name, value in content.items() if value is not None})


def rename_dtype(path: Path, tensor: str, dtype: str) -> None:
    """Change the dtype of a tensor in the header of a safetensors file, and leave its bytes."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header[tensor]["dtype"] = dtype
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])
