# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
Fold each evicted position into the survivor most like it: gates, weights and the weighted mean.

The idea comes from [Token Merging](https://arxiv.org/abs/2210.09461) and [D2O](https://arxiv.org/abs/2406.13035).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch

from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels.nearest import naive_nearest_survivors, nearest_survivors
from kvpress_merging.kernels.rows import (
    DEFAULT_TILE_BYTES,
    add_rows_,
    flat_rows,
    gather_rows,
    head_slices,
    row_norms,
)


@dataclass(frozen=True, eq=False)
class Blend:
    """
    What the cosine blend made of one layer.

    Parameters
    ----------
    keys, values : torch.Tensor
        The survivors after the blend: order, shape, dtype and device of what the press left. The very tensor that the
        press left where nothing can have changed: the keys unless they are blended too, both if nothing was evicted.
    similarity : torch.Tensor
        Cosine of each evicted position with its nearest survivor, float32, shape
        ``(bsz, num_key_value_heads, n_evicted)``; -inf where there is none.
    target : torch.Tensor
        Index into ``eviction.survivors`` of that survivor, int64, same shape; 0 where there is none.
    weight : torch.Tensor
        Weight of each evicted position in the mean, float32, same shape; 0 where it was not merged.
    """

    keys: torch.Tensor
    values: torch.Tensor
    similarity: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor

    @property
    def is_merged(self) -> torch.Tensor:
        """Which evicted positions were merged (chosen by the gates, with a weight above 0), bool."""
        return self.weight > 0


@torch.no_grad()
def cosine_blend(
    keys: torch.Tensor,
    values: torch.Tensor,
    kept_keys: torch.Tensor,
    kept_values: torch.Tensor,
    eviction: Eviction,
    *,
    similarity_threshold: float = 0.0,
    merge_fraction: float = 1.0,
    max_merge_per_token: int = 0,
    value_norm_weighting: bool = True,
    merge_keys: bool = False,
    tile_bytes: int = DEFAULT_TILE_BYTES,
    kernel: str = "auto",
) -> Blend:
    """
    Blend each evicted position into its most cosine-similar survivor.

    With ``s_i`` the cosine of evicted position i with its nearest survivor j(i), those i merge that pass the gates (see
    :func:`select_merges`), with weight ``w_i = max(s_i, 0)``, times ``|v_i| / (|v_i| + |v_j(i)|)`` if
    ``value_norm_weighting``; then ``v'_j = (v_j + sum_i w_i v_i) / (1 + sum_i w_i)`` over the i that go to j. For one
    merge alone, ``|v_i - v'_j| = |v_i - v_j| / (1 + w_i)``.

    Cosines are in float32, norms, weights, sums and means in float64. A survivor that takes nothing keeps its bits.
    Nothing is read back from the device. The same input gives the same bits on every run: what one survivor takes is
    added in the order of positions (as for the search, see :func:`nearest_survivors`). No gradient flows through.

    Parameters
    ----------
    keys, values : torch.Tensor
        The layer before the eviction, shapes ``(bsz, num_key_value_heads, k_len, head_dim)``; the head_dim of values
        may differ from that of keys. Views need not be contiguous.
    kept_keys, kept_values : torch.Tensor
        What the press left, shapes ``(bsz, num_key_value_heads, n_slots, head_dim)``. Not written to.
    eviction : Eviction
        Which positions survived, where they stand in what the press left, and which were evicted.
    similarity_threshold : float
        Least cosine similarity for a merge.
    merge_fraction : float
        Share of the eligible evicted positions of a head that are merged, in (0, 1].
    max_merge_per_token : int
        Most evicted positions that one survivor takes; 0 means no limit.
    value_norm_weighting : bool
        Whether to scale a merge by the evicted value's share of the two norms.
    merge_keys : bool
        Whether to blend keys as well, with the same weights.
    tile_bytes, kernel
        How to search, see :func:`kvpress_merging.kernels.nearest.nearest_survivors`, and what may be wrong with them.

    Returns
    -------
    Blend
        The survivors' keys and values after the blend, and what was merged.
    """
    value_norm = row_norms(values.flatten(0, 1)).view(values.shape[:3])
    similarity, target = nearest_survivors(keys, value_norm < torch.inf, eviction, tile_bytes=tile_bytes, kernel=kernel)
    if eviction.n_evicted == 0 or eviction.n_survivors == 0:
        return Blend(kept_keys, kept_values, similarity, target, torch.zeros_like(similarity))

    is_selected = select_merges(
        similarity,
        target,
        eviction.survivors.shape[-1],
        similarity_threshold=similarity_threshold,
        merge_fraction=merge_fraction,
        max_merge_per_token=max_merge_per_token,
    )
    share: torch.Tensor | float = 1.0
    if value_norm_weighting:
        norm = value_norm.gather(-1, eviction.evicted)
        share = norm / (norm + value_norm.gather(-1, eviction.survivors.gather(-1, target)))
    # No number where both norms are 0, and where one is not finite.
    weight = (similarity.clamp(min=0.0) * share).nan_to_num_(0.0).mul_(is_selected)

    slot = eviction.slots.gather(-1, target)
    return Blend(
        _weighted_means(keys, kept_keys, eviction.evicted, slot, weight.double()) if merge_keys else kept_keys,
        _weighted_means(values, kept_values, eviction.evicted, slot, weight.double()),
        similarity,
        target,
        weight.float(),
    )


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
    The gates: which evicted positions may merge, bool, shape ``(bsz, num_key_value_heads, n_evicted)``.

    Eligible are those with a finite similarity of at least ``similarity_threshold``. Of these the
    ``round(merge_fraction * n_eligible)`` most similar of each head stay (rounded in float64, half to even), and of
    those at most ``max_merge_per_token`` for each survivor, the most similar first. The lowest position wins each tie.
    ``similarity`` and ``target`` are as :func:`nearest_survivors` returns them, which points to ``n_survivors``.
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


def _weighted_means(
    rows: torch.Tensor, kept_rows: torch.Tensor, evicted: torch.Tensor, slot: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """
    ``(r_j + sum w_i r_i) / (1 + sum w_i)`` in the slots j that take something, the rest untouched: new, contiguous.

    In float64, where no sum of finite float32 rows overflows. ``rows`` and ``kept_rows`` are keys or values before the
    eviction and after it; ``evicted``, ``slot`` and ``weight`` say of each evicted position where it stands, the slot
    that it goes to, and ``w_i``, float64, 0 for those that merge nowhere.
    """
    n_slots, head_dim = kept_rows.shape[2:]
    blended = torch.empty_like(kept_rows, memory_format=torch.contiguous_format)
    layer = [part.flatten(0, 1) for part in (rows, kept_rows, evicted, slot, weight, blended)]
    # What is held of a head: its slots as sums and as means, its evicted rows as they are, weighted and in between.
    bytes_per_head = 8 * (2 * n_slots + 3 * evicted.shape[-1]) * head_dim
    for heads in head_slices(len(layer[0]), bytes_per_head, rows.device):
        row, kept, position, to_slot, w, out = (part[heads] for part in layer)
        nowhere = n_slots * len(kept)
        to_row = flat_rows(to_slot, n_slots).masked_fill_(w == 0, nowhere).flatten()
        total = add_rows_(w.new_ones(nowhere + 1, 1), to_row, w.reshape(-1, 1))
        sums = torch.cat([kept.reshape(-1, head_dim), w.new_zeros(1, head_dim)])
        added = gather_rows(row, flat_rows(position, rows.shape[2])) * w[..., None]
        mean = add_rows_(sums, to_row, added.flatten(0, 1)).div_(total)[:nowhere].view(kept.shape)
        takes_some = total[:nowhere].view(*kept.shape[:2], 1) > 1
        torch.where(takes_some, mean.to(kept.dtype), kept, out=out)
    return blended


def naive_cosine_blend(
    keys: torch.Tensor,
    values: torch.Tensor,
    kept_keys: torch.Tensor,
    kept_values: torch.Tensor,
    eviction: Eviction,
    *,
    similarity_threshold: float = 0.0,
    merge_fraction: float = 1.0,
    max_merge_per_token: int = 0,
    value_norm_weighting: bool = True,
    merge_keys: bool = False,
) -> Blend:
    """:func:`cosine_blend` as one would write it down, one evicted position after the other."""
    similarity, target = naive_nearest_survivors(keys, values.float().isfinite().all(dim=-1), eviction)
    weight = torch.zeros_like(similarity)
    keys_after, values_after = kept_keys.clone(), kept_values.clone()
    for b, h, survivors, slots, evicted in eviction.heads():
        s, j = similarity[b, h].tolist(), target[b, h].tolist()

        eligible = [i for i in range(len(evicted)) if isfinite(s[i]) and similarity[b, h, i] >= similarity_threshold]
        eligible.sort(key=s.__getitem__, reverse=True)  # stable: the lowest i first on a tie
        taken: list[list[int]] = [[] for _ in survivors]
        for i in eligible[: round(merge_fraction * len(eligible))]:
            if max_merge_per_token == 0 or len(taken[j[i]]) < max_merge_per_token:
                taken[j[i]].append(i)
                weight[b, h, i] = max(s[i], 0.0)
                if value_norm_weighting:
                    pair = values[b, h, [evicted[i], survivors[j[i]]]].double()
                    evicted_norm, target_norm = pair.norm(dim=-1).tolist()
                    weight[b, h, i] *= evicted_norm / (evicted_norm + target_norm) if evicted_norm > 0 else 0.0

        for rows, after in ((keys, keys_after), (values, values_after)):
            for survivor, slot, members in zip(survivors, slots, taken):
                w = weight[b, h, members]
                if w.sum() > 0:
                    share = w / (1 + w.sum())
                    mean = rows[b, h, survivor] * (1 - share.sum()) + share @ rows[b, h, evicted[members]].float()
                    after[b, h, slot] = mean.to(after.dtype)
    return Blend(keys_after if merge_keys else kept_keys, values_after, similarity, target, weight)
