# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
For each evicted position, the survivor whose key is most alike: a maximum inner product search on unit keys.

The matrix of all cosines grows with the square of the context, so :func:`nearest_survivors` holds one tile of it at a
time and keeps of each tile only the best survivor per evicted position. :func:`naive_nearest_survivors` says the same
in a few lines, with the whole matrix.
"""

from __future__ import annotations

from importlib.util import find_spec
from math import isqrt, prod

import torch
import torch.nn.functional as F

from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels.products import ScaledKeys, full_precision, products
from kvpress_merging.kernels.rows import DEFAULT_TILE_BYTES, block_bytes, head_blocks, row_norms, stand_ins
from kvpress_merging.kernels.trial import serves

KERNELS = ("auto", "torch", "triton")
"""
The allowed values of ``kernel``: ``"torch"`` holds one tile of cosines at a time, ``"triton"`` none (see
``nearest_triton.py``). ``"auto"`` takes the second on CUDA, where it is there and agrees with the first.
"""

# BLAS rounds the last rows and columns of a product differently where they do not fill a vector register. Whole groups
# of 16 (one AVX-512 register of float32) along both sides, and of 8 along head_dim (see products.py), give each pair of
# keys the same cosine wherever it stands in the tile and whatever the tile: equal keys then tie exactly.
_SIDE_MULTIPLE = 16
# Survivors reduced at once on a CPU: enough groups to share among the cores, few enough candidates for a second round.
_POOL = 64


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

    16-bit keys on CUDA are multiplied as they are and added up in float32, all others as float32 by IEEE's rules: the
    user's settings for TF32 and the like change nothing (see ``products.py``).

    Needs, besides its result, a copy of the survivors' keys of one head (of several where they are small) in the dtype
    that is multiplied, and one tile. Reads nothing back from the device, but for the one small trial by which
    ``"auto"`` decides on a kernel. The same input gives the same bits on every run, on CUDA as far as cuBLAS promises
    it: on one kind of GPU, on one stream.

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
        Index into ``eviction.survivors`` of the same head, int64, same shape; 0 where the similarity is -inf.

    Raises
    ------
    ValueError
        If ``tile_bytes`` is below 1, ``kernel`` is not one of :data:`KERNELS`, or it is ``"triton"`` where Triton
        cannot run.
    """
    if tile_bytes < 1:
        raise ValueError(f"tile_bytes must be at least 1, got {tile_bytes}")
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(map(repr, KERNELS))}, got {kernel!r}")
    if kernel == "triton":
        _check_triton_runs(keys)

    norm = row_norms(keys)
    is_usable = (norm < torch.inf) & has_finite_value
    scaled = ScaledKeys.of(keys, norm)
    similarity = torch.full(eviction.evicted.shape, -torch.inf, dtype=torch.float32, device=keys.device)
    target = torch.zeros_like(eviction.evicted)
    if eviction.n_survivors == 0 or eviction.n_evicted == 0:
        return similarity, target

    if kernel == "triton" or (kernel == "auto" and _triton_serves(keys)):
        from kvpress_merging.kernels import nearest_triton

        nearest_triton.search(scaled, is_usable, eviction, similarity, target, tile_bytes)
        return similarity, target

    heads_per_block, _, _ = tile_shape(
        eviction.survivors.shape[-1], eviction.evicted.shape[-1], keys.device, tile_bytes
    )
    with full_precision():
        for b, heads, n_survivors, n_evicted in head_blocks(eviction, heads_per_block):
            if n_survivors == 0 or n_evicted == 0:
                continue
            _search(
                scaled.heads(b, heads),
                is_usable[b, heads],
                eviction.survivors[b, heads, :n_survivors],
                eviction.evicted[b, heads, :n_evicted],
                similarity[b, heads, :n_evicted],
                target[b, heads, :n_evicted],
                tile_bytes,
            )
    return similarity, target


