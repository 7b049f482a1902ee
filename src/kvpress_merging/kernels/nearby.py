# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""For each evicted position, the nearest of the survivors around it: a search that is linear in the context."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from kvpress_merging.kernels.rows import block_bytes, first_max, flat_rows, gather_rows, on_device

WINDOW = 256
"""Survivors among which an evicted position looks for the nearest: about half of them before it, half behind."""


def block_length(n_survivors: int, n_evicted: int) -> int:
    """Neighbouring evicted positions that share a window: as many as lie within the middle half of it, a power of 2."""
    fitting = max(1, WINDOW // 2 * n_evicted // max(1, n_survivors))
    return min(WINDOW // 2, 1 << (fitting.bit_length() - 1))


def nearest_nearby(
    rows: torch.Tensor,
    survivor_rows: torch.Tensor,
    survivors: torch.Tensor,
    evicted: torch.Tensor,
    counts: Sequence[tuple[int, int]],
    key_metric: torch.Tensor,
    value_metric: torch.Tensor,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    For each evicted position, the survivor with the nearest key and value among those near it in the context.

    Near are :data:`WINDOW` survivors around a block of neighbouring evicted positions, so the cost is linear in the
    context; where there are no more survivors than that, the search is exact. The blocks of all heads are one list, in
    which a head that lost little has few.

    Parameters
    ----------
    rows, survivor_rows : torch.Tensor
        A key and its value side by side, of each position and, zeros, of nowhere; and those of the survivors: float32,
        shapes ``(n_heads, k_len + 1, head_dim + value_dim)`` and ``(n_heads, max_survivors, head_dim + value_dim)``.
    survivors, evicted : torch.Tensor
        Positions, ascending, then ``k_len`` for nowhere, int64, shapes ``(n_heads, max_survivors)`` and
        ``(n_heads, max_evicted)``.
    counts, length
        How many of both each head has, where one without survivors is passed over; and evicted positions of a block,
        see :func:`block_length`.
    key_metric, value_metric : torch.Tensor
        Float32, shapes ``(n_heads, head_dim, head_dim)``, symmetric and positive definite, and ``(n_heads, 1, 1)``, at
        least 0: the squared distance of two positions is ``(k - k')^T key_metric (k - k') + value_metric |v - v'|^2``.

    Returns
    -------
    evicted, target : torch.Tensor
        Evicted positions, some of them nowhere, in ``rows`` of all heads laid end to end, and the survivor nearest to
        each, in ``survivors`` laid end to end: int64, shape ``(n,)``.
    """
    (n_rows, n_channels), max_survivors = rows.shape[1:], survivors.shape[1]
    head_dim, device, nowhere = key_metric.shape[1], rows.device, n_rows - 1
    # The distance of x to y is smallest where x^T M y - y^T M y / 2 is largest.
    keys, values = survivor_rows[..., :head_dim], survivor_rows[..., head_dim:]
    measured = torch.cat([torch.bmm(keys, key_metric), values * value_metric], dim=-1)
    square = (
        (survivor_rows * measured).sum(dim=-1, keepdim=True).masked_fill_((survivors == nowhere)[..., None], torch.inf)
    )

    window, max_evicted = min(WINDOW, max_survivors), evicted.shape[1] + -evicted.shape[1] % length
    evicted = flat_rows(F.pad(evicted, (0, max_evicted - evicted.shape[1]), value=nowhere), n_rows)
    number, middle, first, last = on_device(_blocks(counts, max_survivors, max_evicted, window, length), device)
    blocks = evicted.view(-1, length).index_select(0, number)
    # Heads lie end to end, so what lies before a position in all of them is where it would stand among the survivors.
    place = torch.searchsorted(flat_rows(survivors, n_rows).view(-1), evicted.view(-1).index_select(0, middle))
    start = place.sub_(WINDOW // 2).clamp_(first, last)[:, None]
    near = start + torch.arange(window, device=device)

    found = []
    at_once = max(1, block_bytes(device) // (4 * window * (n_channels + length)))
    for some_near, some_blocks in zip(near.split(at_once), blocks.split(at_once)):
        closeness = torch.baddbmm(
            gather_rows(square, some_near),
            gather_rows(measured, some_near),
            gather_rows(rows, some_blocks).mT,
            beta=-0.5,
        )
        found.append(first_max(closeness)[1])
    return blocks.flatten(), (torch.cat(found) + start).flatten()


def _blocks(
    counts: Sequence[tuple[int, int]], max_survivors: int, max_evicted: int, window: int, length: int
) -> np.ndarray:
    """
    The blocks of neighbouring evicted positions of all heads, int64, shape ``(4, n_blocks)``.

    Of each: its number, if every head has ``max_evicted / length`` blocks; where the middle of what there is of it
    stands among the evicted positions of all heads; and the first and the last place among the survivors of all heads
    at which its window may start.
    """
    n_survivors, n_evicted = np.array(counts, dtype=np.int64).reshape(-1, 2).T
    n_blocks = np.where(n_survivors > 0, -(-n_evicted // length), 0)
    head = np.repeat(np.arange(len(n_blocks)), n_blocks)
    in_head = np.arange(len(head)) - np.repeat(np.cumsum(n_blocks) - n_blocks, n_blocks)
    n_here = np.minimum(n_evicted[head] - in_head * length, length)
    middle = head * max_evicted + in_head * length + n_here // 2
    first = head * max_survivors
    last = first + np.maximum(n_survivors[head] - window, 0)
    return np.stack([head * (max_evicted // length) + in_head, middle, first, last])


def naive_nearest_nearby(
    survivor_keys: torch.Tensor,
    evicted_keys: torch.Tensor,
    survivor_values: torch.Tensor,
    evicted_values: torch.Tensor,
    place: torch.Tensor,
    key_metric: torch.Tensor,
    value_metric: torch.Tensor,
    length: int | None = None,
) -> torch.Tensor:
    """
    :func:`nearest_nearby` for one head, one evicted position after the other.

    ``place`` says how many survivors stand before each evicted position.
    """
    length = length or block_length(len(survivor_keys), len(evicted_keys))
    target = []
    for i, (key, value) in enumerate(zip(evicted_keys, evicted_values)):
        block = place[i - i % length : i - i % length + length]
        start = max(0, min(int(block[len(block) // 2]) - WINDOW // 2, len(survivor_keys) - WINDOW))
        of_keys = survivor_keys[start : start + WINDOW] - key
        of_values = survivor_values[start : start + WINDOW] - value
        distance = ((of_keys @ key_metric) * of_keys).sum(dim=-1) + value_metric * of_values.square().sum(dim=-1)
        target.append(start + int(distance.argmin()))
    return torch.tensor(target)
