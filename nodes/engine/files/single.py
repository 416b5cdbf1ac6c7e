"""Single files with the weights of one component, as ComfyUI's folders have them: .safetensors and .gguf.

What such a file is, is read off its tensors' names. What it lacks is in `published/`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import AGAIN, CheckpointError
from ..latents import QWEN_STATISTICS, LatentStatistics
from . import gguf
from .checkpoint import SHARD, TOKENIZER_FILES, Checkpoint, Component, download_hint
from .configs import checked_config, copy_files, read_json
from .encodings import Plain, Stored
from .identity import Content, file_content, file_identity, folder_identity
from .stored import stored_tensors
from .tensors import file_version, read_header, without_prefix

PUBLISHED = Path(__file__).with_name("published")
SUFFIXES = (".safetensors", ".sft", gguf.SUFFIX)
TIMESTEP_ZERO = "__index_timestep_zero__"  # marks a model whose references are modulated at timestep 0
# How names of the language model and of the vision tower begin: by ComfyUI, and by newer transformers.
TEXT_ENCODER_NAMES = (("model.", "visual."), ("model.language_model.", "model.visual."))
# Names that only this component's files have. A single shard lacks some of them.
SIGNS = (
    (
        "transformer",
        (
            "txt_norm.weight",
            "img_in.weight",
            "transformer_blocks.0.attn.add_k_proj.weight",
            "proj_out.weight",
        ),
    ),
    *(
        (
            "text_encoder",
            (
                f"{vision}patch_embed.proj.weight",
                f"{text}layers.0.self_attn.k_proj.weight",
                f"{text}norm.weight",
            ),
        )
        for text, vision in TEXT_ENCODER_NAMES
    ),
    ("vae", ("decoder.middle.0.residual.0.gamma",)),
    ("vae", ("decoder.mid_block.resnets.0.norm1.gamma",)),  # under diffusers' names
)
# What other files in the same folders are, by a name that their tensors begin with or have.
OTHERS = {
    "a ControlNet": r"controlnet_blocks\.",
    "a file in nunchaku's own form": r".*\.(qweight|wscales)",
    "FLUX": r"double_blocks\.|single_transformer_blocks\.",
    "Stable Diffusion 3": r"joint_blocks\.",
    "Wan": r"blocks\.0\.cross_attn\.",
    "Stable Diffusion": r"input_blocks\.|down_blocks\.",
    "a text encoder as GGUF, which is not read here": r"blk\.0\.|v\.blk\.0\.",
    "another text encoder": r"(text_model|encoder)\.(encoder\.layers|block)\.0\.|model\.layers\.0\.",
    "another VAE": r"(encoder|decoder)\.(conv_in|down|mid|up|conv1)",
}
AXES = (16, 56, 56)  # of the published heads of 128 channels
TEXT_HEAD, VISION_HEAD = 128, 80  # channels of Qwen2.5-VL's attention heads


@dataclass(frozen=True)
class FileComponent(Component):
    """A component in one file. path: the file."""

    def config(self) -> dict[str, Any]:
        """What its config.json would say, from its tensors. Raises CheckpointError for another model."""
        return checked_config(self.name, CONFIGS[self.name](self), self.path)

    def stored(self) -> Mapping[str, Stored]:
        return _renamed(self.path, self.name, file_version(self.path))

    def identity(self) -> str:
        return hashlib.sha256(repr(file_identity(self.path)).encode()).hexdigest()[:16]

    def content(self) -> Content:
        return file_content(self.path)

    def _shard_paths(self) -> list[Path]:
        return [self.path]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor. Raises CheckpointError when the file lacks it."""
        stored = self.stored().get(name)
        if stored is None:
            raise CheckpointError(f"{self.path} lacks {name}. {AGAIN}")
        return stored.shape

    def count(self, pattern: str) -> int:
        """How many numbers the pattern's group finds in the names: the depth of a model."""
        return len({match[1] for name in self.stored() if (match := re.match(pattern, name))})


