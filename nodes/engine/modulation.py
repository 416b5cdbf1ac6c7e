"""Folded modulation: what the timestep alone decides, computed once for a schedule and never held as weights.

A third of the transformer's parameters (`img_mod`, `txt_mod`: 6.8 of 20.4 billion) turn the timestep into
shifts, scales and gates. A schedule visits a few known timesteps, so their results are computed when it is
chosen, streaming over the unquantised weights in FP32, and kept: 8.8 MB a step for the full model. Exact, and
no precision quantises it.
"""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections import OrderedDict

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenTimestepProjEmbeddings

from .arithmetic import computing_environment, exact_fp32
from .cache import DiskCache, digest
from .checkpoint import stored_bytes
from .components import MODULATION, ComponentSpec
from .errors import CheckpointError
from .progress import OnProgress, untold

log = logging.getLogger("FireRed")

RECIPE = 1  # raise it when this file computes something else
TABLE = "modulation"  # the one tensor's name in a file
BROKEN = ""
STREAMS = ("img", "txt")
KEPT_BYTES = 3 * 2**29  # of schedules in memory beside the current one; 354 MB each for 40 steps
TIME_EMBEDDER = "time_text_embed."


def is_modulation(stored: str) -> bool:
    """Whether a stored tensor is one of those folded."""
    return MODULATION.match(stored) is not None


class FoldedModulation(torch.nn.Module):
    """Stands for a block's img_mod or txt_mod: gives the current step's result."""

    def __init__(self, modulation: Modulation, block: int, stream: int):
        super().__init__()
        self._modulation = [modulation]  # in a list, so that torch does not take it for a part of this module
        self._block, self._stream = block, stream

    def forward(self, temb: torch.Tensor) -> torch.Tensor:
        """temb: (1, dim), or (2, dim) where the second row is timestep 0. Returns (the same, 6 * dim)."""
        return self._modulation[0].current[: len(temb), self._block, self._stream]


