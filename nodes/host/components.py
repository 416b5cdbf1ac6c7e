"""Decide where and how a component runs on this machine, from the plan that all loaders share."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from comfy.cli_args import args

from ..engine.cards.kernels import require_kernels
from ..engine.cards.libraries import require_libraries
from ..engine.cards.preflight import preflight
from ..engine.cluster.link import cluster_address
from ..engine.errors import FireRedError, InputError
from ..engine.files.checkpoint import Checkpoint
from ..engine.limits import ATTENTION, EXACT, shown
from ..engine.planning.plan import Plan
from ..engine.planning.planner import Choice, make_plan
from ..engine.planning.sharing import Sharing
from ..engine.units import GIB
from ..engine.weights.components import ComponentSpec, Replica
from ..engine.weights.estimates import Edit
from ..engine.weights.precision import MATH, ROLE_PRECISIONS, require_library, runs_on
from ..engine.weights.room import DoesNotFitError, require_fit, working_bytes
from .attention import choose_attention
from .checkpoints import get_checkpoint
from .devices import DeviceLabels, device_labels, machine
from .memory import Handle, handle_for
from .parallel import share_among

log = logging.getLogger("FireRed")

PRECISION_FLAGS = {
    "transformer": "unet",
    "text_encoder": "text_enc",
    "vae": "vae",
}  # ComfyUI's --bf16-unet and so on


def open_component(
    role: str,
    checkpoint: str,
    precision: str,
    device: str,
    math: str = "auto",
    attention: str = EXACT,
) -> Handle:
    """Decide where and how a component runs here, and log it in one line. Loads nothing.

    attention: of a transformer.
    Raises FireRedError when it cannot run, when it does not fit, or when a library is missing.
    """
    require_libraries()
    attention = ATTENTION.require(attention)
    replica, reason, sharing = _decide(role, checkpoint, precision, device, math)
    why, size = f" ({reason})" if reason else "", replica.spec.nbytes() / GIB
    log.info("%s, about %.1f GiB%s%s", replica, size, why, _attention_note(replica))
    require_kernels(replica.device)
    _require_fit(replica)
    require_library(replica.spec.precision, replica.card)
    if role == "transformer" and replica.spec.math is torch.float16:
        log.warning(
            "fp16 arithmetic overflows in this transformer; the sampler will stop at the step where it does."
        )
    handle = handle_for(replica)
    if role == "transformer":
        here = machine().device(replica.card.label)
        handle = handle.with_options(attention=choose_attention(attention, replica, here))
    return handle if sharing is None else share_among(handle, sharing)


def _require_fit(replica: Replica) -> None:
    """Raise DoesNotFitError, or warn where other cards may hold the transformer."""
    try:
        require_fit(replica)
    except DoesNotFitError as error:
        if replica.spec.role == "transformer" and cluster_address():
            log.warning("%s Or connect FireRed Parallel with devices ray.", error)
        elif replica.spec.role == "transformer" and len(machine().gpus) > 1 and replica.card.is_gpu:
            log.warning("%s Or connect FireRed Parallel: its mode layers shares it out over them.", error)
        else:
            raise


def _attention_note(replica: Replica) -> str:
    """For the log: the memory of a usual edit without a fused attention kernel."""
    if replica.fused:
        return ""
    working = working_bytes(replica) / GIB
    return f", attention without a fused kernel: {working:.1f} GiB to work with for a usual edit"


def _decide(
    role: str, checkpoint: str, precision: str, device: str, math: str
) -> tuple[Replica, str, Sharing | None]:
    """The component as it will run here, the reasons of what the user left open, and who shares it."""
    _require_choice("device", device, DeviceLabels(["auto", "cpu", "gpu:0", "gpu:1 and so on"]))
    _require_choice("precision", precision, ["auto", *ROLE_PRECISIONS[role]])
    _require_choice("math", math, ["auto", *MATH])
    found = get_checkpoint(checkpoint, role)
    choice = Choice(_present(device, role), None if precision == "auto" else precision, math)
    plan = hardware_plan(found, choices={role: choice})
    there = plan.placement(role)
    card = there.device.card
    if there.device.fault:
        raise FireRedError(f"The {there.name} cannot run on {card}. {there.device.fault}")
    sharing = plan.sharing if role == "transformer" else None
    return Replica(ComponentSpec.of(role, found, there.precision), card), there.reason, sharing


def _require_choice(name: str, value: object, choices: list[str]) -> None:
    """Raise InputError for a bad choice: ComfyUI does not check a value that comes over a link."""
    if value not in choices:
        raise InputError(f"{name} is {shown(value)}; choose {', '.join(choices[:-1])} or {choices[-1]}.")


def hardware_plan(
    checkpoint: Checkpoint,
    edit: Edit = Edit(),  # noqa: B008 - it is frozen
    choices: dict[str, Choice] | None = None,
    measure_cpu: bool = False,
) -> Plan:
    """Where everything of the checkpoint goes on this machine: the answer that all loaders share.

    choices: what the user chose; ComfyUI's command line chooses some of the rest. measure_cpu: whether to
    measure the CPU of a machine without accelerators. Its speed decides nothing, but it tells the time.
    """
    here = machine()
    if measure_cpu and not here.gpus:
        speeds = preflight(torch.device("cpu")).speeds
        here = replace(here, cpu=replace(here.cpu, speeds=speeds, measured=True))
    settled = {role: _with_flags(role, (choices or {}).get(role, Choice())) for role in PRECISION_FLAGS}
    return make_plan(
        here, checkpoint, edit, settled, runs=lambda role, precision, card: runs_on(precision, card)
    )


def _present(label: str, role: str) -> str | None:
    """The label, if this machine has the device; None for `auto` and, with a log line, for a missing one."""
    if label == "auto" or label in list(device_labels()):
        return None if label == "auto" else label
    log.info("this machine has no %s for the %s: falling back to auto", label, role.replace("_", " "))
    return None


def _with_flags(role: str, choice: Choice) -> Choice:
    """The choice with what ComfyUI's command line says of what the user left free."""
    if role == "vae" and args.cpu_vae and choice.device is None:
        choice = replace(choice, device="cpu", reason="--cpu-vae")
    if args.force_fp32 and choice.math == "auto":
        choice = replace(choice, math="fp32", reason="--force-fp32")
    if choice.precision is not None:
        return choice
    for name in ("fp32", "bf16"):
        flag = f"{name}_{PRECISION_FLAGS[role]}"
        if getattr(args, flag, False):
            return replace(choice, precision=name, reason=f"--{flag.replace('_', '-')}")
    return choice
