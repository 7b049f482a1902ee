# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Rows of a cache layer: walked head by head under a memory budget, gathered by position, measured, added up."""

from __future__ import annotations

from collections.abc import Iterator

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


def flat_rows(positions: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Where each head's rows stand among the rows of all: of the positions, int64, shape ``(n_heads, n)``, in a row."""
    first_row = torch.arange(0, len(positions) * n_rows, n_rows, device=positions.device)
    return (positions + first_row[:, None]).view(-1)


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
    # Block by block, since PyTorch makes a float64 copy of what it is given.
    copy_bytes = _CPU_COPY_BYTES if rows.device.type == "cpu" else DEFAULT_TILE_BYTES
    if 8 * rows.numel() <= copy_bytes:
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


def adds_by_segment(device: torch.device) -> bool:
    """Whether :func:`add_rows_` wants the rows that go to one place beside each other: everywhere but on a CPU."""
    return device.type != "cpu"


def add_rows_(sums: torch.Tensor, to_row: torch.Tensor, rows: torch.Tensor) -> None:
    """
    ``sums[to_row] += rows`` in place, each sum in the order of the rows, so that every run gives the same bits.

    CUDA's ``index_add_`` adds in the order in which threads come by, so there each sum is taken over a segment of rows.

    Parameters
    ----------
    sums : torch.Tensor
        float32, shape ``(n_rows, ...)``.
    to_row : torch.Tensor
        int64, shape ``(n,)``; ascending where :func:`adds_by_segment`.
    rows : torch.Tensor
        float32, shape ``(n, ...)``.
    """
    if not adds_by_segment(rows.device):
        sums.index_add_(0, to_row, rows)
        return
    bounds = torch.searchsorted(to_row, torch.arange(len(sums) + 1, device=rows.device))
    # Not checked, since PyTorch would wait for the device to check that no segment has a negative length.
    sums += torch.segment_reduce(rows, "sum", offsets=bounds, initial=0, unsafe=True)


def stand_ins(
    is_usable: torch.Tensor, survivors: torch.Tensor, multiple_of: int, n_real: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The survivors to search, with a copy of the lowest that may be chosen in place of each that may not.

    Such a copy can only tie with the original, and is read as it. Padding is made of the same copies.

    Parameters
    ----------
    is_usable : torch.Tensor
        Which positions may be chosen, bool, shape ``(n_heads, k_len)``.
    survivors : torch.Tensor
        int64, shape ``(n_heads, n_survivors)``.
    multiple_of : int
        The number of survivors to search is a multiple of it.
    n_real : torch.Tensor, optional
        How many survivors each head has, int, shape ``(n_heads,)``; what stands after them is padding.

    Returns
    -------
    origin : torch.Tensor
        Index into ``survivors`` of each one to search, int64, shape ``(n_heads, padded n_survivors)``.
    is_any : torch.Tensor
        Whether the head has one that may be chosen, bool, shape ``(n_heads, 1)``.
    """
    n_survivors = survivors.shape[-1]
    place = torch.arange(n_survivors, device=survivors.device)
    is_target = is_usable.gather(-1, survivors)
    if n_real is not None:
        is_target &= place < n_real[:, None]
    lowest = is_target.view(torch.uint8).argmax(dim=-1, keepdim=True)
    origin = torch.where(is_target, place, lowest)
    n_missing = -n_survivors % multiple_of
    if n_missing > 0:
        origin = torch.cat([origin, lowest.expand(-1, n_missing)], dim=-1)
    return origin, is_target.gather(-1, lowest)