class Modulation:
    """The results for the schedules last used, and the rows of the current step on the device.

    current: (1, or 2 with timestep 0's, blocks, streams, 6 * dim) in the compute dtype.
    """

    def __init__(self, spec: ComponentSpec, cache: DiskCache | None):
        self._spec, self._cache = spec, cache
        config = spec.checkpoint.component("transformer").config()
        self._blocks, self._has_zero = config["num_layers"], bool(config.get("zero_cond_t"))
        self._dim = config["num_attention_heads"] * config["attention_head_dim"]
        self._tables: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._table, self._step = torch.empty(0), -1
        self.current = torch.empty(0)

    def fold_into(self, model: QwenImageTransformer2DModel) -> None:
        """Replace the model's own modulation layers, which may still be on meta."""
        for number, block in enumerate(model.transformer_blocks):
            for stream, name in enumerate(STREAMS):
                setattr(block, f"{name}_mod", FoldedModulation(self, number, stream))

    @exact_fp32()
    def use(self, timesteps: torch.Tensor, on_progress: OnProgress = untold) -> None:
        """Get ready for these timesteps (n,), FP32, 0 to 1: from memory, the cache, or the weights.

        on_progress: told of the bytes of weights read, where they are.
        """
        name = self._name(timesteps)
        shape = (len(timesteps) + self._has_zero, self._blocks, len(STREAMS), 6 * self._dim)
        if name in self._tables:
            if self._cache is not None:
                self._cache.find(name)  # marks the file as used, which it is though nobody opens it
        elif (kept := self._kept(name, shape)) is not None:
            self._tables[name] = kept
        else:
            table = self._compute_table(timesteps, shape, on_progress)
            if not _is_finite(table):
                log.warning("the modulation of this schedule holds NaN or infinity: it is not kept")
                name = BROKEN  # under which nobody finds it again
            self._tables[name] = table if name == BROKEN else self._keep(name, table)
        self._tables.move_to_end(name)
        while len(self._tables) > 1 and sum(table.nbytes for table in self._tables.values()) > KEPT_BYTES:
            self._tables.popitem(last=False)
        self._table, self._step = self._tables[name], -1
        self.select(0)

    def select(self, step: int) -> None:
        """Make that step the current one."""
        if step == self._step:
            return
        self._step = step
        rows = self._table[[step, -1]] if self._has_zero else self._table[step : step + 1]
        self.current = rows.to(self._spec.device, self._spec.math)

    def _name(self, timesteps: torch.Tensor) -> str:
        """Of the schedule's file: all that its bits depend on, the arithmetic of this process included."""
        spec = self._spec
        computed = computing_environment(spec.device, "diffusers")
        key = digest(RECIPE, timesteps.float(), spec.device.type, spec.card.name, computed)
        return f"{spec.checkpoint.name}-modulation-{spec.identity}-{key}"

    def _keep(self, name: str, table: torch.Tensor) -> torch.Tensor:
        """The table, from its file where one could be written, so that it takes no memory of its own."""
        shape = tuple(table.shape)
        writer = self._cache.create(name, {TABLE: (table.dtype, shape)}) if self._cache else None
        if writer is not None:
            writer.write(TABLE, table)
            writer.finish()
        kept = self._kept(name, shape)
        return table if kept is None else kept

    def _kept(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """The table from the cache, mapped and not copied; None where it is missing or cannot be right."""
        table = ((self._cache.map(name) if self._cache else None) or {}).get(TABLE)
        if table is None or (table.dtype, tuple(table.shape)) != (torch.float32, shape):
            return None
        return table if _is_finite(table) else None

    def _compute_table(
        self, timesteps: torch.Tensor, shape: tuple[int, ...], on_progress: OnProgress
    ) -> torch.Tensor:
        """Read every modulation weight once, in the order of the files, each while the last is multiplied."""
        component, device = self._spec.checkpoint.component("transformer"), self._spec.device
        stored = {name: info for name, info in component.stored().items() if is_modulation(name)}
        total, done, started = sum(map(stored_bytes, stored.values())), 0, time.monotonic()
        log.info("computing modulation for %d steps: reading %.2f GB", len(timesteps), total / 1e9)
        levels = torch.cat([timesteps.float().cpu(), torch.zeros(int(self._has_zero))])
        embedded = F.silu(self._time_embedding(levels))
        table = torch.empty(shape)
        weights: dict[str, torch.Tensor] = {}
        missing = set(itertools.product(range(self._blocks), STREAMS))
        for name, tensor in component.tensors(is_modulation, device):
            weights[name] = tensor.to(device, copy=tensor.dtype is torch.float32).float()
            done += tensor.nbytes
            on_progress(done, total)
            layer = name.rpartition(".")[0]
            if f"{layer}.weight" in weights and f"{layer}.bias" in weights:
                weight, bias = weights.pop(f"{layer}.weight"), weights.pop(f"{layer}.bias")
                result = torch.addmm(bias.unsqueeze(1), weight, embedded.T).T  # on a CPU faster than linear()
                block, stream = re.findall(r"\.(\d+)\.(\w+)_mod", layer)[0]
                table[:, int(block), STREAMS.index(stream)] = result.cpu()
                missing.discard((int(block), stream))
        if missing:
            raise CheckpointError(f"{component.folder} lacks modulation weights. Download the folder again.")
        seconds = time.monotonic() - started
        log.info("modulation computed in %.1f s (%.2f GB/s)", seconds, total / 1e9 / seconds)
        return table

    def _time_embedding(self, levels: torch.Tensor) -> torch.Tensor:
        """The model's own timestep embedding (n, dim), in FP32 from the unquantised weights."""
        embedder = QwenTimestepProjEmbeddings(self._dim)
        component = self._spec.checkpoint.component("transformer")
        stored = component.tensors(lambda name: name.startswith(TIME_EMBEDDER))
        embedder.load_state_dict(
            {name.removeprefix(TIME_EMBEDDER): tensor.float() for name, tensor in stored}
        )
        return embedder.to(self._spec.device)(levels.to(self._spec.device), torch.empty(0)).detach()


def _is_finite(table: torch.Tensor) -> bool:
    """Step by step: a mapped table need not be in memory whole."""
    return all(bool(row.isfinite().all()) for row in table)
