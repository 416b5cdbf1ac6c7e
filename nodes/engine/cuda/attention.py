"""Attention with queries, keys, values and probabilities rounded to INT8, multiplied by DP4A (attention.cu).

Rounding: queries and keys by token, after Hadamard's rotation of their channels and without the keys' mean,
which no probability depends on; values by channel, without their mean, which is added to the result;
probabilities to 255 levels of the largest of 128 keys.
(https://arxiv.org/abs/2410.02367, https://arxiv.org/abs/2404.00456)
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from ..files.rotations import Rotation
from .driver import Module, if_they_pass

HEAD_SIZE = 128
QUERIES, KEYS = 64, 128  # of a tile
LEVELS = 255  # of a probability
PARTS = 64  # in which the keys are measured
MAX_ERROR = 0.01  # relative, of a head in the test, against the plain form
TEST_HEADS, TEST_QUERIES, TEST_KEYS = 3, 150, 300


def rounded_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """What the kernels compute, in plain torch: (1, heads, tokens, size) in the dtype of the query.

    The size is a power of 2. mask: (1, 1, 1, keys) bool, False for keys to ignore.
    """
    if mask is not None:
        kept = mask.reshape(-1)
        key, value = key[:, :, kept], value[:, :, kept]
    rotation = Rotation("sylvester", query.shape[-1])
    mean = value.mean(dim=2, keepdim=True)
    query, key = (_round(rotation.of(x), 3) for x in (query, key - key.mean(dim=2, keepdim=True)))
    value = _round(value - mean, 2)
    maximum = torch.full_like(query[..., :1], -torch.inf)
    total, sum_ = torch.zeros_like(maximum), torch.zeros_like(query)
    for keys, values in zip(key.split(KEYS, dim=2), value.split(KEYS, dim=2), strict=True):
        scores = query @ keys.transpose(2, 3) * query.shape[-1] ** -0.5
        largest = scores.amax(dim=3, keepdim=True)
        higher = torch.maximum(maximum, largest)
        weights, part = torch.exp(scores - largest), torch.exp(largest - higher)
        keep, maximum = torch.exp(maximum - higher), higher
        total = total * keep + weights.sum(dim=3, keepdim=True) * part
        sum_ = sum_ * keep + (weights * LEVELS).round() / LEVELS @ values * part
    return sum_ / total + mean


def _round(x: torch.Tensor, over: int) -> torch.Tensor:
    """To 127 steps to either side of 0, the largest of them its largest magnitude over that dimension."""
    scale = x.abs().amax(dim=over, keepdim=True).clamp_min(1e-20) / 127
    return (x / scale).round() * scale


class Int8Attention:
    """The kernels on one card. Raises KernelError where they do not compile or load."""

    def __init__(self, device: torch.device):
        module = Module("attention.cu", device)
        self._measure_parts, self._measure_all = module.kernel("measure_parts"), module.kernel("measure_all")
        self._pack_queries, self._pack_keys = module.kernel("pack_queries"), module.kernel("pack_keys")
        self._pack_values, self._attend = module.kernel("pack_values"), module.kernel("attend")

    @staticmethod
    def takes(query: torch.Tensor) -> bool:
        """Whether it is of a form that the kernels know: (1, heads, tokens, 128) FP32."""
        return len(query) == 1 and query.shape[-1] == HEAD_SIZE and query.dtype == torch.float32

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """As scaled_dot_product_attention: (1, heads, tokens, 128), of FP32.

        There may be more or fewer keys than queries. mask: (1, 1, 1, keys) bool, False for keys to ignore.
        """
        _, heads, queries, size = query.shape
        keys = self._packed_keys(key, value, mask)
        tiles = -(-queries // QUERIES)
        packed = _ints(query.device, heads, tiles, 32, QUERIES)
        scales = _floats(query.device, heads, tiles * QUERIES)
        query = _rows(query)
        # Powers of 2, and a rotation that is not normalised on either side.
        factor = size**-0.5 * math.log2(math.e) / size
        steps = query.stride()[1:3]
        self._pack_queries((tiles, heads, 1), 256, query, packed, scales, queries, *steps, factor)
        out = _floats(query.device, queries, heads, size)
        self._attend((tiles, heads, 1), 128, packed, scales, *keys, out, queries, tiles, keys.tiles)
        return out.transpose(0, 1).unsqueeze(0)

    def _packed_keys(self, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> _Keys:
        _, heads, tokens, size = key.shape
        key, value, device, tiles = _rows(key), _rows(value), key.device, -(-tokens // KEYS)
        counts = None if mask is None else mask.reshape(-1).contiguous()
        count = None if counts is None else counts.sum(dtype=torch.int32)
        parts = _floats(device, 2, heads, PARTS, 3, size)
        means, scales = _floats(device, 2, heads, size), _floats(device, 2, heads, size)
        of_key, of_value = key.stride()[1:3], value.stride()[1:3]
        grid = PARTS, heads, 2
        self._measure_parts(grid, size, key, value, counts, parts, tokens, *of_key, *of_value)
        self._measure_all((heads, 2, 1), size, parts, count, means, scales, PARTS, tokens)
        packed = _ints(device, heads, tiles, 2, 32, KEYS)
        key_scales, offsets = (_floats(device, heads, tiles * KEYS) for _ in range(2))
        found = _Keys(packed, key_scales, offsets, scales[1], means[1])
        grid = 2 * tiles, heads, 1
        self._pack_keys(grid, 256, key, means[0], counts, packed, key_scales, offsets, tokens, *of_key)
        grid = 16 * tiles, heads, 1
        self._pack_values(grid, 256, value, means[1], scales[1], counts, packed, tokens, *of_value)
        return found


class _Keys(NamedTuple):
    """Packed keys and values, as attention.cu describes them."""

    packed: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor
    value_scales: torch.Tensor
    value_means: torch.Tensor

    @property
    def tiles(self) -> int:
        return self.packed.shape[1]


def _floats(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)


def _ints(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32, device=device)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x, with the channels of a token side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def int8_attention(device: torch.device) -> Int8Attention | None:
    """The kernels for a card, if they pass a test on that card; else None, logged."""

    def fault(kernels: Int8Attention) -> str:
        error = _test_error(kernels, device)
        return "" if error <= MAX_ERROR else f"its results are wrong by {error:.1%}"

    return if_they_pass(device, "no INT8 attention", Int8Attention, fault)


def _test_error(kernels: Int8Attention, device: torch.device) -> float:
    """The largest relative error of a head; NaN where NaN in a value does not come through.

    A head has values up to 1e6, another has a key that draws all attention. Some keys are masked.
    """
    generator = torch.Generator().manual_seed(0)

    def random(tokens: int) -> torch.Tensor:
        return torch.randn((1, TEST_HEADS, tokens, HEAD_SIZE), generator=generator).to(device)

    query, key, value = random(TEST_QUERIES), random(TEST_KEYS), random(TEST_KEYS)
    value[:, 0] *= torch.logspace(0, 6, TEST_KEYS, device=device).unsqueeze(1)
    key[:, 1, 200], query[:, 1] = 2.2, query[:, 1] + 0.25
    mask = torch.ones(1, 1, 1, TEST_KEYS, dtype=torch.bool, device=device)
    mask[..., 2:140] = False  # all of a tile's keys but two, and some of the next
    key[:, :, 100] = torch.nan  # ignored
    value[:, :, 100] = torch.inf
    found = kernels(query, key, value, mask).double()
    exact = rounded_attention(query.double(), key.double(), value.double(), mask)
    error = float(((found - exact).flatten(2).norm(dim=2) / exact.flatten(2).norm(dim=2)).max())
    value[:, :, 200, 5] = torch.nan
    poisoned = kernels(query, key, value, mask)[..., 5]
    return error if bool(poisoned.isnan().all()) else math.nan
