# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""The search for the nearest survivor by PyTorch's own operations: one tile of cosines at a time, and its maxima."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt, prod

import torch
import torch.nn.functional as F

from kvpress_merging.kernels.buckets import (
    SIDE_MULTIPLE,
    Counts,
    find_buckets,
    head_slices,
    on_device,
    pack,
    unpack,
    whole_groups,
)
from kvpress_merging.kernels.products import ScaledKeys, products
from kvpress_merging.kernels.rows import block_bytes

# Survivors reduced at once on a CPU: enough groups to share among the cores, few enough candidates for a second round.
_POOL = 64


def search(
    scaled: ScaledKeys, flat: torch.Tensor, n_survivors: int, counts: Counts | None, tile_bytes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The best cosine of each evicted position and the first survivor that has it, tile by tile.

    Parameters
    ----------
    scaled : ScaledKeys
        The keys of all heads.
    flat : torch.Tensor
        Where survivors and then evicted positions stand among all heads' laid end to end, int64, shape
        ``(n_heads, n_survivors + n_evicted)``. All may be chosen, unless none of the head may.
    n_survivors, counts, tile_bytes
        See :func:`kvpress_merging.kernels.nearest.find_nearest`.

    Returns
    -------
    tuple of torch.Tensor
        float32 and int64, shape ``(n_heads, n_evicted)``; indices are below ``n_survivors``.
    """
    n_heads, width = flat.shape
    n_evicted, k_len = width - n_survivors, scaled.keys.shape[1]
    sizes = counts or [(n_survivors, n_evicted)] * n_heads
    bytes_of_heads = [4 * whole_groups(n) * whole_groups(m) for n, m in sizes]
    max_block = block_bytes(flat.device, tile_bytes)
    # Many small tiles are made in one go, large ones as they stay in a CPU's caches.
    max_bytes = tile_bytes if max(bytes_of_heads) <= max_block // 8 else max_block
    found = []
    for heads in head_slices(bytes_of_heads, max_bytes, max_block):
        block = flat[heads] - heads.start * k_len if heads.start else flat[heads]
        if counts is None:
            found.append(_search_even(scaled[heads], block, n_survivors, tile_bytes))
        else:
            found.append(_search_ragged(scaled[heads], block, n_survivors, counts[heads], tile_bytes))
    best, index = found[0] if len(found) == 1 else (torch.cat(parts) for parts in zip(*found))
    return best, index


def _search_even(
    scaled: ScaledKeys, flat: torch.Tensor, n_survivors: int, tile_bytes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    n_evicted = flat.shape[1] - n_survivors
    n_padded, n_missing = whole_groups(n_survivors), -n_evicted % SIDE_MULTIPLE
    if n_padded > n_survivors or n_missing:
        survivors, evicted = flat[:, :n_survivors], flat[:, n_survivors:]
        of_survivors = survivors[:, :1].expand(-1, n_padded - n_survivors)
        flat = torch.cat([survivors, of_survivors, evicted, evicted[:, :1].expand(-1, n_missing)], dim=1)
    sides = [n_padded, flat.shape[1] - n_padded]
    rows, inverse_norms = scaled.rows(flat), scaled.inverse_norms(flat)
    best, index = _walk_tiles(
        rows.split(sides, dim=1), None if inverse_norms is None else inverse_norms.split(sides, dim=1), tile_bytes
    )
    if n_padded > n_survivors:
        index.clamp_(max=n_survivors - 1)  # where nothing may be chosen, padding may be
    return best[:, :n_evicted], index[:, :n_evicted]


def _search_ragged(
    scaled: ScaledKeys, flat: torch.Tensor, n_survivors: int, counts: Counts, tile_bytes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bucket by bucket, each laid out after the other: all survivors of its heads, then all evicted positions."""
    n_heads, width = flat.shape
    n_evicted = width - n_survivors
    buckets = find_buckets(counts)
    if not buckets:
        nothing = torch.zeros(n_heads, n_evicted, dtype=torch.int64, device=flat.device)
        return nothing.float(), nothing
    packed = flat.reshape(-1).index_select(0, on_device(pack(counts, buckets, width, n_survivors), flat.device))
    rows, inverse_norms = scaled.rows(packed), scaled.inverse_norms(packed)
    sides = [len(bucket.heads) * n for bucket in buckets for n in (bucket.n_survivors, bucket.n_evicted)]
    parts = rows.split(sides)
    norms_of_parts = None if inverse_norms is None else inverse_norms.split(sides)
    found = []
    for number, bucket in enumerate(buckets):
        both, shape = slice(2 * number, 2 * number + 2), (len(bucket.heads), -1)
        best, index = _walk_tiles(
            [part.view(*shape, part.shape[-1]) for part in parts[both]],
            None if norms_of_parts is None else [part.view(shape) for part in norms_of_parts[both]],
            tile_bytes,
        )
        found.append((best.reshape(-1), index.reshape(-1)))
    best, index = found[0] if len(found) == 1 else (torch.cat(of_buckets) for of_buckets in zip(*found))
    if any(bucket.n_survivors > n_survivors for bucket in buckets):
        index.clamp_(max=n_survivors - 1)
    places = on_device(unpack(buckets, n_heads, n_evicted), flat.device)
    return best[places], index[places]


def _walk_tiles(
    rows: Sequence[torch.Tensor], inverse_norms: Sequence[torch.Tensor] | None, tile_bytes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The largest product of each evicted position with a survivor of its head, and the first survivor that has it.

    Parameters
    ----------
    rows : sequence of two torch.Tensor
        Of survivors and of evicted positions, shapes ``(n_heads, n_survivors, head_dim)`` and
        ``(n_heads, n_evicted, head_dim)``, in whole groups.
    inverse_norms : sequence of two torch.Tensor, optional
        What to multiply the products with, float32, shape of ``rows`` without ``head_dim``.
    tile_bytes : int
        See :func:`kvpress_merging.kernels.nearest.nearest_survivors`.
    """
    (n_heads, n_survivors, _), n_evicted, device = rows[0].shape, rows[1].shape[1], rows[0].device
    _, n_rows, n_columns = tile_shape(n_survivors, n_evicted, device, tile_bytes)
    is_one = n_rows >= n_survivors and n_columns >= n_evicted
    # Allocated once, since one for each tile would break up the C library's heap.
    buffer = None if is_one else torch.empty(n_heads * n_rows * n_columns, dtype=torch.float32, device=device)
    blocks = rows[0].split(n_rows, dim=1)
    norms_of_blocks = [None] * len(blocks) if inverse_norms is None else inverse_norms[0].split(n_rows, dim=1)
    found = []
    for columns in rows[1].transpose(1, 2).split(n_columns, dim=2):
        best, index = _best_of_block(blocks[0], columns, norms_of_blocks[0], buffer)
        for number, block in enumerate(blocks[1:], start=1):
            best_of_block, row = _best_of_block(block, columns, norms_of_blocks[number], buffer)
            is_better = best_of_block > best
            best = torch.where(is_better, best_of_block, best)
            index = torch.where(is_better, row.add_(number * n_rows), index)
        found.append((best, index))
    best, index = found[0] if len(found) == 1 else (torch.cat(parts, dim=1) for parts in zip(*found))
    return best if inverse_norms is None else best * inverse_norms[1], index


def _best_of_block(
    block: torch.Tensor, columns: torch.Tensor, inverse_norms: torch.Tensor | None, buffer: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The largest product of each column with a block of survivors, and the first row that has it.

    Parameters
    ----------
    block, columns : torch.Tensor
        Shapes ``(n_heads, n_rows, head_dim)`` and ``(n_heads, head_dim, n_columns)``.
    inverse_norms : torch.Tensor or None
        What to multiply the block's products with, float32, shape ``(n_heads, n_rows)``.
    buffer : torch.Tensor or None
        float32, for the products.

    Returns
    -------
    tuple of torch.Tensor
        float32 and int64, shape ``(n_heads, n_columns)``.
    """
    shape = (*block.shape[:2], columns.shape[2])
    tile = products(block, columns, out=None if buffer is None else buffer[: prod(shape)].view(shape))
    if inverse_norms is not None:
        tile.mul_(inverse_norms[:, :, None])
    # Where there are heads enough to share among the cores, each is searched in one go.
    best, row = first_max(tile, shape[1] if shape[0] >= torch.get_num_threads() else _POOL)
    if best.shape[1] > 1:
        best, group = first_max(best, best.shape[1])
        row = row.gather(1, group)
    return best[:, 0], row[:, 0]


def tile_shape(n_survivors: int, n_evicted: int, device: torch.device, tile_bytes: int) -> tuple[int, int, int]:
    """
    Heads, survivors and evicted positions of one tile: twice as many survivors as evicted where there is a choice.

    Survivors and evicted positions come in multiples of ``SIDE_MULTIPLE``.
    """

    def multiple(n: int) -> int:
        return max(1, n // SIDE_MULTIPLE) * SIDE_MULTIPLE

    n_cosines = block_bytes(device, tile_bytes) // 4
    n_rows = min(multiple(isqrt(2 * n_cosines)), multiple(n_survivors + SIDE_MULTIPLE - 1))
    n_columns = min(multiple(n_cosines // n_rows), multiple(n_evicted + SIDE_MULTIPLE - 1))
    return max(1, n_cosines // (n_rows * n_columns)), n_rows, n_columns


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
