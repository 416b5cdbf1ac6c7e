"""Folded modulation: the results that depend on the timestep alone, computed once for each schedule.

A third of the transformer's parameters (`img_mod`, `txt_mod`: 6.8 of 20.4 billion) turn the timestep into
shifts, scales and gates. A schedule has few timesteps, all known before the first step. So the weights are
read once, in FP32 and unquantised, and only their results are kept: 8.8 MB a step for the full model.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..arithmetic import computing_environment, exact_fp32
from ..errors import AGAIN, CheckpointError
from ..files.cache import DiskCache, digest
from ..files.tensors import TensorTypes
from ..progress import OnProgress, ignore_progress
from ..weights.adapters import Adapters, Product
from ..weights.components import Replica
from ..weights.names import FOLDED
from .config import TransformerConfig

log = logging.getLogger("FireRed")

RECIPE = 2  # raise it when the results of this file change
STREAMS = ("img", "txt")  # their order in StepModulation.blocks
KEPT_BYTES = 3 * 2**29  # of tables in memory; one of 40 steps has 354 MB
TIME_CHANNELS, TIME_SCALE, LONGEST_PERIOD = 256, 1000, 10_000  # of the sinusoidal embedding
TIME_EMBEDDER = "time_text_embed.timestep_embedder."
BLOCKS, OUT = "blocks", "out"  # the tensors of a table

Table = Mapping[str, torch.Tensor]


def is_folded(stored: str) -> bool:
    """Whether a stored tensor depends on the timestep alone."""
    return FOLDED.match(stored) is not None


class StepModulation(NamedTuple):
    """The modulation of one step, on the transformer's device in its compute dtype.

    blocks: (rows, layers, 2, 6 * width), for the image and the text stream of each block: shift, scale and
    gate of attention, then of the MLP. With zero_cond_t, a second row at timestep 0 is for references.
    out: (2 * width), scale and shift of the last norm.
    """

    blocks: torch.Tensor
    out: torch.Tensor


class ScheduleModulation:
    """The modulation of one schedule: a row for each timestep, and with `has_zero` a last one for timestep 0.

    table: `blocks` (rows, layers, 2, 6 * width) and `out` (rows, 2 * width), FP32, on the CPU. change: what
    LoRAs add to it.
    """

    def __init__(
        self,
        table: Table,
        has_zero: bool,
        device: torch.device,
        compute: torch.dtype,
        change: TableChange | None = None,
    ):
        self._table, self._has_zero, self._change = table, has_zero, change
        self._device, self._compute = device, compute
        self._current: tuple[int, StepModulation] | None = None

    def at(self, step: int) -> StepModulation:
        """The modulation of a step (from 0). The last one stays in memory: both branches of a step use it."""
        if self._current is None or self._current[0] != step:
            rows = [step, -1] if self._has_zero else [step]
            part: Table = {name: self._table[name][rows] for name in (BLOCKS, OUT)}
            if self._change is not None:
                part = self._change.added_to(part, rows)
            blocks, out = (part[name].to(self._device, self._compute) for name in (BLOCKS, OUT))
            self._current = step, StepModulation(blocks, out[0])
        return self._current[1]


class TableChange(NamedTuple):
    """What LoRAs on the folded layers add to a table: their products of the embedded timesteps.

    embedded: (rows, width) FP32, on the transformer's device, as are the products.
    """

    embedded: torch.Tensor
    products: Mapping[str, Product]

    def added_to(self, part: Table, rows: Sequence[int]) -> Table:
        """These rows of a table, FP32 on the transformer's device, with the change in them."""
        changed = {name: tensor.to(self.embedded.device, copy=True) for name, tensor in part.items()}
        embedded, results = self.embedded[list(rows)], _results(changed)
        for layer, product in self.products.items():
            results[layer].add_(product.of(embedded) @ product.up.float().T)
        return changed


