"""Check a component's files before anything is loaded from them."""

from __future__ import annotations

import re

from ..errors import CheckpointError
from ..files.checkpoint import Checkpoint
from ..files.configs import already_quantized, read_json
from ..files.tensors import DTYPES, read_header
from .names import FOLDED, model_name

# Tensors only of quantised checkpoints, by bitsandbytes, compressed-tensors, ComfyUI, GPTQ, AWQ or nunchaku.
QUANTIZED = re.compile(
    r"scaled_fp8|.*\.(SCB|weight_format|(nested_)?absmax|(nested_)?quant_map|quant_state\..*|weight_scale|"
    r"input_scale|scale_weight|scale_input|comfy_quant|weight_packed|qweight|qzeros|wscales)"
)
# One of each is needed. transformers 5 writes the first processor file, transformers 4 the second.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


def require_usable(role: str, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError naming a file of the component that is missing, damaged or not readable here."""
    component = checkpoint.component(role)
    component.config()
    for shard in component.shards():
        for name, info in read_header(shard).items():
            if QUANTIZED.fullmatch(name):
                raise already_quantized(component.folder, f"it holds {name}")
            needed = FOLDED.match(name) or model_name(role, name) is not None
            if needed and info["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"{shard}: {name} is stored as {info['dtype']}, which these nodes do not read. Download "
                    f"the original folder with BF16 weights."
                )


def require_beside(role: str, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError naming a missing or damaged file that the component needs from other folders."""
    if role == "transformer":
        checkpoint.component("scheduler").config()
        checkpoint.latent_statistics()
    if role == "text_encoder":
        folder = checkpoint.component("processor").folder
        for names in (PROCESSOR_FILES, TOKENIZER_FILES):
            if not any((folder / name).is_file() for name in names):
                raise CheckpointError(
                    f"{folder} has no {' or '.join(names)}. Download this folder again; the others can stay."
                )
        for path in folder.glob("[!.]*config.json"):
            read_json(path)
