"""A sampling run as plain values, which another machine makes a run of its own from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..cards.card import Card
from ..files.lora import open_lora
from ..latents import LatentStatistics
from ..sampling.conditioning import Condition
from ..sampling.options import SamplingOptions, StepCacheOptions
from ..sampling.resume import RunState
from ..sampling.sampling import SamplingRun
from ..sampling.schedule import Schedule
from ..weights.adapters import Adapter, adaptable_layers
from ..weights.components import ComponentSpec, Replica
from ..weights.precision import ROLE_PRECISIONS
from .copies import ROLE, describe_checkpoint, describe_lora, find_checkpoint, find_lora

Plain = Mapping[str, Any]  # what wire.packed takes


@dataclass(frozen=True)
class Task:
    """A run on another machine. guard: its level there, one of guard.GUARDS."""

    run: SamplingRun
    guard: str

    def plain(self) -> Plain:
        """Everything that the result depends on. Raises CheckpointError for files that cannot be read."""
        run, precision = self.run, self.run.replica.spec.precision
        return {
            "guard": self.guard,
            "checkpoint": describe_checkpoint(run.replica.spec.checkpoint),
            "precision": precision.name,
            "math": _name(precision.math),
            "conditions": {branch: _plain_condition(each) for branch, each in run.conditions.items()},
            "schedule": (run.schedule.sigmas, run.schedule.timesteps),
            "true_cfg_scale": run.true_cfg_scale,
            "seed": run.seed,
            "draws": run.draws,
            "size": (run.height, run.width),
            "options": _plain_options(run.options),
            "pictures": run.pictures,
            "mask": run.mask,
        }

    def needs(self) -> tuple[int, int]:
        """Bytes of the weights, and of what computes beside them."""
        return self.run.replica.spec.nbytes(), self.run.working_bytes()

    @staticmethod
    def of(plain: Plain, card: Card) -> Task:
        """The run on a card of this machine, with this machine's files. Raises CheckpointError."""
        checkpoint = find_checkpoint(plain["checkpoint"])
        row = ROLE_PRECISIONS[ROLE][plain["precision"]]
        precision = replace(row, compute=getattr(torch, plain["math"]))
        layers = adaptable_layers(checkpoint) if plain["options"]["adapters"] else {}
        adapters = tuple(
            Adapter(open_lora(find_lora(lora), layers), strength)
            for lora, strength in plain["options"]["adapters"]
        )
        cache = StepCacheOptions(**plain["options"]["step_cache"])
        height, width = plain["size"]
        run = SamplingRun(
            Replica(ComponentSpec.of(ROLE, checkpoint, precision), card),
            {branch: _condition(each) for branch, each in plain["conditions"].items()},
            Schedule(*plain["schedule"]),
            plain["true_cfg_scale"],
            plain["seed"],
            tuple(plain["draws"]),
            height,
            width,
            SamplingOptions(**plain["options"] | {"adapters": adapters, "step_cache": cache}),
            pictures=plain["pictures"],
            mask=plain["mask"],
        )
        return Task(run, plain["guard"])


def single(run: SamplingRun, number: int) -> SamplingRun:
    """The run of one of the pictures, from 0."""
    part = slice(number, number + 1)
    return replace(
        run,
        draws=run.draws[part],
        pictures=None if run.pictures is None else run.pictures[part],
        mask=None if run.mask is None else run.mask[part],
    )


def plain_state(state: RunState) -> Plain:
    """The state of one picture."""
    return {
        "step": state.step,
        "latents": state.latents,
        "finished": list(state.finished),
        "step_cache": dict(state.step_cache),
    }


def state_of(plain: Plain) -> RunState:
    return RunState(plain["step"], plain["latents"], tuple(plain["finished"]), plain["step_cache"])


def _plain_condition(condition: Condition) -> Plain:
    return {
        "prompt_embeds": condition.prompt_embeds,
        "mask": condition.mask,
        "reference_latents": condition.reference_latents,
        "statistics": tuple(condition.statistics),
    }


def _condition(plain: Plain) -> Condition:
    mean, std = map(tuple, plain["statistics"])
    return Condition(
        plain["prompt_embeds"],
        plain["mask"],
        tuple(plain["reference_latents"]),
        statistics=LatentStatistics(mean, std),
    )


def _plain_options(options: SamplingOptions) -> Plain:
    adapters = [(describe_lora(each.lora.path), each.strength) for each in options.adapters if each.strength]
    others = {name: value for name, value in vars(options).items() if name != "adapters"}
    return others | {"adapters": adapters, "step_cache": asdict(options.step_cache)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