class Modulation:
    """The modulation of any schedule: from memory, from the cache, or computed from the weights.

    source: the modulation of the same transformer on another card, to share its tables.
    """

    def __init__(
        self,
        replica: Replica,
        config: TransformerConfig,
        cache: DiskCache | None,
        source: Modulation | None = None,
    ):
        self._replica, self._config, self._cache = replica, config, cache
        self._tables: OrderedDict[str, Table] = OrderedDict() if source is None else source._tables

    @exact_fp32()
    def of(
        self,
        timesteps: torch.Tensor,
        adapters: Adapters | None = None,
        on_progress: OnProgress = ignore_progress,
    ) -> ScheduleModulation:
        """The modulation for these timesteps (n,), FP32, 0 to 1.

        adapters: LoRAs, whose change of the modulation is added without reading the weights again.
        on_progress: in bytes of weights, if they must be read. Raises CheckpointError.
        """
        table, replica = self._find(timesteps) or self._compute(timesteps, on_progress), self._replica
        change = None
        if adapters is not None and adapters.folded:
            change = TableChange(self._embedded(timesteps), adapters.folded)
        return ScheduleModulation(table, self._config.zero_cond_t, replica.device, replica.spec.math, change)

    def _find(self, timesteps: torch.Tensor) -> Table | None:
        """A table from memory or from the cache, marked as just used."""
        name = self._name(timesteps)
        table = self._tables.get(name)
        if table is not None and self._cache:
            self._cache.find(name)  # marks the file as used, though the table is in memory
        elif self._cache:
            table = self._cache.map(name)
        if table is None or not self._is_valid(table, timesteps):
            return None
        self._remember(name, table)
        return table

    def _compute(self, timesteps: torch.Tensor, on_progress: OnProgress) -> Table:
        """A table from the weights. It is kept if all of it is finite."""
        table, name = self._compute_table(timesteps, on_progress), self._name(timesteps)
        if not self._is_valid(table, timesteps):
            log.warning("the modulation of this schedule holds NaN or infinity: it is not cached")
            return table
        self._replica.spec.require_unchanged()  # the table is named after these weights
        writer = self._cache.create(name, _layout(table)) if self._cache else None
        if writer is not None:
            for part, rows in table.items():
                writer.write(part, rows)
            writer.finish()
        found = self._find(timesteps)  # a file that is mapped takes no memory of its own
        if found is None:
            self._remember(name, table)
        return found or table

    def _remember(self, name: str, table: Table) -> None:
        self._tables[name] = table
        self._tables.move_to_end(name)
        while len(self._tables) > 1 and sum(map(_nbytes, self._tables.values())) > KEPT_BYTES:
            self._tables.popitem(last=False)

    def _name(self, timesteps: torch.Tensor) -> str:
        """The name of the schedule's file, from everything that its bits depend on."""
        spec, card = self._replica.spec, self._replica.card
        computed = computing_environment(card.device)
        key = digest(RECIPE, timesteps.float(), card.device.type, card.name, computed)
        return f"{spec.checkpoint.name}-modulation-{spec.identity}-{key}"

    def _empty_table(self, timesteps: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, config = len(timesteps) + self._config.zero_cond_t, self._config
        return {
            BLOCKS: torch.empty(rows, config.layers, len(STREAMS), 6 * config.width),
            OUT: torch.empty(rows, 2 * config.width),
        }

    def _is_valid(self, table: Table, timesteps: torch.Tensor) -> bool:
        """Whether the table has the right shapes and is finite. Reads row by row: it may be a mapped file."""
        return _layout(table) == _layout(self._empty_table(timesteps)) and all(
            bool(row.isfinite().all()) for rows in table.values() for row in rows
        )

    def _compute_table(self, timesteps: torch.Tensor, on_progress: OnProgress) -> Table:
        """Compute a table: read every folded weight once, in the order of the files, and multiply it."""
        component, device = self._replica.spec.checkpoint.component("transformer"), self._replica.device
        stored = {name: each for name, each in component.stored().items() if is_folded(name)}
        total = sum(each.nbytes for each in stored.values())
        log.info("computing modulation for %d steps: reading %.2f GB", len(timesteps), total / 1e9)
        done, started = 0, time.perf_counter()
        embedded, table = self._embedded(timesteps), self._empty_table(timesteps)
        missing = _results(table)
        waiting: dict[str, torch.Tensor] = {}  # weights without their bias yet, and the reverse
        for name, encoded in component.tensors(is_folded, device):
            # what is FP32 already is not copied by decoding, and its buffer is used again
            copy = stored[name].decoded_dtype is torch.float32
            waiting[name] = encoded.to(device, copy).decode().float()
            done += stored[name].nbytes
            on_progress(done, total)
            layer = name.rpartition(".")[0]
            weight, bias = f"{layer}.weight", f"{layer}.bias"
            if layer in missing and weight in waiting and bias in waiting:
                # faster than F.linear on a CPU
                result = torch.addmm(waiting.pop(bias).unsqueeze(1), waiting.pop(weight), embedded.T).T
                missing.pop(layer).copy_(result)
        if missing:
            raise CheckpointError(
                f"{component.path} lacks {len(missing)} modulation layers, the first being "
                f"{next(iter(missing))}. {AGAIN}"
            )
        seconds = time.perf_counter() - started
        log.info("modulation computed in %.1f s (%.2f GB/s)", seconds, total / 1e9 / seconds)
        return table

    def _embedded(self, timesteps: torch.Tensor) -> torch.Tensor:
        """What the folded layers take: (rows, width) FP32 on the device, from the unquantised weights."""
        levels = torch.cat([timesteps.float().cpu(), torch.zeros(int(self._config.zero_cond_t))])
        component, device = self._replica.spec.checkpoint.component("transformer"), self._replica.device
        stored = component.tensors(lambda name: name.startswith(TIME_EMBEDDER))
        weights = {
            name.removeprefix(TIME_EMBEDDER): encoded.to(device).decode().float() for name, encoded in stored
        }
        x = time_waves(levels.to(device))
        x = F.silu(F.linear(x, weights["linear_1.weight"], weights["linear_1.bias"]))
        return F.silu(F.linear(x, weights["linear_2.weight"], weights["linear_2.bias"]))


def time_waves(timesteps: torch.Tensor) -> torch.Tensor:
    """The sinusoidal embedding (n, TIME_CHANNELS), cosines first, of timesteps (n,) from 0 to 1; both FP32.

    The bits are those of diffusers' get_timestep_embedding, whose module takes seconds to import.
    """
    half = TIME_CHANNELS // 2
    numbers = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(LONGEST_PERIOD) * numbers / half)
    angles = TIME_SCALE * (timesteps[:, None] * frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _results(table: Table) -> dict[str, torch.Tensor]:
    """The part of a table that each layer fills, by the layer's name."""
    blocks = itertools.product(range(table[BLOCKS].shape[1]), enumerate(STREAMS))
    results = {
        f"transformer_blocks.{block}.{name}_mod.1": table[BLOCKS][:, block, stream]
        for block, (stream, name) in blocks
    }
    return results | {"norm_out.linear": table[OUT]}


def _layout(table: Table) -> TensorTypes:
    return {name: (rows.dtype, tuple(rows.shape)) for name, rows in table.items()}


def _nbytes(table: Table) -> int:
    return sum(rows.nbytes for rows in table.values())