def _search(
    scaled: ScaledKeys,
    is_usable: torch.Tensor,
    survivors: torch.Tensor,
    evicted: torch.Tensor,
    similarity: torch.Tensor,
    target: torch.Tensor,
    tile_bytes: int,
) -> None:
    """
    Search a block of heads, tile by tile, and write ``similarity`` and ``target`` in place.

    Shapes are those of :func:`nearest_survivors` without the batch axis and without padding.
    """
    n_heads, n_evicted = evicted.shape
    _, n_rows, n_columns = tile_shape(survivors.shape[-1], n_evicted, evicted.device, tile_bytes)
    buffer = torch.empty(n_heads * n_rows * n_columns, dtype=torch.float32, device=evicted.device)

    # An evicted position that is not finite spoils its own column alone.
    origin, is_any = stand_ins(is_usable, survivors, _SIDE_MULTIPLE)
    positions = survivors.gather(-1, origin)
    blocks = scaled.rows(positions).split(n_rows, dim=1)
    inverse_norms = scaled.inverse_norms(positions)
    norms_of_blocks = [None] * len(blocks) if inverse_norms is None else inverse_norms.split(n_rows, dim=1)
    n_missing = -n_evicted % _SIDE_MULTIPLE
    queries = F.pad(evicted, (0, n_missing)) if n_missing else evicted

    found = []
    for block_of_queries in queries.split(n_columns, dim=1):
        query_keys = scaled.rows(block_of_queries).transpose(1, 2)
        best, index = _best_of_block(blocks[0], query_keys, norms_of_blocks[0], buffer)
        for number, block in enumerate(blocks[1:], start=1):
            best_of_block, row = _best_of_block(block, query_keys, norms_of_blocks[number], buffer)
            is_better = best_of_block > best
            best = torch.where(is_better, best_of_block, best)
            index = torch.where(is_better, row.add_(number * n_rows), index)
        found.append((best, index))
    best, index = found[0] if len(found) == 1 else (torch.cat(parts, dim=1) for parts in zip(*found))

    cosine, index = best[:, :n_evicted], index[:, :n_evicted]
    if (inverse_norms_of_queries := scaled.inverse_norms(evicted)) is not None:
        cosine = cosine * inverse_norms_of_queries
    is_found = is_usable.gather(-1, evicted) & is_any
    torch.where(is_found, cosine, similarity, out=similarity)
    torch.where(is_found, origin.gather(-1, index), target, out=target)


def _best_of_block(
    block: torch.Tensor, query_keys: torch.Tensor, inverse_norms: torch.Tensor | None, buffer: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The best product of each query with a block of survivors, and the first row that has it.

    Parameters
    ----------
    block, query_keys : torch.Tensor
        Shapes ``(n_heads, n_rows, head_dim)`` and ``(n_heads, head_dim, n_columns)``.
    inverse_norms : torch.Tensor or None
        What to multiply the block's products with, float32, shape ``(n_heads, n_rows)``.
    buffer : torch.Tensor
        float32, for the products: allocated once, since one for each block would break up the C library's heap.

    Returns
    -------
    tuple of torch.Tensor
        float32 and int64, shape ``(n_heads, n_columns)``.
    """
    shape = (*block.shape[:2], query_keys.shape[2])
    tile = products(block, query_keys, out=buffer[: prod(shape)].view(shape))
    if inverse_norms is not None:
        tile.mul_(inverse_norms[:, :, None])
    best, row = first_max(tile, _POOL)
    if best.shape[1] > 1:
        best, group = first_max(best, best.shape[1])
        row = row.gather(1, group)
    return best[:, 0], row[:, 0]


def _check_triton_runs(keys: torch.Tensor) -> None:
    """Raise a ValueError that says why the Triton kernel cannot search these keys, if it cannot."""
    if find_spec("triton") is None:
        raise ValueError("kernel='triton' needs triton, which is not installed; use kernel='torch'")
    from kvpress_merging.kernels import nearest_triton

    nearest_triton.check_runs(keys.device, keys.shape[-1])


def _triton_serves(keys: torch.Tensor) -> bool:
    """Whether ``"auto"`` takes the Triton kernel. Triton is imported only where it may serve."""
    if keys.device.type != "cuda" or find_spec("triton") is None:
        return False
    return serves(keys.device, keys.dtype, keys.shape[-1], nearest_survivors)


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
