"""What a loader node hands on: a small frozen description of one component, not the component itself."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from .checkpoint import DTYPES, Checkpoint
from .errors import FireRedError
from .estimates import GIB, RESERVED_BYTES, Edit, workspace_bytes
from .precision import ROLE_PRECISIONS, Card, Precision, resolve

# How transformers has stored Qwen2.5-VL over the years, as prefixes of its tensors' names. Its output head is
# left out: embeddings are what goes into it.
TEXT_ENCODER_PREFIXES = {
    "model.language_model.": "language_model.",
    "model.visual.": "visual.",
    "visual.": "visual.",
    "model.": "language_model.",
}
# What depends on the timestep alone: folded, see modulation.py.
FOLDED = re.compile(r"(transformer_blocks\.\d+\.(img|txt)_mod|norm_out|time_text_embed)\.")
CONV_3D = 5  # dimensions of its weight
BIG_MATRICES = {
    "transformer": re.compile(r"transformer_blocks\..*\.weight"),
    "text_encoder": re.compile(r"language_model\.layers\..*_proj\.weight"),
}


class DoesNotFitError(FireRedError):
    """A component too big for its card, found before anything was loaded."""


@dataclass(frozen=True)
class ComponentSpec:
    """A component of a checkpoint at a chosen precision on a chosen device; equal specs share one copy in
    memory.

    role: the component's folder in the checkpoint, `transformer`, `text_encoder` or `vae`.
    identity: of that folder's files, so that replaced files are loaded anew.
    """

    role: str
    checkpoint: Checkpoint
    precision: Precision
    device: torch.device
    card: Card
    identity: str

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
        assert self.precision.compute is not None
        return self.precision.compute

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
                total += numel * (self.precision.storage or DTYPES[info["dtype"]]).itemsize
        return int(total)


def describe(
    role: str,
    checkpoint: Checkpoint,
    precision: Precision,
    device: torch.device,
    card: Card,
    math: str = "auto",
) -> ComponentSpec:
    """Describe a component after checking that its files are all there. Raises CheckpointError."""
    component = checkpoint.component(role)
    component.shards()
    return ComponentSpec(role, checkpoint, resolve(precision, card, math), device, card, component.identity())


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
    return workspace_bytes(spec.role, spec.checkpoint, spec.math, edit, tiled=True) + reserved


def fits(spec: ComponentSpec) -> bool:
    """Whether the component and what it works with fit its card when nothing else is there."""
    return spec.nbytes() + working_bytes(spec) <= spec.card.memory


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
