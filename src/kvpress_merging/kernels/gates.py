# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""The gates of the blend: which evicted positions may merge."""

from __future__ import annotations

import torch


def select_merges(
    similarity: torch.Tensor,
    target: torch.Tensor,
    n_survivors: int,
    *,
    similarity_threshold: float,
    merge_fraction: float,
    max_merge_per_token: int,
) -> torch.Tensor:
    """
    The gates: which evicted positions may merge.

    Eligible are those with a finite similarity of at least ``similarity_threshold``. Of these the
    ``round(merge_fraction * n_eligible)`` most similar of each head stay (rounded in float64, half to even), and of
    those at most ``max_merge_per_token`` for each survivor, the most similar first. The lowest position wins each tie.

    Parameters
    ----------
    similarity, target : torch.Tensor
        As :func:`nearest_survivors` returns them, positions ascending along the last axis.
    n_survivors : int
        Length of the survivors axis that ``target`` points into.
    similarity_threshold, merge_fraction, max_merge_per_token
        See :func:`cosine_blend`.

    Returns
    -------
    torch.Tensor
        bool, shape ``(bsz, num_key_value_heads, n_evicted)``.
    """
    is_selected = similarity >= similarity_threshold  # never -inf
    if merge_fraction == 1.0 and max_merge_per_token == 0:
        return is_selected

    # Adding 0 turns -0 into 0: some devices would sort the two apart.
    sortable = similarity.masked_fill(~is_selected, -torch.inf).add_(0.0)
    order = sortable.sort(dim=-1, descending=True, stable=True).indices
    place = torch.arange(order.shape[-1], device=order.device)
    if merge_fraction < 1.0:
        n_selected = (is_selected.sum(dim=-1, keepdim=True).double() * merge_fraction).round()
        is_selected = torch.zeros_like(is_selected).scatter_(-1, order, place < n_selected)
    if max_merge_per_token > 0:
        # Bring together those that go to the same survivor, the most similar first, and count from each group's start.
        group = torch.where(is_selected, target, n_survivors).gather(-1, order)
        group, by_group = group.sort(dim=-1, stable=True)
        is_start = torch.ones_like(is_selected)
        is_start[..., 1:] = group[..., 1:] != group[..., :-1]
        start = torch.where(is_start, place, 0).cummax(dim=-1).values
        is_within = (place - start < max_merge_per_token) & (group < n_survivors)
        is_selected = torch.zeros_like(is_selected).scatter_(-1, order.gather(-1, by_group), is_within)
    return is_selected
