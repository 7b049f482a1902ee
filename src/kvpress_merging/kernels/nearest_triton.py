# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
The search for the nearest survivor as one Triton kernel: no tile of cosines ever reaches memory.

Each program holds a block of evicted keys and walks all survivors of its head, block by block, as attention walks keys.
It keeps the best cosine and its place for each pair of (evicted position, column of the block) in registers and reduces
over the columns once, at the end. Import this module only where Triton is wanted: it imports Triton.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from kvpress_merging.kernels.buckets import Counts, head_slices, on_device
from kvpress_merging.kernels.products import ScaledKeys

MAX_HEAD_DIM = 256
"""Longest keys that fit a GPU's shared memory as the kernel lays them out."""

_MIN_HEAD_DIM = 16  # of what tl.dot takes


@triton.jit(do_not_specialize=["n_survivors", "n_queries"])  # type: ignore[untyped-decorator]
def first_best_kernel(  # type: ignore[no-untyped-def]
    queries,
    survivors,
    inverse_norms,
    counts,
    best,
    index,
    n_survivors,
    n_queries,
    HEAD_DIM: tl.constexpr,
    PADDED_HEAD_DIM: tl.constexpr,
    HAS_INVERSE_NORMS: tl.constexpr,
    AS_FLOAT32: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_SURVIVORS: tl.constexpr,
):
    """
    For each query, its largest product with a survivor, times that survivor's inverse norm, and the first to reach it.

    All tensors are contiguous; ``n_survivors`` and ``n_queries`` are whole numbers of blocks, whose rows can all be
    read. Program (i, h) searches block i of the queries of head h, up to the head's own counts.

    Parameters
    ----------
    queries, survivors : pointers
        Shapes ``(n_heads, n_queries, HEAD_DIM)`` and ``(n_heads, n_survivors, HEAD_DIM)``, float32 or 16 bits.
    inverse_norms : pointer
        float32, shape ``(n_heads, n_survivors)``; not read unless HAS_INVERSE_NORMS.
    counts : pointer
        int32, shape ``(n_heads, 2)``: survivors and queries of each head.
    best, index : pointers
        Written: float32 and int32, shape ``(n_heads, n_queries)``. Blocks beyond a head's count are left as they are.
    AS_FLOAT32 : bool
        For Triton's interpreter, which multiplies bfloat16 as if its bits were whole numbers.
    """
    head = tl.program_id(1).to(tl.int64)
    n_survivors_here = tl.load(counts + 2 * head)
    first_query = tl.program_id(0) * BLOCK_QUERIES
    if first_query >= tl.load(counts + 2 * head + 1):
        return
    rows = head * n_queries + first_query + tl.arange(0, BLOCK_QUERIES)
    columns = tl.arange(0, BLOCK_SURVIVORS)
    dims = tl.arange(0, PADDED_HEAD_DIM)
    is_dim = dims < HEAD_DIM

    query_pointers = queries + rows[:, None] * HEAD_DIM + dims[None, :]
    if HEAD_DIM == PADDED_HEAD_DIM:
        query = tl.load(query_pointers)
    else:
        query = tl.load(query_pointers, mask=is_dim[None, :], other=0.0)
    survivor_pointers = survivors + (head * n_survivors + columns)[None, :] * HEAD_DIM + dims[:, None]
    inverse_norm_pointers = inverse_norms + head * n_survivors + columns

    running_best = tl.full((BLOCK_QUERIES, BLOCK_SURVIVORS), float("-inf"), tl.float32)
    running_start = tl.zeros((BLOCK_QUERIES, BLOCK_SURVIVORS), tl.int32)
    for start in range(0, n_survivors_here, BLOCK_SURVIVORS):
        if HEAD_DIM == PADDED_HEAD_DIM:
            survivor = tl.load(survivor_pointers)
        else:
            survivor = tl.load(survivor_pointers, mask=is_dim[:, None], other=0.0)
        if AS_FLOAT32:
            product = tl.dot(query.to(tl.float32), survivor.to(tl.float32), input_precision="ieee")
        else:
            product = tl.dot(query, survivor, input_precision="ieee")
        if HAS_INVERSE_NORMS:
            product *= tl.load(inverse_norm_pointers)[None, :]
        # Later survivors win only if they are better: each column keeps its first.
        is_better = product > running_best
        running_best = tl.where(is_better, product, running_best)
        running_start = tl.where(is_better, start, running_start)
        survivor_pointers += BLOCK_SURVIVORS * HEAD_DIM
        inverse_norm_pointers += BLOCK_SURVIVORS

    best_of_row = tl.max(running_best, axis=1)
    place = running_start + columns[None, :]
    first = tl.min(tl.where(running_best == best_of_row[:, None], place, 2147483647), axis=1)
    tl.store(best + rows, best_of_row)
    tl.store(index + rows, first)


