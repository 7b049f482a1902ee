# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
For each evicted position, the survivor whose key is most alike: a maximum inner product search on unit keys.

The matrix of all cosines grows with the square of the context, so :func:`nearest_survivors` holds one tile of it at a
time and keeps of each tile only the best survivor per evicted position. :func:`naive_nearest_survivors` says the same
in a few lines, with the whole matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt, prod

import torch
import torch.nn.functional as F

from kvpress_merging.eviction import Eviction

DEFAULT_TILE_BYTES = 64 * 2**20
"""Most bytes that one tile of cosines takes, unless told otherwise."""

KERNELS = ("auto", "torch")
"""The allowed values of ``kernel``."""

# On a CPU, blocks that its last cache holds until they have been worked on. Measured on two cores at 16,384 tokens:
# from 32 MiB on, reducing a tile costs more; the smaller the tile, the more threads wait for each other, on a busy
# machine most.
_CPU_BLOCK_BYTES = 16 * 2**20
# BLAS rounds the last rows and columns of a product differently where they do not fill a vector register. Whole groups
# of 16 (one AVX-512 register of float32) along both sides, and of 8 along head_dim, give each pair of keys the same
# cosine wherever it stands in the tile and whatever the tile: equal keys then tie exactly.
_SIDE_MULTIPLE = 16
_HEAD_DIM_MULTIPLE = 8
# Survivors reduced at once on a CPU: enough groups to share among the cores, few enough candidates for a second round.
_POOL = 64


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
    n_heads, k_len, head_dim = rows.shape
    first_row = torch.arange(0, n_heads * k_len, k_len, device=rows.device)[:, None]
    flat = rows.reshape(-1, head_dim).index_select(0, (positions + first_row).view(-1))
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
    n_heads, k_len, head_dim = rows.shape
    first_row = torch.arange(0, n_heads * k_len, k_len, device=rows.device)[:, None]
    rows.view(-1, head_dim).index_copy_(0, (positions + first_row).view(-1), new.reshape(-1, head_dim))


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
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)


