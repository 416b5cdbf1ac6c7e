"""What a loader node hands on: a small frozen description of one component, not the component itself."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from ..errors import CheckpointError, FireRedError
from ..files.checkpoint import DTYPES, Checkpoint, already_quantized, read_header, read_json, stored_bytes
from ..units import GIB
from .estimates import RESERVED_BYTES, Edit, workspace_bytes
from .precision import ROLE_PRECISIONS, Card, Precision, resolve

# How transformers has stored Qwen2.5-VL over the years, as prefixes of its tensors' names. Its output head is
# left out: embeddings are what goes into it.
TEXT_ENCODER_PREFIXES = {
    "model.language_model.": "language_model.",
    "model.visual.": "visual.",
    "visual.": "visual.",
    "model.": "language_model.",
    "language_model.": "language_model.",
}
# What depends on the timestep alone: folded, see modulation.py.
FOLDED = re.compile(r"(transformer_blocks\.\d+\.(img|txt)_mod|norm_out|time_text_embed)\.")
CONV_3D = 5  # dimensions of its weight
# What other libraries store beside or instead of a weight: bitsandbytes, compressed-tensors, ComfyUI, GPTQ,
# AWQ, nunchaku.
QUANTIZED = re.compile(
    r"scaled_fp8|.*\.(SCB|weight_format|(nested_)?absmax|(nested_)?quant_map|quant_state\..*|weight_scale|"
    r"input_scale|scale_weight|scale_input|comfy_quant|weight_packed|qweight|qzeros|wscales)"
)
# A processor as transformers 5 and 4 store it, and its tokenizer.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
BIG_MATRICES = {
    "transformer": re.compile(r"transformer_blocks\..*\.weight"),
    "text_encoder": re.compile(r"language_model\.layers\..*_proj\.weight"),
}


ESTIMATE_ERROR = 0.03  # of working bytes: what may be less than estimated is not refused


class DoesNotFitError(FireRedError):
    """A component too big for its card, found before anything was loaded."""


@dataclass(frozen=True)
class ComponentSpec:
    """A component of a checkpoint at a chosen precision on a chosen device; equal specs share one copy in
    memory.

    role: the component's folder in the checkpoint, `transformer`, `text_encoder` or `vae`.
    identity: of that folder's files, so that replaced files are loaded anew.
    processor: the identity of the files that a text encoder is loaded with, beside its own.
    """

    role: str
    checkpoint: Checkpoint
    precision: Precision
    device: torch.device
    card: Card
    identity: str
    processor: str = ""

    def __str__(self) -> str:
        """As people read it in logs and errors: "transformer int8, fp32 math, on gpu:0 (Tesla P40)"."""
        math = str(self.math).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")
        if self.precision.fp16_inside:
            math += " and fp16"
        shown = self.precision.name if math == self.precision.name else f"{self.precision.name}, {math} math,"
        return f"{self.role.replace('_', ' ')} {shown} on {self.card}"

    @property
    def math(self) -> torch.dtype:
        """The dtype of its arithmetic."""
        return self.precision.math

    @property
    def fused(self) -> bool:
        """Whether its attention runs without holding all its scores."""
        return (self.role, self.math) not in self.card.unfused

    def nbytes(self) -> int:
        """About how many bytes the weights take once loaded, read off the files' headers."""
        total = 0.0
        for stored, info in self.checkpoint.component(self.role).stored().items():
            name = model_name(self.role, stored)
            if name is None:
                continue
            numel = torch.Size(info["shape"]).numel()
            if self.role == "vae" and len(info["shape"]) == CONV_3D:
                # for single frames one time tap is kept, and nothing across time (layers.keep_single_frames)
                numel = 0 if "time_conv" in name else numel // info["shape"][2]
            if len(info["shape"]) != 2 or not name.endswith(".weight"):
                total += numel * self.math.itemsize
            elif self.precision.format and is_big_matrix(self.role, name):
                total += numel * self.precision.weight_bytes
            else:
                storage = self.precision.storage
                total += numel * storage.itemsize if storage else stored_bytes(info)
        return int(total)

    def require_unchanged(self) -> None:
        """Raise CheckpointError where the files are not those that this describes.

        What is made from them is kept under the identities above, and must not come from other files.
        """
        if (self.identity, self.processor) != identities(self.role, self.checkpoint):
            raise CheckpointError(
                f"The files of the {self.role.replace('_', ' ')} in {self.checkpoint.folder} changed while "
                f"they were in use. Run the prompt again."
            )


