# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""For each evicted position, the nearest of the survivors around it: a search that is linear in the context."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kvpress_merging.kernels.nearest import first_max
from kvpress_merging.kernels.rows import block_bytes, gather_rows

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
    n_heads, n_survivors, _ = survivor_keys.shape
    n_evicted = evicted_keys.shape[1]
    # The distance of x to y is least where x^T M y - y^T M y / 2 is most.
    measured_keys, measured_values = torch.bmm(survivor_keys, key_metric), survivor_values * value_metric
    minus_half_square = (survivor_keys * measured_keys).sum(dim=-1, keepdim=True)
    minus_half_square.add_((survivor_values * measured_values).sum(dim=-1, keepdim=True)).div_(-2)
    measured = torch.cat([measured_keys, measured_values], dim=-1)
    del measured_keys, measured_values
    evicted = torch.cat([evicted_keys, evicted_values], dim=-1)
    n_channels = evicted.shape[-1]
    if n_survivors <= WINDOW:
        products = torch.baddbmm(minus_half_square, measured, evicted.transpose(1, 2))
        return first_max(products, n_survivors)[1].squeeze(1)

    length = block_length(n_survivors, n_evicted)
    n_missing = -n_evicted % length
    if n_missing:
        evicted, place = F.pad(evicted, (0, 0, 0, n_missing)), F.pad(place, (0, n_missing))
    blocks, first = evicted.unflatten(1, (-1, length)), place.unflatten(1, (-1, length))
    # Centred on the block's middle; the last block's on the middle of what there is of it.
    middle = first[:, :, length // 2].clone()
    middle[:, -1] = first[:, -1, (length - n_missing) // 2]
    start = (middle - WINDOW // 2).clamp_(0, n_survivors - WINDOW)
    n_blocks = blocks.shape[1]
    target = torch.empty((n_heads, n_blocks, length), dtype=torch.int64, device=place.device)
    near = torch.arange(WINDOW, device=place.device)
    at_once = max(1, block_bytes(place.device) // (4 * n_heads * WINDOW * (n_channels + length)))
    for i in range(0, n_blocks, at_once):
        block = slice(i, i + at_once)
        window = (start[:, block, None] + near).flatten(1)
        products = torch.baddbmm(
            gather_rows(minus_half_square, window).view(-1, WINDOW, 1),
            gather_rows(measured, window).view(-1, WINDOW, n_channels),
            blocks[:, block].reshape(-1, length, n_channels).transpose(1, 2),
        )
        best = first_max(products, WINDOW)[1].view(n_heads, -1, length)
        target[:, block] = best + start[:, block, None]
    return target.flatten(1)[:, :n_evicted]


def naive_nearest_nearby(
    survivor_keys: torch.Tensor,
    evicted_keys: torch.Tensor,
    survivor_values: torch.Tensor,
    evicted_values: torch.Tensor,
    place: torch.Tensor,
    key_metric: torch.Tensor,
    value_metric: torch.Tensor,
) -> torch.Tensor:
    """:func:`nearest_nearby` for one head, one evicted position after the other."""
    length = block_length(len(survivor_keys), len(evicted_keys))
    target = []
    for i, (key, value) in enumerate(zip(evicted_keys, evicted_values)):
        block = place[i - i % length : i - i % length + length]
        start = max(0, min(int(block[len(block) // 2]) - WINDOW // 2, len(survivor_keys) - WINDOW))
        of_keys = survivor_keys[start : start + WINDOW] - key
        of_values = survivor_values[start : start + WINDOW] - value
        distance = ((of_keys @ key_metric) * of_keys).sum(dim=-1) + value_metric * of_values.square().sum(dim=-1)
        target.append(start + int(distance.argmin()))
    return torch.tensor(target)
