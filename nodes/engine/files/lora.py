"""LoRA files: which layers they change, whatever program wrote them. Nothing is read but headers and alphas.

Layer names come as peft and diffusers write them (`transformer_blocks.0.attn.to_q.lora_A.weight`), with a
prefix or an adapter's name in between (DiffSynth, ai-toolkit), as `lora_down` and `lora_up` with alphas
(lightx2v), or with underscores for dots (kohya, musubi).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from ..errors import AGAIN, CheckpointError, InputError
from .identity import file_identity
from .tensors import DTYPES, TRANSFORMER_PREFIXES, read_header, read_tensors, stored_bytes

PREFIXES = (
    "base_model.model.",
    *TRANSFORMER_PREFIXES,
    "pipe.dit.",
    "transformer.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
FACTOR = re.compile(r"(?P<layer>.+)\.(?P<factor>lora_A|lora_B|lora_down|lora_up)(\.\w+)?\.weight")
ALPHA = re.compile(r"(?P<layer>.+)\.(lora_)?alpha")
DOWN = ("lora_A", "lora_down")
METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's configuration
# What other ways of training add; the kinds of change that are not a product of two matrices.
OTHER_KINDS = {
    "DoRA": re.compile(r"dora_scale|lora_magnitude_vector"),
    "LoKr": re.compile(r"\.lokr_"),
    "LoHa": re.compile(r"\.hada_"),
    "OFT": re.compile(r"\.oft_|\.oft_blocks"),
    "a full difference": re.compile(r"\.diff(_b|_m)?$|\.set_weight$"),
    "a bias": re.compile(r"lora_[AB](\.\w+)?\.bias$|lora_(up|down)\.bias$"),
    "the timestep embedding": re.compile(r"time_text_embed|timestep_embedder"),
    "the text encoder": re.compile(r"(^|\.)(lora_te\d*_|text_encoders?\.)"),
}
MAX_NAMED = 3
SUFFIX = ".safetensors"


class Factors(NamedTuple):
    """A layer's change: scale * up @ down.

    down, up: names in the file of matrices (rank, in) and (out, rank). scale: alpha / rank.
    """

    down: str
    up: str
    rank: int
    scale: float


@dataclass(frozen=True)
class LoRA:
    """A LoRA file for one transformer.

    identity: as lora_identity gives it. layers: the changed ones, by their names in the model. nbytes: of
    their factors. left_out: what else the file holds, in words.
    """

    path: Path
    identity: tuple[tuple[int, int, str], ...]
    layers: Mapping[str, Factors]
    nbytes: int
    left_out: str = ""

    @property
    def name(self) -> str:
        return self.path.stem

    def require_unchanged(self) -> None:
        """Raise CheckpointError where the file is another one than was opened."""
        if lora_identity(self.path) != self.identity:
            raise CheckpointError(f"{self.path} changed while it was in use. Run the prompt again.")


def lora_identity(path: Path) -> tuple[tuple[int, int, str], ...]:
    """What changes with the content of a LoRA's file, or of peft's configuration beside it. Never raises."""
    return tuple(map(file_identity, lora_files(path)))


def lora_files(path: Path) -> list[Path]:
    """The LoRA's file, and peft's configuration beside it if there is one."""
    return [each for each in (path, _configuration_beside(path)) if each is not None]


def is_lora_name(name: str) -> bool:
    """Whether a file of that name may be a LoRA."""
    return name.lower().endswith(SUFFIX)


def open_lora(path: Path, layers: Mapping[str, tuple[int, int]]) -> LoRA:
    """Find the factors of each layer in a file.

    layers: the transformer's linear layers by name, each with its outputs and inputs. Raises InputError for a
    file of another kind or for another model, and CheckpointError for one that is damaged.
    """
    if not is_lora_name(path.name):
        raise InputError(
            f"{path.name} is no .safetensors file. Other formats can run programs when they are read: use "
            "the LoRA's .safetensors file."
        )
    identity, header = lora_identity(path), read_header(path).tensors
    found: dict[str, dict[str, str]] = {}
    others: list[str] = []
    alphas: dict[str, str] = {}
    known = {spelling: name for name in layers for spelling in (name, name.replace(".", "_"))}
    for key in header:
        match = FACTOR.fullmatch(key) or ALPHA.fullmatch(key)
        layer = _layer(match["layer"], known) if match else None
        if match is None or layer is None:
            others.append(key)
        elif "factor" in match.groupdict():
            halves, half = found.setdefault(layer, {}), "down" if match["factor"] in DOWN else "up"
            if half in halves:
                raise InputError(f"{path.name} has two LoRAs for {layer}: {halves[half]} and {key}. Use one.")
            halves[half] = key
        else:
            alphas[layer] = key
    _require_supported(path, found, others)
    scales = _Scales(path, alphas)
    factors = {
        layer: _factors(path, layer, layers[layer], keys, header, scales) for layer, keys in found.items()
    }
    nbytes = sum(stored_bytes(header[key]) for keys in found.values() for key in keys.values())
    return LoRA(path, identity, factors, nbytes, _described(others))


def _layer(name: str, known: Mapping[str, str]) -> str | None:
    """The transformer's layer that a key's name means."""
    stripped, before = name, ""
    while stripped != before:
        before = stripped
        for prefix in PREFIXES:
            stripped = stripped.removeprefix(prefix)
    return known.get(stripped)


def _require_supported(path: Path, found: Mapping[str, Any], others: list[str]) -> None:
    kinds = [kind for kind, pattern in OTHER_KINDS.items() if any(map(pattern.search, others))]
    if "DoRA" in kinds:  # its factors alone are not what was trained
        raise InputError(f"{path.name} is a DoRA, which these nodes do not apply. Use a plain LoRA.")
    if found:
        return
    if kinds:
        raise InputError(
            f"{path.name} has no LoRA for the transformer. It holds {' and '.join(kinds)}, which these nodes "
            "do not apply."
        )
    if not others:
        raise InputError(f"{path.name} holds no factors of a LoRA. {AGAIN}")
    raise InputError(
        f"{path.name} is no LoRA for this transformer: none of its {len(others)} tensors belongs to one of "
        f"its layers. They are called {_listed(others)}. Use a LoRA made for Qwen-Image-Edit or FireRed."
    )


def _factors(
    path: Path,
    layer: str,
    shape: tuple[int, int],
    keys: Mapping[str, str],
    header: Mapping[str, dict[str, Any]],
    scales: _Scales,
) -> Factors:
    """A layer's factors, checked."""
    if len(keys) != 2:
        raise CheckpointError(f"{path} has {next(iter(keys.values()))} but not its other half. {AGAIN}")
    down, up = (header[keys[half]]["shape"] for half in ("down", "up"))
    outputs, inputs = shape
    if len(down) != 2 or len(up) != 2:
        raise InputError(
            f"{path.name} was made for convolutions: the factors of {layer} have the shapes {down} and {up}. "
            "Use a LoRA made for Qwen-Image-Edit or FireRed."
        )
    if down[0] != up[1] or not down[0]:
        raise CheckpointError(
            f"{path}: the factors of {layer} have the shapes {down} and {up}, which share no rank. {AGAIN}"
        )
    if (up[0], down[1]) != (outputs, inputs):
        raise InputError(
            f"{path.name} was made for another model: its {layer} has {down[1]} inputs and {up[0]} outputs, "
            f"this transformer's has {inputs} and {outputs}."
        )
    for half in keys.values():
        dtype = DTYPES.get(header[half]["dtype"])
        if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
            stored = header[half]["dtype"]
            raise CheckpointError(f"{path}: {half} is stored as {stored}. Use a file in BF16, FP16 or FP32.")
    return Factors(keys["down"], keys["up"], down[0], scales.of(layer, down[0]))


