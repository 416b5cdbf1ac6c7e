"""Read and check the JSON files of a checkpoint, and add diffusers' defaults."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..latents import LATENT_CHANNELS, QWEN_STATISTICS, LatentStatistics

# The key of each config that names its class, and the name it must have if the key is there. transformers
# always writes `model_type`, but `architectures` in different places or not at all.
CLASS_KEYS = {
    "transformer": ("_class_name", "QwenImageTransformer2DModel"),
    "text_encoder": ("model_type", "qwen2_5_vl"),
    "vae": ("_class_name", "AutoencoderKLQwenImage"),
    "scheduler": ("_class_name", "FlowMatchEulerDiscreteScheduler"),
}
# diffusers' defaults of the numbers that these nodes read.
DEFAULTS: dict[str, dict[str, int | float]] = {
    "transformer": {
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
    },
    "vae": {"base_dim": 96},
    "scheduler": {
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "shift": 1.0,
    },
}
# The only values that these nodes compute. Another value must raise: it would change the picture silently.
SUPPORTED: dict[str, dict[str, int | bool]] = {
    "transformer": {
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "guidance_embeds": False,
        "use_additional_t_cond": False,
        "use_layer3d_rope": False,
    },
    "vae": {"z_dim": 16, "input_channels": 3},
    "scheduler": {"num_train_timesteps": 1000, "stochastic_sampling": False},
}
QUANTIZED_CONFIGS = ("quantization_config", "compression_config")
READ_METHODS = ("bitsandbytes",)  # of those; see stored.py


def copy_files(folder: Path, target: Path) -> Path:
    """Copy a folder's files into a new folder, and return it. The copies can be written."""
    target.mkdir()
    for path in filter(Path.is_file, folder.iterdir()):
        shutil.copyfile(path, target / path.name)
    return target


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk, in UTF-8 or UTF-16, with or without a byte order mark.

    Raises CheckpointError when the file is missing, unreadable or not a JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. Download this file again; the others can stay.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Download this file again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object. Download this file again.")
    return content


def read_config(folder: Path, role: str) -> dict[str, Any]:
    """A component's config.json (scheduler_config.json for the scheduler), checked.

    Raises CheckpointError for another model, for weights in a form that is not read here, and as
    checked_config does.
    """
    path = folder / ("scheduler_config.json" if role == "scheduler" else "config.json")
    config = read_json(path)
    key, expected = CLASS_KEYS[role]
    found = config.get(key) or expected
    if found != expected:
        raise CheckpointError(
            f"{folder} holds a {found}, not a {expected} ({path.name} says so). Download the original {role} "
            "folder."
        )
    for part in (config, config.get("text_config")):
        for name in QUANTIZED_CONFIGS:
            if isinstance(part, dict) and part.get(name) and not _is_read_here(part[name]):
                raise already_quantized(folder, f"{path.name} has a {name}")
    return checked_config(role, config, path)


def checked_config(role: str, config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The config with diffusers' defaults for what it leaves out. path: its source, for errors.

    Raises CheckpointError for a setting that these nodes do not compute.
    """
    for name, value in SUPPORTED.get(role, {}).items():
        if config.get(name, value) != value:
            raise CheckpointError(
                f"{path} sets {name} to {config[name]!r}; these nodes compute {value!r} only. Use the {role} "
                "folder of a FireRed-Image-Edit or Qwen-Image-Edit checkpoint."
            )
    config = DEFAULTS.get(role, {}) | config
    for name, default in DEFAULTS.get(role, {}).items():
        _require_number(path, name, config[name], whole=isinstance(default, int))
    if "axes_dims_rope" in config:
        _require_axes(path, config["axes_dims_rope"], config["attention_head_dim"])
    return config


def read_latent_statistics(path: Path) -> LatentStatistics:
    """The statistics in a VAE's config.json; Qwen-Image's where it has none.

    Raises CheckpointError unless they are one number for each channel.
    """
    config, given = read_json(path), []
    for name, default in (("latents_mean", QWEN_STATISTICS.mean), ("latents_std", QWEN_STATISTICS.std)):
        values = config.get(name, default)
        if not isinstance(values, list | tuple) or len(values) != LATENT_CHANNELS:
            raise CheckpointError(
                f"{path}: {name} is {values!r}; it must be a list of {LATENT_CHANNELS} numbers. Download "
                "this file again."
            )
        for value in values:
            _require_number(path, name, value, positive=name == "latents_std")
        given.append(tuple(map(float, values)))
    return LatentStatistics(*given)


def _is_read_here(quantization: object) -> bool:
    return isinstance(quantization, dict) and quantization.get("quant_method") in READ_METHODS


def already_quantized(folder: Path, sign: str) -> CheckpointError:
    """The error for weights that another program quantised. sign: how the files show it."""
    return CheckpointError(
        f"{folder} is quantised already ({sign}), in a form these nodes do not read. Download the original "
        f"folder with BF16 weights; the loader's precision (int8 or nf4) makes them as small."
    )


def _require_axes(path: Path, axes: object, head_size: int) -> None:
    """Raise CheckpointError unless the axes are three even numbers that add up to a head's channels."""
    whole = isinstance(axes, list | tuple) and all(isinstance(axis, int) and axis > 0 for axis in axes)
    if not whole or any(axis % 2 for axis in axes) or sum(axes) != head_size or len(axes) != 3:  # type: ignore
        raise CheckpointError(
            f"{path}: axes_dims_rope is {axes!r}; it must be three even numbers that add up to {head_size}. "
            "Download this file again."
        )


def _require_number(
    path: Path, name: str, value: object, whole: bool = False, positive: bool = False
) -> None:
    kind = int if whole else int | float
    good = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    if not good or ((whole or positive) and value <= 0):  # type: ignore[operator]
        wanted = "a whole number above 0" if whole else "a number above 0" if positive else "a number"
        raise CheckpointError(f"{path}: {name} is {value!r}; it must be {wanted}. Download this file again.")
