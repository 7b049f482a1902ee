# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
For each evicted position, the survivor whose key is most alike: a maximum inner product search on unit keys.

The matrix of all cosines grows with the square of the context, so :func:`nearest_survivors` holds a tile of it at a
time: all survivors of some heads and some of their evicted positions. :func:`naive_nearest_survivors` says the same in
a few lines, with the whole matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels.products import Side, full_precision, multiply, scaled_keys
from kvpress_merging.kernels.rows import (
    DEFAULT_TILE_BYTES,
    alike_heads,
    first_max,
    flat_rows,
    gather_rows,
    head_slices,
    padded_lists,
    row_norms,
)

KERNELS = ("auto", "torch", "triton")
"""
The allowed values of ``kernel``: ``"torch"`` holds one tile of cosines at a time, ``"triton"`` none (see
``nearest_triton.py``). ``"auto"`` is torch: on no GPU has Triton been measured yet.
"""

# BLAS rounds the last rows and columns of a product differently where they do not fill the block of its innermost loop:
# 16 rows of MKL's for AVX-512, but 24 by 6 of its for AVX2, and blocks of two of these. Whole groups of both sides, and
# of 8 along head_dim (see products.py), give each pair of keys the same cosine wherever it stands in the tile and
# whatever the tile: equal keys tie exactly.
_GROUP = 48
# Of one head's tile on a CPU, as its second cache may hold it. Measured: 1 and 16 MiB are slower.
_CPU_TILE_BYTES = 4 * 2**20


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

    ``similarity_i = max_j cos(k_i, k_j)`` over the survivors j, in float32 on rows scaled to unit length; a zero key
    has cosine 0 with everything. The survivor at the lowest position wins a tie. A survivor whose key or value is not
    finite is never chosen; an evicted position whose key or value is not finite, and every position of a head without
    a survivor to choose, gets similarity -inf. Neither depends on the tile, beyond float32 rounding.

    16-bit keys on CUDA are multiplied as they are and added up in float32, all others as float32 by IEEE's rules: the
    user's settings for TF32 and the like change nothing, here as in matching (see ``products.py``).

    Needs, besides its result, two copies of the keys of one head (of several where they are small) in the dtype that is
    multiplied, and one tile. Reads nothing back from the device. The same input gives the same bits on every run, on
    CUDA as far as cuBLAS promises it: on one kind of GPU, on one stream.

    Parameters
    ----------
    keys : torch.Tensor
        The layer's keys before the eviction, shape ``(bsz, num_key_value_heads, k_len, head_dim)``, any float dtype.
    has_finite_value : torch.Tensor
        Where the value beside the key is finite, bool, shape ``(bsz, num_key_value_heads, k_len)``.
    eviction : Eviction
        Which positions survived and which were evicted.
    tile_bytes : int
        Most bytes that one tile of cosines takes; a tile has at least 48 evicted positions and all survivors of a head.
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
    search, multiples = _search_tiles, (_GROUP, _GROUP)
    if kernel == "triton":
        if find_spec("triton") is None:
            raise ValueError("kernel='triton' needs triton, which is not installed; use kernel='torch'")
        from kvpress_merging.kernels import nearest_triton

        nearest_triton.check_runs(keys.device, keys.shape[-1])
        search, multiples = nearest_triton.search, nearest_triton.MULTIPLES
    shape, device = eviction.evicted.shape, keys.device
    n_heads = shape[0] * shape[1]
    similarity = torch.full((n_heads, shape[-1]), -torch.inf, dtype=torch.float32, device=device)
    target = torch.zeros(similarity.shape, dtype=torch.int64, device=device)
    if eviction.n_survivors == 0 or eviction.n_evicted == 0:
        return similarity.view(shape), target.view(shape)

    keys, has_finite_value = keys.flatten(0, 1), has_finite_value.flatten(0, 1)
    (k_len, head_dim), counts = keys.shape[1:], eviction.counts_of_heads
    survivors, evicted = padded_lists(eviction)
    nowhere = evicted.new_full((n_heads, max(multiples)), k_len)
    norm = row_norms(keys)
    is_usable = F.pad(has_finite_value & (norm < torch.inf), (0, 1))
    with full_precision(device):
        # A copy of all keys, and of those of both sides.
        for heads in head_slices(n_heads, 2 * 4 * k_len * (head_dim + 2), device):
            # Both sides next to each other, each in whole groups; what may not be chosen is nowhere.
            max_survivors, max_evicted = map(max, zip(*counts[heads]))
            missing = -max_survivors % multiples[0], -max_evicted % multiples[1]
            listed = [
                survivors[heads, :max_survivors],
                nowhere[heads, : missing[0]],
                evicted[heads, :max_evicted],
                nowhere[heads, : missing[1]],
            ]
            positions = torch.cat(listed, dim=1)
            positions = torch.where(is_usable[heads].gather(1, positions), positions, k_len)
            flat = flat_rows(positions, k_len + 1)
            rows, scale = scaled_keys(keys[heads], norm[heads])
            both = Side(gather_rows(rows, flat), None if scale is None else gather_rows(scale, flat))
            n_columns = max_survivors + missing[0]
            left, right = (both.part(slice(None), some) for some in (slice(n_columns), slice(n_columns, None)))
            right.rows[..., head_dim : head_dim + 2] = right.rows[..., head_dim : head_dim + 2].flip(-1)
            found = similarity[heads], target[heads]
            for some, columns, best, index in search(left, right, head_dim, counts[heads], tile_bytes):
                best = best if right.scale is None else best * right.scale[some, columns]
                found[0][some, columns], found[1][some, columns] = best, index
    return similarity.view(shape), target.view(shape)


