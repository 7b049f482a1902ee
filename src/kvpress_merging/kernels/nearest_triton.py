# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
The search for the nearest survivor as one Triton kernel: no tile of cosines ever reaches memory.

Each program holds a block of evicted keys and walks all survivors of its head, block by block, as attention walks keys.
It keeps the best cosine and its place for each pair of (evicted position, column of the block) in registers and reduces
over the columns once, at the end. Import this module only where Triton is wanted: it imports Triton.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from kvpress_merging.kernels.products import Side
from kvpress_merging.kernels.rows import on_device

MAX_HEAD_DIM = 256
"""Longest keys that fit a GPU's shared memory as the kernel lays them out."""

MULTIPLES = (64, 128)
"""Survivors and evicted positions come in multiples of these: whole blocks, however the kernel is laid out."""


@triton.jit(do_not_specialize=["n_survivors", "n_queries"])  # type: ignore[untyped-decorator]
def first_best_kernel(  # type: ignore[no-untyped-def]
    queries,
    survivors,
    scales,
    counts,
    best,
    index,
    n_survivors,
    n_queries,
    HEAD_DIM: tl.constexpr,
    N_CHANNELS: tl.constexpr,
    PADDED_HEAD_DIM: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    AS_FLOAT32: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_SURVIVORS: tl.constexpr,
):
    """
    For each query, its largest product with a survivor, times that survivor's scale, and the first to reach it.

    ``queries`` and ``survivors``, float32 or 16 bits, have the shapes ``(n_heads, n_queries, N_CHANNELS)`` and
    ``(n_heads, n_survivors, N_CHANNELS)``, in whole blocks. The first HEAD_DIM channels are multiplied; what stands
    behind them in a survivor, and one further in a query, is its bias, which is added. ``scales``, float32, shape
    ``(n_heads, n_survivors)``, are not read unless HAS_SCALES. ``counts``, int32, shape ``(n_heads, 2)``: survivors and
    queries of each head, up to which program (i, h) searches block i of the queries of head h. Written are ``best`` and
    ``index``, float32 and int32, shape ``(n_heads, n_queries)``. AS_FLOAT32 is for Triton's interpreter, which
    multiplies bfloat16 as if its bits were whole numbers.
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

    query_pointers = queries + rows[:, None] * N_CHANNELS + dims[None, :]
    if HEAD_DIM == PADDED_HEAD_DIM:
        query = tl.load(query_pointers)
    else:
        query = tl.load(query_pointers, mask=is_dim[None, :], other=0.0)
    survivor_pointers = survivors + (head * n_survivors + columns)[None, :] * N_CHANNELS + dims[:, None]
    bias_pointers = survivors + (head * n_survivors + columns) * N_CHANNELS + HEAD_DIM
    scale_pointers = scales + head * n_survivors + columns

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
        if HAS_SCALES:
            product *= tl.load(scale_pointers)[None, :]
        product += tl.load(bias_pointers).to(tl.float32)[None, :]
        # Later survivors win only if they are better: each column keeps its first.
        is_better = product > running_best
        running_best = tl.where(is_better, product, running_best)
        running_start = tl.where(is_better, start, running_start)
        survivor_pointers += BLOCK_SURVIVORS * N_CHANNELS
        bias_pointers += BLOCK_SURVIVORS * N_CHANNELS
        scale_pointers += BLOCK_SURVIVORS

    best_of_row = tl.max(running_best, axis=1)
    place = running_start + columns[None, :]
    first = tl.min(tl.where(running_best == best_of_row[:, None], place, 2147483647), axis=1)
    bias = tl.load(queries + rows * N_CHANNELS + HEAD_DIM + 1).to(tl.float32)
    tl.store(best + rows, best_of_row + bias)
    tl.store(index + rows, first)


def launch_options(dtype: torch.dtype, head_dim: int) -> dict[str, int]:
    """
    How the kernel is laid out for keys of this dtype, float32 or 16 bits, and this ``head_dim``.

    Chosen so that, for sm_80, sm_90 and sm_100, nothing spills out of the registers and shared memory stays under the
    99 KiB that a block may have on every GPU since Ampere.
    """
    padded = max(16, triton.next_power_of_2(head_dim))  # tl.dot takes no less
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


def search(
    survivors: Side, evicted: Side, head_dim: int, counts: Sequence[tuple[int, int]], tile_bytes: int
) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
    """
    The largest product of each evicted position and the first survivor that has it, of all heads at once.

    Takes and yields what the search by PyTorch's own operations does, see ``nearest.py``; there is no tile.
    """
    queries, rows, scales = evicted.rows.contiguous(), survivors.rows.contiguous(), survivors.scale
    (n_heads, n_queries, n_channels), device = queries.shape, queries.device
    options = launch_options(queries.dtype, head_dim)
    best = torch.full((n_heads, n_queries), -torch.inf, dtype=torch.float32, device=device)
    index = torch.zeros(n_heads, n_queries, dtype=torch.int32, device=device)
    n_real = on_device(np.array(counts, dtype=np.int32), device)
    with torch.cuda.device_of(queries):
        first_best_kernel[(n_queries // options["BLOCK_QUERIES"], n_heads)](
            *(queries, rows, best if scales is None else scales.contiguous(), n_real, best, index),
            *(rows.shape[1], n_queries),
            HEAD_DIM=head_dim,
            N_CHANNELS=n_channels,
            HAS_SCALES=scales is not None,
            AS_FLOAT32=isinstance(first_best_kernel, InterpretedFunction),
            **options,
        )
    n_evicted = max(n for _, n in counts)
    yield slice(n_heads), slice(n_evicted), best[:, :n_evicted], index[:, :n_evicted]


def check_runs(device: torch.device, head_dim: int) -> None:
    """Raise a ValueError if the kernel cannot search such keys: on a CPU, unless interpreted, or too long ones."""
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
