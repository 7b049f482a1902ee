# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What is timed on one cache layer, and how: each subject a call on the same inputs."""

from __future__ import annotations

import functools
import gc
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from kvpress import KnormPress, MergingPress

from evaluation.speed.rounds import Call, Rounds, time_in_rounds
from kvpress_merging import AttentionMatchingPress
from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels.blend import cosine_blend
from kvpress_merging.kernels.match import attention_match
from kvpress_merging.kernels.nearest import tile_columns
from kvpress_merging.kernels.products import multiplies_16_bits, multiply
from kvpress_merging.kernels.rows import DEFAULT_TILE_BYTES

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

QUERY_HEADS = 4
"""Query heads for each KV head, as models with 8 billion parameters have them."""

# Cosines of one piece of the bare product: 1 GiB.
_PRODUCT_PIECE = 2**28


@dataclass(frozen=True)
class Cell:
    """One point of the grid: a cache layer, the share of it that is evicted, and where it lies."""

    device: str
    k_len: int
    num_key_value_heads: int
    head_dim: int
    compression_ratio: float
    dtype: str

    @property
    def n_evicted(self) -> int:
        """Positions evicted from each head."""
        return int(self.k_len * self.compression_ratio)

    @property
    def n_kept(self) -> int:
        """Positions kept in each head."""
        return self.k_len - self.n_evicted


@dataclass(frozen=True, eq=False)
class Inputs:
    """Keys and values of a cell, shape ``(1, num_key_value_heads, k_len, head_dim)``, and which positions are kept."""

    cell: Cell
    keys: torch.Tensor
    values: torch.Tensor
    kept: torch.Tensor

    @classmethod
    def of(cls, cell: Cell) -> Inputs:
        """Random ones that depend on the cell alone."""
        generator = torch.Generator(cell.device).manual_seed(0)
        shape = (1, cell.num_key_value_heads, cell.k_len, cell.head_dim)
        keys = torch.empty(shape, dtype=DTYPES[cell.dtype], device=cell.device)
        values = torch.empty_like(keys)
        # Head by head, so that a float32 copy of all heads does not raise the peak before the measurement.
        for tensor in (keys, values):
            for h in range(cell.num_key_value_heads):
                tensor[:, h] = torch.randn(1, *shape[2:], generator=generator, device=cell.device)
        scores = torch.rand(shape[:3], generator=generator, device=cell.device)
        return cls(cell, keys, values, scores.topk(cell.n_kept, dim=-1).indices)

    def gather_kept(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the bare press leaves."""
        index = self.kept[..., None].expand(-1, -1, -1, self.cell.head_dim)
        return self.keys.gather(2, index), self.values.gather(2, index)

    def eviction(self) -> Eviction:
        """Which positions go."""
        return Eviction.from_kept(self.kept, self.cell.k_len)


def _kvpress(inputs: Inputs, tile_bytes: int) -> Call:
    press = MergingPress(KnormPress(inputs.cell.compression_ratio))
    return lambda: press.merge(inputs.keys, inputs.values, inputs.kept)


def merging(inputs: Inputs, tile_bytes: int = DEFAULT_TILE_BYTES, kernel: str = "torch") -> Call:
    """Finding the evicted positions and the blend."""
    layer = (inputs.keys, inputs.values, *inputs.gather_kept())
    return lambda: cosine_blend(*layer, inputs.eviction(), tile_bytes=tile_bytes, kernel=kernel)


def matching(inputs: Inputs, tile_bytes: int = DEFAULT_TILE_BYTES) -> Call:
    """Finding the evicted positions and the match, with as many queries as by default."""
    cell = inputs.cell
    generator = torch.Generator(cell.device).manual_seed(1)
    shape = (1, cell.num_key_value_heads, AttentionMatchingPress.n_queries, cell.head_dim)
    queries = torch.randn(shape, generator=generator, device=cell.device) * cell.head_dim**-0.5
    layer, ridge = (inputs.keys, inputs.values, *inputs.gather_kept()), AttentionMatchingPress.key_ridge
    return lambda: attention_match(*layer, queries, queries, inputs.eviction(), key_ridge=ridge)


def bare_products(inputs: Inputs, tile_bytes: int = DEFAULT_TILE_BYTES, in_tiles: bool = False) -> Call:
    """One product per head of all evicted with all surviving keys, in pieces or in the tiles of the search."""
    cell, keys = inputs.cell, inputs.keys
    n_columns = max(1, min(cell.n_evicted, _PRODUCT_PIECE // cell.n_kept))
    if in_tiles:
        n_columns = tile_columns(cell.n_kept, keys.device, tile_bytes)
    rows = keys[:, 0] if multiplies_16_bits(keys.device, keys.dtype) else keys[:, 0].float()
    survivors, evicted = rows[:, : cell.n_kept], rows[:, cell.n_kept :]

    def multiply_all() -> None:
        for _ in range(cell.num_key_value_heads):
            for columns in evicted.split(n_columns, dim=1):
                multiply(survivors, columns.mT)

    return multiply_all


def attention(inputs: Inputs) -> Call:
    """Causal attention over the layer, as a prefill has it, with four query heads per KV head."""
    queries = torch.randn_like(inputs.keys.repeat_interleave(QUERY_HEADS, dim=1))
    return lambda: F.scaled_dot_product_attention(queries, inputs.keys, inputs.values, is_causal=True, enable_gqa=True)


SUBJECTS: dict[str, Callable[[Inputs, int], Call]] = {
    "eviction": lambda inputs, tile_bytes: inputs.gather_kept,
    "kvpress": _kvpress,
    "ours": merging,
    "matching": matching,
    "product": bare_products,
    "tiles": functools.partial(bare_products, in_tiles=True),
}
"""All that ``python -m evaluation speed`` can time, by name. To time one thing more, add it here."""


def measure_seconds(cell: Cell, subjects: Sequence[str], repeats: int, tile_bytes: int) -> Rounds:
    """Time the subjects on a cell: each round runs every subject once."""
    inputs = Inputs.of(cell)
    calls = {name: SUBJECTS[name](inputs, tile_bytes) for name in subjects}
    return time_in_rounds(calls, torch.device(cell.device), repeats)


def measure_extra_bytes(cell: Cell, name: str, tile_bytes: int, threads: int) -> int | None:
    """Bytes by which one call raises the peak memory, on a CPU of a fresh process; None where there is no /proc."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    # Forked from a process that has imported what takes long and done nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kvpress"])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(peak_of_one_call, cell, name, tile_bytes, threads).result()


def peak_of_one_call(cell: Cell, name: str, tile_bytes: int = DEFAULT_TILE_BYTES, threads: int = 0) -> int:
    """Bytes by which one call raises the peak resident set of this process, which should run nothing else."""
    if threads:
        torch.set_num_threads(threads)
    make = SUBJECTS[name]
    # A small call first: what libraries and threads allocate once is not the subject's.
    make(Inputs.of(Cell("cpu", 256, 1, cell.head_dim, 0.5, cell.dtype)), tile_bytes)()
    call = make(Inputs.of(cell), tile_bytes)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = _resident_bytes("VmRSS")
    call()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(entry: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(entry + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no entry {entry}")