def naive_nearest_survivors(
    keys: torch.Tensor, has_finite_value: torch.Tensor, eviction: Eviction
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The whole matrix of cosines, head by head: :func:`nearest_survivors` as one would write it down.

    Products are summed pair by pair, not by BLAS, so that equal keys tie whatever the shapes.
    """
    similarity = torch.full(eviction.evicted.shape, -torch.inf, dtype=torch.float32, device=keys.device)
    target = torch.zeros_like(eviction.evicted)
    for b, heads, n_survivors, n_evicted in head_blocks(eviction, heads_per_block=1):
        h = heads.start
        survivors, evicted = eviction.survivors[b, h, :n_survivors], eviction.evicted[b, h, :n_evicted]
        if n_survivors == 0 or n_evicted == 0:
            continue
        rows = keys[b, h].float()
        usable = rows.isfinite().all(dim=-1) & has_finite_value[b, h]
        unit = rows / rows.abs().amax(dim=-1, keepdim=True)
        unit = (unit / unit.norm(dim=-1, keepdim=True)).nan_to_num(0.0)

        cosine = (unit[evicted, None] * unit[survivors]).sum(dim=-1)
        cosine = cosine.masked_fill(~usable[evicted, None] | ~usable[survivors], -torch.inf)
        similarity[b, h, :n_evicted], target[b, h, :n_evicted] = cosine.max(dim=-1)
    return similarity, target


@torch.no_grad()
def nearest_survivors(
    keys: torch.Tensor,
    has_finite_value: torch.Tensor,
    eviction: Eviction,
    *,
    tile_bytes: int = DEFAULT_TILE_BYTES,
    kernel: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    For each evicted position, its most cosine-similar survivor of the same head.

    ``similarity_i = max_j cos(k_i, k_j)`` over the survivors j, in float32 on rows scaled by their largest magnitude; a
    zero key has cosine 0 with everything. The survivor at the lowest position wins a tie. A survivor whose key or value
    is not finite is never chosen; an evicted position whose key or value is not finite, and every position of a head
    without a survivor to choose, gets similarity -inf. Neither depends on the tile, beyond float32 rounding.

    Needs, besides its result, a float32 copy of the survivors' keys of one head (of several where they are small) and
    one tile. Reads nothing back from the device.

    Parameters
    ----------
    keys : torch.Tensor
        The layer's keys before the eviction, shape ``(bsz, num_key_value_heads, k_len, head_dim)``, any float dtype.
    has_finite_value : torch.Tensor
        Where the value beside the key is finite, bool, shape ``(bsz, num_key_value_heads, k_len)``.
    eviction : Eviction
        Which positions survived and which were evicted.
    tile_bytes : int
        Most bytes that one tile of cosines takes; a tile has at least 16 x 16 cosines.
    kernel : str
        One of :data:`KERNELS`.

    Returns
    -------
    similarity : torch.Tensor
        float32, shape ``(bsz, num_key_value_heads, n_evicted)``; -inf in padding.
    target : torch.Tensor
        Index into ``eviction.survivors`` of the same head, int64, same shape; 0 where the similarity is -inf, unless
        only the evicted position itself is at fault.

    Raises
    ------
    ValueError
        If ``tile_bytes`` is below 1 or ``kernel`` is not one of :data:`KERNELS`.
    """
    if tile_bytes < 1:
        raise ValueError(f"tile_bytes must be at least 1, got {tile_bytes}")
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(map(repr, KERNELS))}, got {kernel!r}")

    norm = row_norms(keys)
    is_usable = norm.isfinite() & has_finite_value
    root = norm.masked_fill_(norm == 0, 1.0).rsqrt_().float()
    similarity = torch.full(eviction.evicted.shape, -torch.inf, dtype=torch.float32, device=keys.device)
    target = torch.zeros_like(eviction.evicted)

    heads_per_block, _, _ = tile_shape(
        eviction.survivors.shape[-1], eviction.evicted.shape[-1], keys.device, tile_bytes
    )
    for b, heads, n_survivors, n_evicted in head_blocks(eviction, heads_per_block):
        if n_survivors == 0 or n_evicted == 0:
            continue
        _search(
            keys[b, heads],
            root[b, heads],
            is_usable[b, heads],
            eviction.survivors[b, heads, :n_survivors],
            eviction.evicted[b, heads, :n_evicted],
            similarity[b, heads, :n_evicted],
            target[b, heads, :n_evicted],
            tile_bytes,
        )
    return similarity, target


def _search(
    keys: torch.Tensor,
    root: torch.Tensor,
    is_usable: torch.Tensor,
    survivors: torch.Tensor,
    evicted: torch.Tensor,
    similarity: torch.Tensor,
    target: torch.Tensor,
    tile_bytes: int,
) -> None:
    """
    Search a block of heads, tile by tile, and write ``similarity`` and ``target`` in place.

    Shapes are those of :func:`nearest_survivors` without the batch axis and without padding; ``root`` is one over the
    square root of the keys' norms.
    """
    n_heads, n_evicted = evicted.shape
    n_survivors = survivors.shape[-1]
    _, n_rows, n_columns = tile_shape(n_survivors, n_evicted, keys.device, tile_bytes)
    buffer = torch.empty(n_heads * n_rows * n_columns, dtype=torch.float32, device=keys.device)

    # A survivor that must not be chosen stands in as a copy of the lowest one that may: the copy can only tie with it,
    # and is read as the original below. Padding is made of the same copies. An evicted position that is not finite
    # spoils its own column alone.
    is_target = is_usable.gather(-1, survivors)
    lowest = is_target.to(torch.uint8).argmax(dim=-1, keepdim=True)
    origin = torch.where(is_target, torch.arange(n_survivors, device=keys.device), lowest)
    origin = torch.cat([origin, lowest.expand(-1, -n_survivors % _SIDE_MULTIPLE)], dim=-1)
    queries = F.pad(evicted, (0, -n_evicted % _SIDE_MULTIPLE))

    blocks = _unit_keys(keys, root, survivors.gather(-1, origin)).split(n_rows, dim=1)
    best, index = [], []
    for block_of_queries in queries.split(n_columns, dim=1):
        query_keys = _unit_keys(keys, root, block_of_queries).transpose(1, 2)
        best_of_groups, row_of_groups, n_before = [], [], 0
        for block in blocks:
            shape = (n_heads, block.shape[1], query_keys.shape[2])
            tile = torch.bmm(block, query_keys, out=buffer[: prod(shape)].view(shape))
            best_of_group, row_of_group = first_max(tile, _POOL)
            best_of_groups.append(best_of_group)
            row_of_groups.append(row_of_group + n_before if n_before else row_of_group)
            n_before += block.shape[1]
        all_best = torch.cat(best_of_groups, dim=1)
        best_of_all, group = first_max(all_best, all_best.shape[1])
        best.append(best_of_all[:, 0])
        index.append(torch.cat(row_of_groups, dim=1).gather(1, group)[:, 0])

    is_found = is_usable.gather(-1, evicted) & is_target.gather(-1, lowest)
    similarity.copy_(torch.cat(best, dim=-1)[:, :n_evicted].masked_fill(~is_found, -torch.inf))
    target.copy_(origin.gather(-1, torch.cat(index, dim=-1)[:, :n_evicted]))


