# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Rows of a cache layer: gathered by position, measured, added up."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

from kvpress_merging.eviction import Eviction

DEFAULT_TILE_BYTES = 64 * 2**20
"""Most bytes that one tile of cosines takes, unless told otherwise."""

# On a CPU, blocks that its last cache holds until they have been worked on. Measured on two cores at 16,384 tokens:
# from 32 MiB on, reducing a tile costs more; the smaller the tile, the more threads wait for each other, on a busy
# machine most.
_CPU_BLOCK_BYTES = 16 * 2**20
# Of a copy that is read once, right after it is made. Measured: 1 MiB and 16 MiB are slower.
_CPU_COPY_BYTES = 4 * 2**20


def block_bytes(device: torch.device, most: int = DEFAULT_TILE_BYTES) -> int:
    """Bytes of float32 to work on at once: ``most``, or what stays in a CPU's caches if that is less."""
    return min(most, _CPU_BLOCK_BYTES) if device.type == "cpu" else most


def head_blocks(eviction: Eviction, heads_per_block: int) -> Iterator[tuple[int, slice, int, int]]:
    """
    Walk an eviction in blocks of heads that agree in how many positions they kept and evicted.

    Parameters
    ----------
    eviction : Eviction
        What to walk. A ragged one is walked head by head, so that nobody computes on padding.
    heads_per_block : int
        Most heads in a block of an even eviction.

    Yields
    ------
    tuple of (int, slice, int, int)
        Batch row, heads, number of survivors and number of evicted positions of each of these heads.
    """
    bsz, num_key_value_heads, n_survivors = eviction.survivors.shape
    if eviction.counts is not None:
        for row, (n_survivors, n_evicted) in enumerate(eviction.counts):
            b, h = divmod(row, num_key_value_heads)
            yield b, slice(h, h + 1), n_survivors, n_evicted
        return
    for b in range(bsz):
        for h in range(0, num_key_value_heads, heads_per_block):
            yield b, slice(h, min(h + heads_per_block, num_key_value_heads)), n_survivors, eviction.evicted.shape[-1]


@lru_cache(maxsize=64)
def first_rows(n_heads: int, n_rows: int, device: torch.device) -> torch.Tensor:
    """
    Where the rows of each head begin when all heads lie one after the other with ``n_rows`` rows each.

    Returns
    -------
    torch.Tensor
        int64, shape ``(n_heads, 1)``. Shared by all who ask for the same: not to be written.
    """
    return (torch.arange(n_heads, device=device) * n_rows)[:, None]


@lru_cache(maxsize=64)
def scalar(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A number as a tensor of shape ``()``, made once. Not to be written."""
    return torch.full((), value, dtype=dtype, device=device)


def flat_rows(positions: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Positions in ``n_heads`` heads, int64, shape ``(n_heads, n)``, as a list of rows of all heads laid end to end."""
    return (positions + first_rows(len(positions), n_rows, positions.device)).view(-1)


def gather_rows(rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """
    Rows by position, for each head.

    Copies whole rows, where ``torch.gather`` would look up an index for each number (30 times slower on a CPU).

    Parameters
    ----------
    rows : torch.Tensor
        Shape ``(n_heads, k_len, head_dim)``.
    positions : torch.Tensor
        int64, shape ``(n_heads, n)``.

    Returns
    -------
    torch.Tensor
        New tensor of shape ``(n_heads, n, head_dim)`` in the dtype of ``rows``.
    """
    k_len, head_dim = rows.shape[1:]
    flat = rows.reshape(-1, head_dim).index_select(0, flat_rows(positions, k_len))
    return flat.view(*positions.shape, head_dim)


def scatter_rows(rows: torch.Tensor, positions: torch.Tensor, new: torch.Tensor) -> None:
    """
    Overwrite rows by position, for each head, in place: the inverse of :func:`gather_rows`.

    Parameters
    ----------
    rows : torch.Tensor
        Shape ``(n_heads, k_len, head_dim)``, contiguous.
    positions : torch.Tensor
        int64, shape ``(n_heads, n)``, none twice within a head.
    new : torch.Tensor
        Shape ``(n_heads, n, head_dim)``, in the dtype of ``rows``.
    """
    k_len, head_dim = rows.shape[1:]
    rows.view(-1, head_dim).index_copy_(0, flat_rows(positions, k_len), new.reshape(-1, head_dim))


def row_norms(rows: torch.Tensor) -> torch.Tensor:
    """
    Euclidean norm of each row, in float64, where no square of a finite float32 overflows or vanishes.

    Parameters
    ----------
    rows : torch.Tensor
        Keys or values of one layer, shape ``(bsz, num_key_value_heads, k_len, head_dim)``, any float dtype.

    Returns
    -------
    torch.Tensor
        float64, shape ``(bsz, num_key_value_heads, k_len)``; finite exactly where the whole row is finite in float32.
    """
    if rows.dtype == torch.float64:
        rows = rows.float()
    # Block by block, since PyTorch makes a float64 copy of what it is given; what is nearly one block is one.
    copy_bytes = _CPU_COPY_BYTES if rows.device.type == "cpu" else DEFAULT_TILE_BYTES
    if 8 * rows.numel() <= 2 * copy_bytes:
        return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
    norms = torch.empty(rows.shape[:-1], dtype=torch.float64, device=rows.device)
    k_len, head_dim = rows.shape[2:]
    rows_per_block = max(1, copy_bytes // (8 * max(1, head_dim)))
    heads_per_block = max(1, rows_per_block // max(1, k_len))
    for b in range(rows.shape[0]):
        for some_heads, their_norms in zip(rows[b].split(heads_per_block), norms[b].split(heads_per_block)):
            for block, out in zip(some_heads.split(rows_per_block, 1), their_norms.split(rows_per_block, 1)):
                torch.linalg.vector_norm(block, dim=-1, dtype=torch.float64, out=out)
    return norms


def adds_in_order(device: torch.device) -> bool:
    """Whether ``index_add_`` adds in the order of the rows: on a CPU alone."""
    return device.type == "cpu"


def add_rows_(sums: torch.Tensor, to_row: torch.Tensor, rows: torch.Tensor) -> None:
    """
    ``sums[to_row] += rows`` in place, so that every run gives the same bits.

    CUDA's ``index_add_`` adds in the order in which threads come by. There the sums are those of an embedding's
    gradient: PyTorch sorts by row and adds a few rows at a time, then these partial sums, so that many rows that go to
    one are shared among threads.

    Parameters
    ----------
    sums : torch.Tensor
        float32 or float64, shape ``(n_rows, n)``.
    to_row : torch.Tensor
        int64, shape ``(n_added,)``.
    rows : torch.Tensor
        Shape ``(n_added, n)``, dtype of ``sums``.
    """
    if adds_in_order(rows.device):
        sums.index_add_(0, to_row, rows)
        return
    sums += torch.ops.aten.embedding_dense_backward(rows, to_row, len(sums), -1, False)
