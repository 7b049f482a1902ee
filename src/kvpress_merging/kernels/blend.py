# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
Fold each evicted position into the survivor most like it: gates, weights and the weighted mean.

The idea comes from [Token Merging](https://arxiv.org/abs/2210.09461) and [D2O](https://arxiv.org/abs/2406.13035).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch
import torch.nn.functional as F

from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels.buckets import head_slices, is_padding, on_device
from kvpress_merging.kernels.gates import select_merges
from kvpress_merging.kernels.nearest import Found, find_nearest, naive_nearest_survivors
from kvpress_merging.kernels.rows import (
    DEFAULT_TILE_BYTES,
    add_rows_,
    adds_in_order,
    block_bytes,
    first_rows,
    head_blocks,
    row_norms,
    scalar,
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
    weight : torch.Tensor
        Weight of each evicted position in the mean, float32, shape ``(bsz, num_key_value_heads, n_evicted)``; 0 where
        it was not merged.
    found : Found
        The survivor that is nearest to each.
    """

    keys: torch.Tensor
    values: torch.Tensor
    weight: torch.Tensor
    found: Found

    @property
    def similarity(self) -> torch.Tensor:
        """Cosine of each evicted position with its nearest survivor, float32; -inf where there is none."""
        return self.found.similarity

    @property
    def target(self) -> torch.Tensor:
        """Index into ``eviction.survivors`` of that survivor, int64; of no meaning where there is none."""
        return self.found.target

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

    All arithmetic is in float32. A survivor that takes nothing keeps its bits. Nothing is read back from the device.
    The same input gives the same bits on every run: what one survivor takes is added in the order of positions (as for
    the search, see :func:`nearest_survivors`). No gradient flows through.

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
    tile_bytes : int
        Most bytes that one tile of cosines takes.
    kernel : str
        How to search: one of :data:`kvpress_merging.kernels.nearest.KERNELS`.

    Returns
    -------
    Blend
        The survivors' keys and values after the blend, and what was merged.

    Raises
    ------
    ValueError
        If ``tile_bytes`` is below 1, or ``kernel`` is unknown or cannot run on these tensors.
    """
    found = find_nearest(keys, row_norms(values), eviction, tile_bytes=tile_bytes, kernel=kernel)
    if eviction.n_evicted == 0 or eviction.n_survivors == 0:
        return Blend(kept_keys, kept_values, torch.zeros_like(found.cosine), found)

    cosine = found.cosine
    if merge_fraction < 1.0 or max_merge_per_token > 0:
        is_selected = select_merges(
            found.similarity,
            found.target,
            eviction.survivors.shape[-1],
            similarity_threshold=similarity_threshold,
            merge_fraction=merge_fraction,
            max_merge_per_token=max_merge_per_token,
        )
        cosine = torch.where(is_selected, cosine, 0.0)
    elif similarity_threshold > 0:
        cosine = F.threshold(cosine, _before(similarity_threshold), 0.0)
    # Not a number where both norms are 0, and where a key or value is not finite: fmax makes a 0 of it.
    one, nothing = (scalar(number, torch.float64, keys.device) for number in (1.0, 0.0))
    if value_norm_weighting:
        share = found.norm / found.norm_sum
    else:
        share = torch.where(found.norm_sum < torch.inf, one, nothing)
    weight = torch.fmax(share.mul_(cosine), nothing)

    slot = eviction.slots.gather(-1, found.target)
    return Blend(
        _weighted_means(keys, kept_keys, eviction, weight, slot, found.flat) if merge_keys else kept_keys,
        _weighted_means(values, kept_values, eviction, weight, slot, found.flat),
        weight.float(),
        found,
    )


def _before(threshold: float) -> float:
    """The largest float32 below a threshold, so that what is more than it is at least the threshold."""
    return float(np.nextafter(np.float32(threshold), np.float32(-1)))


def _weighted_means(
    rows: torch.Tensor,
    kept_rows: torch.Tensor,
    eviction: Eviction,
    weight: torch.Tensor,
    slot: torch.Tensor,
    flat: torch.Tensor,
) -> torch.Tensor:
    """
    ``(r_j + sum w_i r_i) / (1 + sum w_i)`` in the slots j that take something, the rest untouched.

    In float64, where no sum of finite float32 rows overflows.

    Parameters
    ----------
    rows : torch.Tensor
        Keys or values before the eviction, shape ``(bsz, num_key_value_heads, k_len, head_dim)``.
    kept_rows : torch.Tensor
        The same after it, shape ``(bsz, num_key_value_heads, n_slots, head_dim)``.
    eviction : Eviction
        Which positions survived and which were evicted.
    weight : torch.Tensor
        ``w_i``, float64, shape ``(bsz, num_key_value_heads, n_evicted)``; those that merge nowhere have 0.
    slot : torch.Tensor
        The slot that each goes to, int64, same shape.
    flat : torch.Tensor
        Where survivors and evicted positions stand in ``rows``, see :class:`kvpress_merging.kernels.nearest.Found`.

    Returns
    -------
    torch.Tensor
        New contiguous tensor like ``kept_rows``.
    """
    (n_heads, width), n_evicted, device = flat.shape, weight.shape[-1], rows.device
    k_len, (n_slots, head_dim) = rows.shape[2], kept_rows.shape[2:]
    rows, kept = rows.flatten(0, 1), kept_rows.flatten(0, 1)
    weight, slot = weight.view(n_heads, n_evicted), slot.view(n_heads, n_evicted)
    total = _one_and_sums(weight, slot, n_slots)
    flat_slot = slot + first_rows(n_heads, n_slots, device)

    bytes_per_head = 8 * (n_slots + 2 * n_evicted) * max(1, head_dim)
    slices = list(head_slices([bytes_per_head] * n_heads, block_bytes(device), block_bytes(device)))
    blended = torch.empty_like(kept_rows, memory_format=torch.contiguous_format) if len(slices) > 1 else None
    for heads in slices:
        from_row, to_row, weight_of_row = flat[heads, width - n_evicted :], flat_slot[heads], weight[heads]
        if eviction.counts is not None:
            is_real = ~is_padding(eviction.counts[heads], width - n_evicted, n_evicted)
            is_real[:, : width - n_evicted] = False
            in_table, in_lists = (
                on_device(np.flatnonzero(part), device) for part in (is_real, is_real[:, width - n_evicted :])
            )
            from_row = flat[heads].view(-1).index_select(0, in_table)
            to_row, weight_of_row = (part.view(-1).index_select(0, in_lists) for part in (to_row, weight_of_row))
        if heads.start:
            from_row, to_row = from_row - heads.start * k_len, to_row - heads.start * n_slots
        added = rows[heads].reshape(-1, head_dim)[from_row] * weight_of_row[..., None]
        sums = kept[heads].to(torch.float64, memory_format=torch.contiguous_format, copy=True)
        add_rows_(sums.view(-1, head_dim), to_row.view(-1), added.view(-1, head_dim))
        mean = sums.div_(total[heads, :, None]).to(kept.dtype)
        # The rest keep their bits; where no position of a head is finite, the sums are not either.
        takes_some = total[heads, :, None] > 1
        if blended is None:
            return torch.where(takes_some.view(*kept_rows.shape[:3], 1), mean.view(kept_rows.shape), kept_rows)
        torch.where(takes_some, mean, kept[heads], out=blended.flatten(0, 1)[heads])
    assert blended is not None
    return blended


def _one_and_sums(weight: torch.Tensor, slot: torch.Tensor, n_slots: int) -> torch.Tensor:
    """``1 + sum w_i`` over the i that go to each slot, float64, shape ``(n_heads, n_slots)``."""
    n_heads, device = len(weight), weight.device
    one = scalar(1.0, torch.float64, device).expand(n_heads, n_slots)
    if adds_in_order(device):
        return one.scatter_add(1, slot, weight)
    sums = one.clone(memory_format=torch.contiguous_format)
    to_row = slot + first_rows(n_heads, n_slots, device)
    add_rows_(sums.view(-1, 1), to_row.view(-1), weight.reshape(-1, 1))
    return sums


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
    for b, heads, n_survivors, n_evicted in head_blocks(eviction, heads_per_block=1):
        h = heads.start
        survivors, evicted, slots = eviction.survivors[b, h], eviction.evicted[b, h], eviction.slots[b, h]
        s, j = similarity[b, h].tolist(), target[b, h].tolist()

        eligible = [i for i in range(n_evicted) if isfinite(s[i]) and similarity[b, h, i] >= similarity_threshold]
        eligible.sort(key=s.__getitem__, reverse=True)  # stable: the lowest i first on a tie
        taken: list[list[int]] = [[] for _ in range(n_survivors)]
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
    found = Found(similarity, target, torch.zeros_like(weight), torch.zeros_like(weight), target)
    return Blend(keys_after if merge_keys else kept_keys, values_after, weight, found)