def tile_shape(n_survivors: int, n_evicted: int, device: torch.device, tile_bytes: int) -> tuple[int, int, int]:
    """
    Heads, survivors and evicted positions of one tile: twice as many survivors as evicted where there is a choice.

    Survivors and evicted positions come in multiples of ``_SIDE_MULTIPLE``.
    """

    def multiple(n: int) -> int:
        return max(1, n // _SIDE_MULTIPLE) * _SIDE_MULTIPLE

    n_cosines = block_bytes(device, tile_bytes) // 4
    n_rows = min(multiple(isqrt(2 * n_cosines)), multiple(n_survivors + _SIDE_MULTIPLE - 1))
    n_columns = min(multiple(n_cosines // n_rows), multiple(n_evicted + _SIDE_MULTIPLE - 1))
    return max(1, n_cosines // (n_rows * n_columns)), n_rows, n_columns


def _unit_keys(keys: torch.Tensor, root: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Keys at these positions with norm 1, in float32, ``head_dim`` padded with zeros to ``_HEAD_DIM_MULTIPLE``."""
    unit = gather_rows(keys, positions).float()
    factor = root.gather(-1, positions)[..., None]
    # Twice, since one over the norm itself may be too large or too small for float32.
    unit.mul_(factor).mul_(factor)
    n_missing = -unit.shape[-1] % _HEAD_DIM_MULTIPLE
    return F.pad(unit, (0, n_missing)) if n_missing else unit


def first_max(tile: torch.Tensor, rows_per_group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Largest entry of each column, and the lowest row that has it, in each group of rows.

    Parameters
    ----------
    tile : torch.Tensor
        float32, shape ``(n_heads, n_rows, n_columns)``, contiguous.
    rows_per_group : int
        Rows that a CPU searches together. Other devices take all rows for one group.

    Returns
    -------
    tuple of torch.Tensor
        The maxima, float32, and their rows, int64, each of shape ``(n_heads, n_groups, n_columns)``.
    """
    if tile.device.type != "cpu":
        best, row = tile.max(dim=1, keepdim=True)
        return best, row
    # On a CPU ``max`` with indices runs one number at a time. Max pooling over an image of n_rows x 1 pixels with
    # n_columns channels, stored channels last, is the same search, vectorised: it too keeps the first of equals.
    image = tile.unsqueeze(2).permute(0, 3, 1, 2)
    window = (min(rows_per_group, tile.shape[1]), 1)
    best, row = F.max_pool2d(image, window, ceil_mode=True, return_indices=True)
    return best[..., 0].transpose(1, 2), row[..., 0].transpose(1, 2)