def _search_tiles(
    survivors: Side, evicted: Side, head_dim: int, counts: Sequence[tuple[int, int]], tile_bytes: int
) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
    """
    The largest product of each evicted position and the first survivor that has it, one tile at a time.

    ``survivors`` and ``evicted`` are those of some heads, in whole groups of 48; ``counts`` says how many of each are
    no padding. Yielded are heads, evicted positions, what is largest, float32, and which survivor has it, int64.
    """
    device = evicted.rows.device
    for heads, n_survivors, n_evicted in alike_heads(counts, _bytes_of_cosines, device, tile_bytes):
        of_survivors = survivors.part(heads, slice(_whole(n_survivors)))
        step = tile_columns(n_survivors, device, tile_bytes)
        for first in range(0, n_evicted, step):
            stop = min(first + step, n_evicted)
            tile = multiply(of_survivors.rows, evicted.rows[heads, first : _whole(stop)].mT)
            if of_survivors.scale is not None:
                tile.mul_(of_survivors.scale[..., None])
            best, index = first_max(tile)
            yield heads, slice(first, stop), best[:, : stop - first], index[:, : stop - first]


def tile_columns(n_survivors: int, device: torch.device, tile_bytes: int) -> int:
    """How many evicted positions a tile holds beside all survivors of a head: whole groups, at least one."""
    n_bytes = min(tile_bytes, _CPU_TILE_BYTES) if device.type == "cpu" else tile_bytes
    return max(1, n_bytes // _bytes_of_cosines(_whole(n_survivors), _GROUP)) * _GROUP


def _bytes_of_cosines(n_survivors: int, n_evicted: int) -> int:
    return 4 * n_survivors * n_evicted


def _whole(n: int) -> int:
    """The next multiple of a group."""
    return n + -n % _GROUP


def naive_nearest_survivors(
    keys: torch.Tensor, has_finite_value: torch.Tensor, eviction: Eviction
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The whole matrix of cosines, head by head: :func:`nearest_survivors` as one would write it down.

    Products are summed pair by pair, not by BLAS, so that equal keys tie whatever the shapes.
    """
    similarity = torch.full(eviction.evicted.shape, -torch.inf, dtype=torch.float32, device=keys.device)
    target = torch.zeros_like(eviction.evicted)
    for b, h, survivors, _, evicted in eviction.heads():
        if len(survivors) == 0 or len(evicted) == 0:
            continue
        rows = keys[b, h].float()
        usable = rows.isfinite().all(dim=-1) & has_finite_value[b, h]
        unit = rows / rows.abs().amax(dim=-1, keepdim=True)
        unit = (unit / unit.norm(dim=-1, keepdim=True)).nan_to_num(0.0)

        cosine = (unit[evicted, None] * unit[survivors]).sum(dim=-1)
        cosine = cosine.masked_fill(~usable[evicted, None] | ~usable[survivors], -torch.inf)
        similarity[b, h, : len(evicted)], target[b, h, : len(evicted)] = cosine.max(dim=-1)
    return similarity, target
