# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
Rows of a cache layer: listed, gathered, measured, added up. Heads of all batch rows stand in one axis.

*Nowhere* is a spare row behind the last one: what is padding, what merges nowhere and what must not spread is sent
there, and it is dropped or read as zeros. So heads that kept unequally many positions take the path of all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import inf

import numpy as np
import torch
import torch.nn.functional as F

from kvpress_merging.eviction import Eviction

DEFAULT_TILE_BYTES = 64 * 2**20
"""Most bytes that one tile of cosines takes, unless told otherwise."""

# What a CPU's last cache holds until it has been worked on. Measured on two cores at 16,384 tokens: from 32 MiB on,
# reducing a tile costs more.
_CPU_BLOCK_BYTES = 24 * 2**20
# Share that padding may add on a CPU to what heads need that are worked on together.
_MAX_PADDING = 0.25


def block_bytes(device: torch.device, most: int = DEFAULT_TILE_BYTES) -> int:
    """Bytes of float32 to work on at once: ``most``, or what stays in a CPU's caches if that is less."""
    return min(most, _CPU_BLOCK_BYTES) if device.type == "cpu" else most


def head_slices(n_heads: int, bytes_per_head: int, device: torch.device) -> Iterator[slice]:
    """Cut heads into runs that take at most :func:`block_bytes` together, or are one head."""
    step = max(1, block_bytes(device) // max(1, bytes_per_head))
    return (slice(start, min(start + step, n_heads)) for start in range(0, n_heads, step))


def alike_heads(
    counts: Sequence[tuple[int, int]],
    bytes_of: Callable[[int, int], int],
    device: torch.device,
    most: int = DEFAULT_TILE_BYTES,
) -> Iterator[tuple[slice, int, int]]:
    """
    Cut heads that kept unequally many positions into runs to be worked on together, padded to the widest of each.

    ``counts`` are survivors and evicted positions of each head; ``bytes_of`` says what a head with so many takes. A run
    takes at most :func:`block_bytes`, or is one head. On a CPU, where padding costs the time that it takes, it adds at
    most a quarter; elsewhere heads that fit one block cost a launch more than they do. Yielded are the heads of a run,
    and the largest numbers of survivors and of evicted positions. Heads without either have nothing to do: runs of such
    heads alone are passed over.
    """
    max_bytes, max_padding = block_bytes(device, most), _MAX_PADDING if device.type == "cpu" else inf
    sizes = [(n, m) if n and m else (0, 0) for n, m in counts]
    start, needed, widest = 0, 0, (0, 0)
    for head, size in enumerate(sizes):
        wider = max(widest[0], size[0]), max(widest[1], size[1])
        padded, all_needed = (head + 1 - start) * bytes_of(*wider), needed + bytes_of(*size)
        if head > start and padded > min(max_bytes, (1 + max_padding) * all_needed):
            if widest != (0, 0):
                yield slice(start, head), *widest
            start, wider, all_needed = head, size, bytes_of(*size)
        widest, needed = wider, all_needed
    if widest != (0, 0):
        yield slice(start, len(sizes)), *widest


def padded_lists(eviction: Eviction, n_slots: int | None = None) -> list[torch.Tensor]:
    """
    Survivors and evicted positions with padding at ``k_len``, and slots with padding at ``n_slots``, if that is given.

    int64, shapes ``(n_heads, n_survivors)``, ``(n_heads, n_evicted)`` and ``(n_heads, n_survivors)``.
    """
    lists = [(eviction.survivors, 0, eviction.k_len), (eviction.evicted, 1, eviction.k_len)]
    if n_slots is not None:
        lists.append((eviction.slots, 0, n_slots))
    if eviction.counts is None:
        return [entries.flatten(0, 1) for entries, _, _ in lists]
    counts = on_device(np.array(eviction.counts), eviction.evicted.device)
    place = torch.arange(max(entries.shape[-1] for entries, _, _ in lists), device=counts.device)
    is_padding = [place[: entries.shape[-1]] >= counts[:, side : side + 1] for entries, side, _ in lists[:2]]
    return [entries.flatten(0, 1).masked_fill(is_padding[side], nowhere) for entries, side, nowhere in lists]


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on a device, without waiting for it: from page-locked memory, since a copy from any other waits."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def flat_rows(positions: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Positions in heads of ``n_rows`` rows, int64, shape ``(n_heads, n)``, as rows of all heads laid end to end."""
    return positions + torch.arange(0, len(positions) * n_rows, n_rows, device=positions.device)[:, None]


def gather_rows(table: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """
    Rows of a table of all heads, shape ``(n_heads, n_rows, ...)``, by where they stand when heads are laid end to end.

    Copies whole rows, where ``torch.gather`` would look up an index for each number (30 times slower on a CPU). New, of
    shape ``(*flat.shape, ...)``.
    """
    return table.flatten(0, 1).index_select(0, flat.flatten()).view(*flat.shape, *table.shape[2:])


def row_norms(rows: torch.Tensor) -> torch.Tensor:
    """
    Euclidean norm of each row, in float64, where no square of a finite float32 overflows or vanishes.

    Of ``rows``, shape ``(n_heads, k_len, head_dim)``, any float dtype; finite exactly where a row is finite in float32.
    """
    rows = rows.float() if rows.dtype == torch.float64 else rows
    # Some positions of all heads at a time, since PyTorch makes a float64 copy of what it is given.
    step = max(1, block_bytes(rows.device) // 2 // max(1, 8 * len(rows) * rows.shape[-1]))
    norms = [torch.linalg.vector_norm(some, dim=-1, dtype=torch.float64) for some in rows.split(step, dim=1)]
    return norms[0] if len(norms) == 1 else torch.cat(norms, dim=1)


def adds_in_order(device: torch.device) -> bool:
    """Whether ``index_add_`` adds in the order of the rows: on a CPU alone."""
    return device.type == "cpu"


def add_rows_(sums: torch.Tensor, to_row: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """
    ``sums[to_row] += rows`` in place, so that every run gives the same bits: float32 or float64, ``to_row`` int64.

    CUDA's ``index_add_`` adds in the order in which threads come by. There the sums are those of an embedding's
    gradient: PyTorch sorts by row and adds a few rows at a time, then these partial sums, so that many rows that go to
    one are shared among threads.
    """
    if adds_in_order(rows.device):
        return sums.index_add_(0, to_row, rows)
    return sums.add_(torch.ops.aten.embedding_dense_backward(rows, to_row, len(sums), -1, False))


def first_max(tile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Largest entry of each column of ``tile``, float32, shape ``(n_heads, n_rows, n_columns)``, and the first row that
    has it.

    On a CPU ``max`` with indices runs one number at a time. Max pooling over an image of n_rows x 1 pixels with
    n_columns channels, stored channels last, is the same search, vectorised: 13 times faster.
    """
    if tile.device.type != "cpu":
        best, row = tile.max(dim=1)
        return best, row
    image = tile.unsqueeze(2).permute(0, 3, 1, 2)
    best, row = F.max_pool2d(image, (tile.shape[1], 1), return_indices=True)
    return best[:, :, 0, 0], row[:, :, 0, 0]