def launch_options(dtype: torch.dtype, head_dim: int) -> dict[str, int]:
    """
    How the kernel is laid out for keys of this dtype, float32 or 16 bits, and this ``head_dim``.

    Chosen so that, for sm_80, sm_90 and sm_100, nothing spills out of the registers and shared memory stays under the
    99 KiB that a block may have on every GPU since Ampere.
    """
    padded = max(_MIN_HEAD_DIM, triton.next_power_of_2(head_dim))
    if dtype == torch.float32:
        queries, survivors, stages = 64, 64 if padded <= 128 else 32, 2
    else:
        queries, survivors, stages = 128, 64 if padded <= 128 else 32, 3 if padded <= 128 else 2
    return {
        "PADDED_HEAD_DIM": padded,
        "BLOCK_QUERIES": queries,
        "BLOCK_SURVIVORS": survivors,
        "num_warps": 8,
        "num_stages": stages,
    }


def first_best(
    queries: torch.Tensor, survivors: torch.Tensor, inverse_norms: torch.Tensor | None, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run :func:`first_best_kernel`; see there. Returns ``best`` and ``index``."""
    n_heads, n_queries, head_dim = queries.shape
    options = launch_options(queries.dtype, head_dim)
    best = torch.empty(n_heads, n_queries, dtype=torch.float32, device=queries.device)
    index = torch.zeros(n_heads, n_queries, dtype=torch.int32, device=queries.device)
    with torch.cuda.device_of(queries):
        first_best_kernel[(n_queries // options["BLOCK_QUERIES"], n_heads)](
            queries,
            survivors,
            best if inverse_norms is None else inverse_norms,
            counts,
            best,
            index,
            survivors.shape[1],
            n_queries,
            HEAD_DIM=head_dim,
            HAS_INVERSE_NORMS=inverse_norms is not None,
            AS_FLOAT32=isinstance(first_best_kernel, InterpretedFunction),
            **options,
        )
    return best, index


def search(
    scaled: ScaledKeys, flat: torch.Tensor, n_survivors: int, counts: Counts | None, tile_bytes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The best cosine of each evicted position and the first survivor that has it.

    Takes and gives what :func:`kvpress_merging.kernels.tiles.search` does. Copies the keys of one head, or of as many
    as fit ``tile_bytes``, in the order in which the kernel reads them.
    """
    (n_heads, width), (k_len, head_dim) = flat.shape, scaled.keys.shape[1:]
    n_evicted = width - n_survivors
    options = launch_options(scaled.row_dtype, head_dim)
    sizes = np.array(counts or [(n_survivors, n_evicted)] * n_heads, dtype=np.int32)
    survivors, evicted = flat[:, :n_survivors], flat[:, n_survivors:]
    if counts is not None:
        is_real = on_device(np.arange(n_survivors) < sizes[:, :1], flat.device)
        survivors = torch.where(is_real, survivors, survivors[:, :1])
    n_missing, n_missing_queries = -n_survivors % options["BLOCK_SURVIVORS"], -n_evicted % options["BLOCK_QUERIES"]
    if n_missing:
        survivors = torch.cat([survivors, survivors[:, :1].expand(-1, n_missing)], dim=1)
    if n_missing_queries:
        evicted = torch.cat([evicted, evicted[:, :1].expand(-1, n_missing_queries)], dim=1)

    n_real, found = on_device(sizes, flat.device), []
    bytes_per_head = width * head_dim * min(4, scaled.keys.element_size())
    for heads in head_slices([bytes_per_head] * n_heads, tile_bytes, tile_bytes):
        of_block, offset = scaled[heads], heads.start * k_len
        to_search, queries = survivors[heads] - offset, evicted[heads] - offset
        best, index = first_best(
            of_block.rows(queries), of_block.rows(to_search), of_block.inverse_norms(to_search), n_real[heads]
        )
        inverse_norms = of_block.inverse_norms(queries)
        found.append((best if inverse_norms is None else best * inverse_norms, index))
    best, index = found[0] if len(found) == 1 else (torch.cat(parts) for parts in zip(*found))
    return best[:, :n_evicted], index[:, :n_evicted].clamp(max=n_survivors - 1).long()


def check_runs(device: torch.device, head_dim: int) -> None:
    """
    Make sure that the kernel can search keys of this length on this device.

    Raises
    ------
    ValueError
        If it cannot: on a CPU outside Triton's interpreter, or where keys are longer than :data:`MAX_HEAD_DIM`.
    """
    if isinstance(first_best_kernel, InterpretedFunction):
        if device.type != "cpu":
            raise ValueError(f"kernel='triton' in Triton's interpreter needs tensors on the CPU, got {device}")
    elif device.type != "cuda":
        raise ValueError(
            f"kernel='triton' needs a GPU, got tensors on {device}; use kernel='torch' (or set TRITON_INTERPRET=1 "
            "before the first import of triton, to try the kernel on a CPU, slowly)"
        )
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"kernel='triton' takes keys of head_dim up to {MAX_HEAD_DIM}, got {head_dim}")
