# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""For each evicted position, the nearest key among the survivors around it: a search that is linear in the context."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kvpress_merging.kernels.nearest import block_bytes, first_max, gather_rows

WINDOW = 256
"""Survivors among which an evicted position looks for the nearest: about half of them before it, half behind."""

# Neighbouring evicted positions that share one window: few, so that it lies around each of them.
_BLOCK = 16


def nearest_nearby(survivor_keys: torch.Tensor, evicted_keys: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """
    For each evicted position, the survivor with the nearest key among those near it in the context.

    Near are :data:`WINDOW` survivors around a block of neighbouring evicted positions, so the cost is linear in the
    context; where there are no more survivors than that, the search is exact.

    Parameters
    ----------
    survivor_keys, evicted_keys : torch.Tensor
        float32, shapes ``(n_heads, n_survivors, head_dim)`` and ``(n_heads, n_evicted, head_dim)``, each in the order
        of the context. Distances between them are Euclidean.
    place : torch.Tensor
        How many survivors stand before each evicted position, int64, shape ``(n_heads, n_evicted)``.

    Returns
    -------
    torch.Tensor
        Index of a survivor, int64, shape ``(n_heads, n_evicted)``.
    """
    n_heads, n_survivors, _ = survivor_keys.shape
    n_evicted = evicted_keys.shape[1]
    # |x - y|^2 / 2 is least where x y - |y|^2 / 2 is most: one more column makes a product of it. Evenly scaled, or the
    # halves of large squares would take the small ones' digits.
    half_square = survivor_keys.square().sum(dim=-1, keepdim=True) / 2
    scale = half_square.amax(dim=1, keepdim=True).sqrt().clamp_(min=torch.finfo(torch.float32).tiny)
    survivor_keys = torch.cat([survivor_keys, -half_square / scale], dim=-1)
    evicted_keys = torch.cat([evicted_keys, scale.expand(-1, n_evicted, 1)], dim=-1)
    if n_survivors <= WINDOW:
        return first_max(torch.bmm(survivor_keys, evicted_keys.transpose(1, 2)), n_survivors)[1].squeeze(1)

    head_dim = survivor_keys.shape[-1]
    n_missing = -n_evicted % _BLOCK
    blocks = F.pad(evicted_keys, (0, 0, 0, n_missing)).view(n_heads, -1, _BLOCK, head_dim)
    first = F.pad(place, (0, n_missing)).view(n_heads, -1, _BLOCK)
    # Centred on the block's middle; the last block's on the middle of what there is of it.
    last_middle = (_BLOCK - n_missing) // 2
    middle = torch.cat([first[:, :-1, _BLOCK // 2], first[:, -1:, last_middle]], dim=1)
    start = (middle - WINDOW // 2).clamp_(0, n_survivors - WINDOW)
    n_blocks = blocks.shape[1]
    target = torch.empty((n_heads, n_blocks, _BLOCK), dtype=torch.int64, device=place.device)
    near = torch.arange(WINDOW, device=place.device)
    at_once = max(1, block_bytes(place.device) // (4 * n_heads * WINDOW * (head_dim + _BLOCK)))
    for i in range(0, n_blocks, at_once):
        block = slice(i, i + at_once)
        window = start[:, block, None] + near
        candidates = gather_rows(survivor_keys, window.flatten(1)).view(-1, WINDOW, head_dim)
        cosine = torch.bmm(candidates, blocks[:, block].reshape(-1, _BLOCK, head_dim).transpose(1, 2))
        best = first_max(cosine, WINDOW)[1].view(n_heads, -1, _BLOCK)
        target[:, block] = best + start[:, block, None]
    return target.flatten(1)[:, :n_evicted]


def naive_nearest_nearby(survivor_keys: torch.Tensor, evicted_keys: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """:func:`nearest_nearby` for one head, one evicted position after the other."""
    target = []
    for i, key in enumerate(evicted_keys):
        block = place[i - i % _BLOCK : i - i % _BLOCK + _BLOCK]
        start = max(0, min(int(block[len(block) // 2]) - WINDOW // 2, len(survivor_keys) - WINDOW))
        distance = (survivor_keys[start : start + WINDOW] - key).norm(dim=-1)
        target.append(start + int(distance.argmin()))
    return torch.tensor(target)