@dataclass(frozen=True)
class PublishedComponent(Component):
    """A component that another file has, as it was published: for plans only. path: its config's folder."""

    def config(self) -> dict[str, Any]:
        return checked_config(self.name, _published_config(self.name), self.path)

    def stored(self) -> Mapping[str, Stored]:
        return _published_tensors(self.name)

    def shards(self) -> list[Path]:
        return []

    def identity(self) -> str:
        return "published"


@dataclass(frozen=True)
class PublishedProcessor(Component):
    """The processor of the published text encoder, with a tokenizer's files. path: the tokenizer's folder."""

    def identity(self) -> str:
        return f"{folder_identity(self.path)}-{folder_identity(PUBLISHED)}"

    @property
    def needed(self) -> tuple[tuple[str, ...], ...]:
        return (TOKENIZER_FILES,)

    @contextlib.contextmanager
    def readable(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as temporary:
            folder = copy_files(self.path, Path(temporary, "processor"))
            pictures = read_json(PUBLISHED / "preprocessor_config.json")
            videos = pictures | {"video_processor_type": "Qwen2VLVideoProcessor"}
            for name, content in (("preprocessor", pictures), ("video_preprocessor", videos)):
                (folder / f"{name}_config.json").write_text(json.dumps(content), encoding="utf-8")
            yield folder


@dataclass(frozen=True)
class FileCheckpoint(Checkpoint):
    """A file as a checkpoint of one component. folder: the file. role: what it holds.

    tokenizer: a folder with the tokenizer's files, which a text encoder needs.
    """

    role: str
    tokenizer: Path | None = None

    @property
    def name(self) -> str:
        return self.folder.stem

    def component(self, name: str) -> Component:
        """The file's own component; of others what was published, for plans. Raises CheckpointError."""
        if name == self.role:
            return FileComponent(self.folder, name)
        if name == "scheduler":
            return Component(PUBLISHED, name)
        if name == "processor":
            if self.tokenizer is None or not self.tokenizer.is_dir():
                raise CheckpointError(
                    f"{self.folder.name} has no tokenizer, and ComfyUI's own is not there. Update ComfyUI, "
                    f"or use a folder. {download_hint()}"
                )
            return PublishedProcessor(self.tokenizer, name)
        return PublishedComponent(PUBLISHED, name)

    def latent_statistics(self) -> LatentStatistics:
        return QWEN_STATISTICS


def role_of(path: Path) -> str | None:
    """The component that a file holds; None for a file of another kind, or one that cannot be read."""
    try:
        return _role(path, file_version(path))
    except CheckpointError:
        return None


@functools.lru_cache(maxsize=4096)
def _role(path: Path, version: object) -> str | None:
    """version: makes the cache look at a changed file again."""
    names = without_prefix(read_header(path).tensors).keys()
    return next((role for role, signs in SIGNS if names >= set(signs)), None)


def open_file(path: Path, role: str, tokenizer: Path | None = None) -> FileCheckpoint:
    """The file as a checkpoint of that component. Raises CheckpointError that says what it is instead."""
    if not is_weight_file(path.name):
        raise CheckpointError(
            f"{path.name} is neither .safetensors nor .gguf. Other formats can run programs when they are "
            "read: use one of these."
        )
    header, found = read_header(path), role_of(path)  # a damaged file raises here
    if found == role:
        return FileCheckpoint(path, role, tokenizer)
    wanted = role.replace("_", " ")
    if found is not None:
        raise CheckpointError(f"{path.name} is a {found.replace('_', ' ')}, not a {wanted}.")
    if SHARD.fullmatch(path.name):
        raise CheckpointError(
            f"{path.name} is one part of several. Use one file with all parts, or the diffusers folder that "
            f"it is from. {download_hint()}"
        )
    names = without_prefix(header.tensors)
    kind = next((kind for kind, sign in OTHERS.items() if any(re.match(sign, name) for name in names)), None)
    what = f"It looks like {kind}." if kind else f"Its first tensor is {next(iter(names), 'missing')}."
    raise CheckpointError(
        f"{path.name} is not the {wanted} of FireRed or Qwen-Image-Edit. {what} {download_hint()}"
    )


def is_weight_file(name: str) -> bool:
    """Whether a file of that name may hold a component."""
    return name.lower().endswith(SUFFIXES)


@functools.lru_cache(maxsize=16)
def _renamed(path: Path, role: str, version: object) -> Mapping[str, Stored]:
    """The tensors of a file under the names of the component's folder. version: as in _role."""
    renamed = dict(stored_tensors([path]))
    renamed.pop(TIMESTEP_ZERO, None)
    if role == "vae":
        from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

        return convert_wan_vae_to_diffusers(renamed)
    return renamed


def _transformer_config(component: FileComponent) -> dict[str, Any]:
    head = component.shape("transformer_blocks.0.attn.norm_q.weight")[0]
    width, channels = component.shape("img_in.weight")
    names = without_prefix(read_header(component.path).tensors)
    return {
        "num_layers": component.count(r"transformer_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": component.shape("txt_norm.weight")[0],
        "in_channels": channels,
        "axes_dims_rope": [axis * head // sum(AXES) for axis in AXES],
        "guidance_embeds": any("guidance_embedder" in name for name in names),
        "use_additional_t_cond": any("addition_t_embedding" in name for name in names),
        "zero_cond_t": TIMESTEP_ZERO in names,
    }


def _text_encoder_config(component: FileComponent) -> dict[str, Any]:
    """The published one with the sizes of the file."""
    config = read_json(PUBLISHED / "text_encoder.json")
    text, vision = TEXT_ENCODER_NAMES["model.language_model.norm.weight" in component.stored()]
    words, width = component.shape(f"{text}embed_tokens.weight")
    patches = component.shape(f"{vision}patch_embed.proj.weight")[0]
    depth = component.count(re.escape(f"{vision}blocks.") + r"(\d+)\.")
    layer, block = f"{text}layers.0.", f"{vision}blocks.0."
    config["text_config"] |= {
        "hidden_size": width,
        "intermediate_size": component.shape(f"{layer}mlp.gate_proj.weight")[0],
        "num_hidden_layers": component.count(re.escape(f"{text}layers.") + r"(\d+)\."),
        "num_attention_heads": component.shape(f"{layer}self_attn.q_proj.weight")[0] // TEXT_HEAD,
        "num_key_value_heads": component.shape(f"{layer}self_attn.k_proj.weight")[0] // TEXT_HEAD,
        "vocab_size": words,
    }
    whole = [index for index in config["vision_config"]["fullatt_block_indexes"] if index < depth]
    config["vision_config"] |= {
        "depth": depth,
        "hidden_size": patches,
        "num_heads": patches // VISION_HEAD,
        "intermediate_size": component.shape(f"{block}mlp.gate_proj.weight")[0],
        "out_hidden_size": width,
        "fullatt_block_indexes": whole,
    }
    return config


def _vae_config(component: FileComponent) -> dict[str, Any]:
    return {
        "base_dim": component.shape("encoder.conv_in.weight")[0],
        "z_dim": component.shape("post_quant_conv.weight")[0],
        "input_channels": component.shape("encoder.conv_in.weight")[1],
    }


CONFIGS: dict[str, Callable[[FileComponent], dict[str, Any]]] = {
    "transformer": _transformer_config,
    "text_encoder": _text_encoder_config,
    "vae": _vae_config,
}


def _published_config(role: str) -> dict[str, Any]:
    """diffusers' defaults are the published transformer and VAE."""
    return read_json(PUBLISHED / "text_encoder.json") if role == "text_encoder" else {}


@functools.cache
def _published_tensors(role: str) -> Mapping[str, Stored]:
    """The tensors of a published component, in BF16, without any file."""
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    with init_empty_weights():
        if role == "text_encoder":
            config = transformers.Qwen2_5_VLConfig.from_dict(_published_config(role))
            model: Any = transformers.Qwen2_5_VLModel(config)
        elif role == "vae":
            model = diffusers.AutoencoderKLQwenImage()
        else:
            model = diffusers.QwenImageTransformer2DModel()
    return {
        name: Stored(Plain(torch.bfloat16), tuple(parameter.shape), {}, 2 * parameter.numel())
        for name, parameter in model.named_parameters()
    }
