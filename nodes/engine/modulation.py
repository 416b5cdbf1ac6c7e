"""Folded modulation: what the timestep alone decides, computed once for a schedule and never held as weights.

A third of the transformer's parameters (`img_mod`, `txt_mod`: 6.8 of 20.4 billion) turn the timestep into
shifts, scales and gates. A schedule visits a few known timesteps, so their results are computed when it is
chosen, streaming over the unquantised weights in FP32, and kept: 8.8 MB a step for the full model. Exact, and
no precision quantises it.
"""

from __future__ import annotations

import re
from collections import OrderedDict

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenTimestepProjEmbeddings

from .arithmetic import exact_fp32
from .cache import DiskCache, digest
from .checkpoint import Checkpoint
from .components import MODULATION
from .errors import CheckpointError
from .progress import OnProgress, untold

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

    def __init__(
        self,
        checkpoint: Checkpoint,
        identity: str,
        device: torch.device,
        compute: torch.dtype,
        cache: DiskCache | None,
    ):
        self._checkpoint, self._identity = checkpoint, identity
        self._device, self._compute, self._cache = device, compute, cache
        config = checkpoint.component("transformer").config()
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
        """Get ready for these timesteps (n,), FP32, 0 to 1: from memory, the cache, or the weights."""
        visited = digest(timesteps.float())
        if visited not in self._tables:
            self._tables[visited] = self._find_or_compute(timesteps, visited, on_progress)
        self._tables.move_to_end(visited)
        while len(self._tables) > 1 and sum(table.nbytes for table in self._tables.values()) > KEPT_BYTES:
            self._tables.popitem(last=False)
        self._table, self._step = self._tables[visited], -1
        self.select(0)

    def select(self, step: int) -> None:
        """Make that step the current one."""
        if step == self._step:
            return
        self._step = step
        rows = self._table[[step, -1]] if self._has_zero else self._table[step : step + 1]
        self.current = rows.to(self._device, self._compute)

    def _find_or_compute(
        self, timesteps: torch.Tensor, visited: str, on_progress: OnProgress
    ) -> torch.Tensor:
        rows = len(timesteps) + self._has_zero
        shape = (rows, self._blocks, len(STREAMS), 6 * self._dim)
        name = f"{self._checkpoint.name}-modulation-{self._identity}-{visited}"
        kept = (self._cache.read(name) if self._cache else None) or {}
        if "modulation" in kept and tuple(kept["modulation"].shape) == shape:
            return kept["modulation"]
        table = self._compute_table(timesteps, shape, on_progress)
        writer = self._cache.create(name, {"modulation": (table.dtype, shape)}) if self._cache else None
        if writer is not None:
            writer.write("modulation", table)
            writer.finish()
        return table

    def _compute_table(
        self, timesteps: torch.Tensor, shape: tuple[int, ...], on_progress: OnProgress
    ) -> torch.Tensor:
        levels = torch.cat([timesteps.float().cpu(), torch.zeros(int(self._has_zero))])
        embedded = F.silu(self._time_embedding(levels))
        table = torch.empty(shape)
        component = self._checkpoint.component("transformer")
        weights: dict[str, torch.Tensor] = {}
        done, total = 0, 2 * len(STREAMS) * self._blocks
        for name, tensor in component.tensors(is_modulation, self._device):
            weights[name] = tensor.to(self._device, copy=True).float()
            done += 1
            on_progress(done, total)
            layer = name.rpartition(".")[0]
            if f"{layer}.weight" in weights and f"{layer}.bias" in weights:
                result = F.linear(embedded, weights.pop(f"{layer}.weight"), weights.pop(f"{layer}.bias"))
                block, stream = re.findall(r"\.(\d+)\.(\w+)_mod", layer)[0]
                table[:, int(block), STREAMS.index(stream)] = result.cpu()
        if done != total:
            raise CheckpointError(f"{component.folder} lacks modulation weights. Download the folder again.")
        return table

    def _time_embedding(self, levels: torch.Tensor) -> torch.Tensor:
        """The model's own timestep embedding (n, dim), in FP32 from the unquantised weights."""
        embedder = QwenTimestepProjEmbeddings(self._dim)
        component = self._checkpoint.component("transformer")
        stored = component.tensors(lambda name: name.startswith(TIME_EMBEDDER))
        embedder.load_state_dict(
            {name.removeprefix(TIME_EMBEDDER): tensor.float() for name, tensor in stored}
        )
        return embedder.to(self._device)(levels.to(self._device), torch.empty(0)).detach()