def identities(role: str, checkpoint: Checkpoint) -> tuple[str, str]:
    """What ComponentSpec calls `identity` and `processor`."""
    beside = checkpoint.component("processor").identity() if role == "text_encoder" else ""
    return checkpoint.component(role).identity(), beside


def fingerprint(role: str, checkpoint: Checkpoint) -> str:
    """Changes when anything does that a result of this component depends on.

    Of the transformer that is also the schedule and the latents' statistics, which the sampler reads anew for
    each run, so that they are no part of its spec: its weights stay loaded when they change.
    """
    try:
        parts: list[object] = list(identities(role, checkpoint))
        if role == "transformer":
            parts += [checkpoint.component("scheduler").config()]
            parts += [statistics.tolist() for statistics in checkpoint.latent_statistics()]
        return repr(parts)
    except CheckpointError as error:
        return str(error)  # the node itself says it


def require_usable(role: str, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError saying which file of a component is missing, damaged or not for these nodes."""
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
    """Raise CheckpointError naming what a component needs outside its own folder and does not find there."""
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


def describe(
    role: str,
    checkpoint: Checkpoint,
    precision: Precision,
    device: torch.device,
    card: Card,
    math: str = "auto",
) -> ComponentSpec:
    """Describe a component after checking that its files are all there. Raises CheckpointError."""
    require_usable(role, checkpoint)
    resolved = resolve(precision, card, math)
    return ComponentSpec(role, checkpoint, resolved, device, card, *identities(role, checkpoint))


def model_name(role: str, stored: str) -> str | None:
    """A stored tensor's name in the model we build, or None for those we do without."""
    if role == "transformer":
        return None if FOLDED.match(stored) else stored
    if role == "text_encoder":
        for old, new in TEXT_ENCODER_PREFIXES.items():
            if stored.startswith(old):
                return new + stored.removeprefix(old)
        return None
    return stored


def is_big_matrix(role: str, name: str) -> bool:
    """Whether a precision's format applies to this weight (its name in the model)."""
    return role in BIG_MATRICES and BIG_MATRICES[role].fullmatch(name) is not None


def working_bytes(spec: ComponentSpec, edit: Edit = Edit()) -> int:  # noqa: B008 - it is frozen
    """What the component needs at least beside its weights, the driver's share included."""
    reserved = RESERVED_BYTES if spec.card.is_gpu else 0
    needed = workspace_bytes(spec.role, spec.checkpoint, spec.precision, edit, tiled=True, fused=spec.fused)
    return needed + reserved


def fits(spec: ComponentSpec) -> bool:
    """Whether the component and what it works with fit its card when nothing else is there.

    Scores of attention do not count: they grow with the square of the size, so a smaller edit may do.
    require_room, which knows the size, counts them.
    """
    fused = replace(spec, card=replace(spec.card, unfused=frozenset()))
    return spec.nbytes() + working_bytes(fused) <= spec.card.memory


def has_room(spec: ComponentSpec, working: float, room: float) -> bool:
    """Whether weights and `working` bytes beside them go into `room`, all that the device can give."""
    return spec.nbytes() + working * (1 - ESTIMATE_ERROR) <= room


def require_room(spec: ComponentSpec, working: float, room: float, task: str, remedy: str) -> None:
    """Raise DoesNotFitError, before anything is loaded, where a task cannot fit its device.

    task: as in "Sampling 1024x1024". remedy: what to do, in a sentence.
    """
    if not has_room(spec, working, room):
        scores = "" if spec.fused else " (no fused attention kernel runs there in this arithmetic)"
        raise DoesNotFitError(
            f"{task} takes {spec.nbytes() / GIB:.1f} GiB for the {spec} and {working / GIB:.1f} GiB to work "
            f"with{scores}; {spec.card} can give {room / GIB:.1f} GiB. {remedy}"
        )


def require_fit(spec: ComponentSpec) -> None:
    """Raise DoesNotFitError saying what would fit instead."""
    if fits(spec):
        return
    alternatives = []
    for name, row in ROLE_PRECISIONS[spec.role].items():
        other = describe(spec.role, spec.checkpoint, row, spec.device, spec.card)
        if fits(other) and name != "fp16":
            alternatives.append(f"{name} ({other.nbytes() / GIB:.1f} GiB)")
    needs = f"{spec.nbytes() / GIB:.1f} GiB and {working_bytes(spec) / GIB:.1f} GiB to work with"
    remedy = f"What fits: {', '.join(alternatives)}." if alternatives else "Choose a bigger card, or cpu."
    raise DoesNotFitError(f"{spec} needs {needs}; {spec.card} has {spec.card.memory / GIB:.1f} GiB. {remedy}")