class _Scales:
    """What the products are multiplied by: alpha / rank, by tensors or by peft's configuration, else 1."""

    def __init__(self, path: Path, alphas: Mapping[str, str]):
        self._path = path
        names = {key: layer for layer, key in alphas.items()}
        self._alphas = {names[key]: float(value) for key, value in _read_scalars(path, names)}
        self._config = _peft_configuration(path)
        if self._config.get("use_dora"):
            raise InputError(f"{path.name} is a DoRA, which these nodes do not apply. Use a plain LoRA.")

    def of(self, layer: str, rank: int) -> float:
        """Raises CheckpointError for an alpha that is no number."""
        alpha = self._alphas.get(layer)
        if alpha is None:
            alpha = self._pattern_alpha(layer) or self._config.get("lora_alpha", rank)
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise CheckpointError(f"{self._path}: the alpha of {layer} is {alpha!r}. {AGAIN}")
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _pattern_alpha(self, layer: str) -> Any:
        """The alpha that peft's configuration gives for a layer, by regular expressions of names."""
        patterns = self._config.get("alpha_pattern")
        try:
            named = patterns.items() if isinstance(patterns, dict) else ()
            return next((alpha for name, alpha in named if re.search(rf"(^|\.)({name})$", layer)), None)
        except re.error as error:
            raise CheckpointError(f"{self._path}: its alpha_pattern is damaged ({error}). {AGAIN}") from error


def _read_scalars(path: Path, names: Iterable[str]) -> Iterable[tuple[str, float]]:
    wanted = set(names)
    for key, tensor in read_tensors(path, lambda name: name in wanted):
        if tensor.numel() != 1:
            raise CheckpointError(f"{path}: {key} is no number. {AGAIN}")
        yield key, tensor.float().item()


def _peft_configuration(path: Path) -> dict[str, Any]:
    """What diffusers wrote into the file, or peft beside it."""
    try:
        with safe_open(path, framework="pt") as file:
            written = (file.metadata() or {}).get(METADATA)
        if written is not None:
            content = json.loads(written)
            return {key.removeprefix("transformer."): value for key, value in content.items()}
        beside = _configuration_beside(path)
        if beside is not None:
            return dict(json.loads(beside.read_text(encoding="utf-8")))
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its configuration cannot be read ({error}). {AGAIN}") from error
    return {}


def _configuration_beside(path: Path) -> Path | None:
    """peft's configuration, which belongs to a file of one name only."""
    beside = path.with_name("adapter_config.json")
    return beside if path.name == "adapter_model.safetensors" and beside.is_file() else None


def _described(others: list[str]) -> str:
    """What of a file is left out, for the log: "12 of LoKr, 3 others (a, b, c)"."""
    counts: Counter[str] = Counter()
    unknown = []
    for key in others:
        kind = next((kind for kind, pattern in OTHER_KINDS.items() if pattern.search(key)), None)
        if kind:
            counts[kind] += 1
        else:
            unknown.append(key)
    said = [f"{count} of {kind}" for kind, count in counts.items()]
    return ", ".join([*said, *([f"{len(unknown)} unknown ({_listed(unknown)})"] if unknown else [])])


def _listed(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMED]) + (" and so on" if len(names) > MAX_NAMED else "")
