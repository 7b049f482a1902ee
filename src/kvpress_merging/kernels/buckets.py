# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
Heads that lost unequally many positions, walked in few steps: blocks that fit a memory budget, buckets of like size.

Everything here is worked out on the host, from an eviction's ``counts``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

SIDE_MULTIPLE = 48
"""
Survivors and evicted positions are multiplied in whole groups of so many.

BLAS rounds the last rows and columns of a product differently where they do not fill the block that its innermost loop
works on: 16 rows of MKL's for AVX-512, but 24 by 6 of its for AVX2, which a CPU without AVX-512 gets, and blocks of two
of these. Whole groups along both sides, and of 8 along head_dim (see ``products.py``), give each pair of keys the same
cosine wherever it stands in the tile and whatever the tile: equal keys then tie exactly, and no copy of a key that
fills a group up beats the key itself.
"""

# Share of the products that padding may add.
_MAX_PADDING = 0.25
# Heads are sorted into at most so many groups before buckets are cut between them.
_MAX_GROUPS = 64

Counts = Sequence[tuple[int, int]]
"""Survivors and evicted positions of each head."""


def whole_groups(n: int) -> int:
    """The next multiple of :data:`SIDE_MULTIPLE`."""
    return -(-n // SIDE_MULTIPLE) * SIDE_MULTIPLE


@dataclass(frozen=True)
class Bucket:
    """
    Heads that are searched together, padded to the largest of them.

    Parameters
    ----------
    heads : numpy.ndarray
        Which heads, int64.
    n_survivors, n_evicted : int
        Survivors and evicted positions of each, padding included: whole groups.
    """

    heads: np.ndarray
    n_survivors: int
    n_evicted: int


def find_buckets(counts: Counts, cost_of: Callable[[Any, Any], Any] = np.multiply) -> list[Bucket]:
    """
    The fewest buckets whose padding adds at most a quarter to what the heads need.

    What a head needs is ``cost_of`` its survivors and its evicted positions: their product, or ``np.add``, their sum.

    Heads are sorted by their survivors and cut into runs; the best cuts for each number of buckets are found by dynamic
    programming. Heads that lost or kept nothing are left out.
    """
    sizes = np.array([(whole_groups(n), whole_groups(m)) for n, m in counts], dtype=np.int64).reshape(-1, 2)
    heads = np.flatnonzero(sizes.all(axis=1))
    if len(heads) == 0:
        return []
    needed = cost_of(*sizes[heads].T).sum()
    largest = sizes[heads].max(axis=0)
    if len(heads) * cost_of(*largest) <= (1 + _MAX_PADDING) * needed:
        return [Bucket(heads, int(largest[0]), int(largest[1]))]
    heads = heads[np.argsort(sizes[heads, 0], kind="stable")]
    groups = np.array_split(heads, min(len(heads), _MAX_GROUPS))

    # Products of a bucket of the groups i to j.
    n = len(groups)
    max_sizes = np.array([sizes[group].max(axis=0) for group in groups])
    n_heads = np.cumsum([0, *map(len, groups)])
    max_evicted = np.maximum.accumulate(np.triu(np.broadcast_to(max_sizes[:, 1], (n, n))), axis=1)
    cost = (n_heads[None, 1:] - n_heads[:-1, None]) * cost_of(max_sizes[None, :, 0], max_evicted)
    cost = np.where(np.tri(n, k=-1, dtype=bool), np.iinfo(np.int64).max // 4, cost)

    best = cost[0]  # of the groups up to each, in one bucket
    last_starts: list[np.ndarray] = []
    while best[-1] > (1 + _MAX_PADDING) * needed and len(last_starts) < n - 1:
        # One bucket more: the last one from group i on.
        with_last = np.concatenate([[np.iinfo(np.int64).max // 4], best[:-1]])[:, None] + cost
        last_starts.append(with_last.argmin(axis=0))
        best = with_last.min(axis=0)
    bounds = [n]
    for starts in reversed(last_starts):
        bounds.append(int(starts[bounds[-1] - 1]))
    bounds.append(0)
    return [
        Bucket(np.concatenate(groups[start:stop]), int(max_sizes[stop - 1, 0]), int(max_evicted[start, stop - 1]))
        for stop, start in pairwise(bounds)
    ]


def head_slices(bytes_of_heads: Sequence[int], max_bytes: int, block_bytes: int) -> Iterator[slice]:
    """
    Cut the heads of a layer into runs to be worked on together.

    Parameters
    ----------
    bytes_of_heads : sequence of int
        Bytes that each head takes.
    max_bytes : int
        All heads are one run where they take no more.
    block_bytes : int
        Most bytes of a run where they do; a run has at least one head.
    """
    if sum(bytes_of_heads) <= max_bytes:
        yield slice(0, len(bytes_of_heads))
        return
    start, taken = 0, 0
    for head, n_bytes in enumerate(bytes_of_heads):
        if head > start and taken + n_bytes > block_bytes:
            yield slice(start, head)
            start, taken = head, 0
        taken += n_bytes
    yield slice(start, len(bytes_of_heads))


def pack(counts: Counts, buckets: Sequence[Bucket], width: int, first_evicted: int) -> np.ndarray:
    """
    What each bucket holds, as indices into a table of all heads' survivors and evicted positions.

    A bucket's survivors come first, head by head, then its evicted positions. Padding repeats a head's first survivor
    and its first evicted position.

    Parameters
    ----------
    counts, buckets
        Of the same heads.
    width : int
        Columns of the table, of which each head has a row.
    first_evicted : int
        Column in which evicted positions begin.
    """
    parts = []
    for bucket in buckets:
        table = bucket_table(counts, bucket, width, first_evicted)
        parts += [table[:, : bucket.n_survivors].ravel(), table[:, bucket.n_survivors :].ravel()]
    return np.concatenate(parts)


def bucket_table(counts: Counts, bucket: Bucket, width: int, first_evicted: int) -> np.ndarray:
    """What one bucket holds, see :func:`pack`: a row for each head, its survivors and then its evicted positions."""
    sides = []
    for side, n_padded, first_column in ((0, bucket.n_survivors, 0), (1, bucket.n_evicted, first_evicted)):
        n_real = np.array([counts[head][side] for head in bucket.heads])[:, None]
        column = np.arange(n_padded)
        sides.append(bucket.heads[:, None] * width + first_column + np.where(column < n_real, column, 0))
    return np.concatenate(sides, axis=1)


def unpack(buckets: Sequence[Bucket], n_heads: int, n_evicted: int) -> np.ndarray:
    """
    Where the answers of buckets, laid end to end, go in a table of ``n_heads`` rows and ``n_evicted`` columns.

    The inverse of :func:`pack`: for each place of the table, where its answer stands; 0 for padding.
    """
    places, first = np.zeros((n_heads, n_evicted), dtype=np.int64), 0
    for bucket in buckets:
        n = min(n_evicted, bucket.n_evicted)
        for head in bucket.heads:
            places[head, :n] = np.arange(first, first + n)
            first += bucket.n_evicted
    return places


def is_padding(counts: Counts, n_survivors: int, n_evicted: int) -> np.ndarray:
    """Which places of a table of survivors and evicted positions hold nothing, bool."""
    n_real = np.array(counts).reshape(-1, 2)
    of_survivors = np.arange(n_survivors) >= n_real[:, :1]
    return np.concatenate([of_survivors, np.arange(n_evicted) >= n_real[:, 1:]], axis=1)


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on a device, without waiting for it: from page-locked memory, since a copy from any other waits."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
