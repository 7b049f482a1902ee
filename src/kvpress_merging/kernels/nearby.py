# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""For each evicted position, the nearest of the survivors around it: a search that is linear in the context."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from kvpress_merging.kernels.buckets import on_device
from kvpress_merging.kernels.rows import DEFAULT_TILE_BYTES, block_bytes, first_rows
from kvpress_merging.kernels.tiles import first_max

WINDOW = 256
"""Survivors among which an evicted position looks for the nearest: about half of them before it, half behind."""


def block_length(n_survivors: int, n_evicted: int) -> int:
    """Neighbouring evicted positions that share a window: as many as lie within the middle half of it, a power of 2."""
    fitting = max(1, WINDOW // 2 * n_evicted // max(1, n_survivors))
    return min(WINDOW // 2, 1 << (fitting.bit_length() - 1))


def nearest_nearby(
    survivor_keys: torch.Tensor,
    evicted_keys: torch.Tensor,
    survivor_values: torch.Tensor,
    evicted_values: torch.Tensor,
    place: torch.Tensor,
    key_metric: torch.Tensor,
    value_metric: torch.Tensor,
) -> torch.Tensor:
    """
    For each evicted position, the survivor with the nearest key and value among those near it in the context.

    Near are :data:`WINDOW` survivors around a block of neighbouring evicted positions, so the cost is linear in the
    context; where there are no more survivors than that, the search is exact.

    Parameters
    ----------
    survivor_keys, evicted_keys : torch.Tensor
        float32, shapes ``(n_heads, n_survivors, head_dim)`` and ``(n_heads, n_evicted, head_dim)``, each in the order
        of the context.
    survivor_values, evicted_values : torch.Tensor
        The same of values; their head_dim may be another.
    place : torch.Tensor
        How many survivors stand before each evicted position, int64, shape ``(n_heads, n_evicted)``.
    key_metric : torch.Tensor
        Symmetric and positive definite, float32, shape ``(n_heads, head_dim, head_dim)``.
    value_metric : torch.Tensor
        At least 0, float32, shape ``(n_heads, 1, 1)``: the squared distance of two positions is
        ``(k - k')^T key_metric (k - k') + value_metric |v - v'|^2``.

    Returns
    -------
    torch.Tensor
        Index of a survivor, int64, shape ``(n_heads, n_evicted)``.
    """
    found = nearest_rows(
        torch.cat([survivor_keys, survivor_values], dim=-1),
        torch.cat([evicted_keys, evicted_values], dim=-1),
        place,
        key_metric,
        value_metric,
    )
    return found - first_rows(*survivor_keys.shape[:2], place.device)


def nearest_rows(
    survivors: torch.Tensor,
    evicted: torch.Tensor,
    place: torch.Tensor,
    key_metric: torch.Tensor,
    value_metric: torch.Tensor,
    counts: np.ndarray | None = None,
    length: int | None = None,
    *,
    counts_evicted: bool = False,
) -> torch.Tensor:
    """
    :func:`nearest_nearby`, with each position's key and value side by side in one row.

    Where heads are padded, ``counts``, shape ``(n_heads, 2)``, says how many of their survivors and evicted positions
    are real, and ``length`` how many evicted positions share a window. With ``counts_evicted``, ``place`` says how many
    positions stand before each evicted one, evicted or not. The index that comes out is one into the survivors of all
    heads laid end to end.
    """
    (n_heads, n_survivors, n_channels), n_evicted, device = survivors.shape, evicted.shape[1], place.device
    # The distance of x to y is smallest where x^T M y - y^T M y / 2 is largest.
    head_dim = key_metric.shape[1]
    measured = torch.cat(
        [torch.bmm(survivors[..., :head_dim], key_metric), survivors[..., head_dim:] * value_metric], dim=-1
    )
    square = (survivors * measured).sum(dim=-1, keepdim=True)
    if counts is not None:
        is_nothing = on_device(np.arange(n_survivors) >= counts[:, :1], device)
        square.masked_fill_(is_nothing[..., None], torch.inf)
    if n_survivors <= WINDOW:
        products = torch.baddbmm(square, measured, evicted.transpose(1, 2), beta=-0.5)
        return first_max(products, n_survivors)[1].squeeze(1) + first_rows(n_heads, n_survivors, device)

    length = length or block_length(n_survivors, n_evicted)
    n_blocks, n_missing = -(-n_evicted // length), -n_evicted % length
    # Centred on the block's middle; the last block's on the middle of what there is of it.
    sizes = np.array([[n_survivors, n_evicted]]) if counts is None else counts
    first = np.arange(n_blocks) * length
    middle = np.minimum(first + np.clip(sizes[:, 1:] - first, 0, length) // 2, n_evicted - 1)
    head_start = np.arange(n_heads)[:, None] * n_survivors
    before_window = WINDOW // 2 - head_start + (middle if counts_evicted else 0)
    last_start = head_start + np.maximum(sizes[:, :1] - WINDOW, 0)
    start = place.gather(1, on_device(middle, device).expand(n_heads, -1)).sub_(on_device(before_window, device))
    start.clamp_(first_rows(n_heads, n_survivors, device), on_device(last_start, device))
    evicted = F.pad(evicted, (0, 0, 0, n_missing)) if n_missing else evicted.contiguous()
    blocks = evicted.unflatten(1, (n_blocks, length))
    near = first_rows(WINDOW, 1, device).view(-1)
    bytes_per_block, max_bytes = 4 * WINDOW * (n_channels + length), block_bytes(device)
    if n_blocks * bytes_per_block <= max_bytes // 8:  # many short contexts are searched in one go
        max_bytes = DEFAULT_TILE_BYTES
    at_once = max(1, max_bytes // (n_heads * bytes_per_block))
    target = []
    for i in range(0, n_blocks, at_once):
        block = slice(i, i + at_once)
        window = (start[:, block, None] + near).view(-1)
        products = torch.baddbmm(
            square.view(-1, 1).index_select(0, window).view(-1, WINDOW, 1),
            measured.view(-1, n_channels).index_select(0, window).view(-1, WINDOW, n_channels),
            blocks[:, block].reshape(-1, length, n_channels).transpose(1, 2),
            beta=-0.5,
        )
        target.append(first_max(products, WINDOW)[1].view(n_heads, -1, length) + start[:, block, None])
    found = target[0] if len(target) == 1 else torch.cat(target, dim=1)
    return found.flatten(1)[:, :n_evicted]


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
    """:func:`nearest_nearby` for one head, one evicted position after the other."""
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
