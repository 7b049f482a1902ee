# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Matching of heads that kept and lost unequally many positions, in few steps: padded to buckets of like size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt

import numpy as np
import torch

from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels.buckets import Counts, bucket_table, find_buckets, is_padding, on_device
from kvpress_merging.kernels.match_heads import match_heads, spoil_, take_fits
from kvpress_merging.kernels.nearby import block_length
from kvpress_merging.kernels.rows import DEFAULT_TILE_BYTES, first_rows


def match_ragged(
    layer: Sequence[torch.Tensor],
    eviction: Eviction,
    counts: Counts,
    *,
    key_ridge: float,
    max_error: float,
) -> tuple[torch.Tensor, ...]:
    """
    Match heads that kept and lost unequally many positions, in buckets of like size.

    Parameters
    ----------
    layer : sequence of torch.Tensor
        The tensors that :func:`kvpress_merging.kernels.match.attention_match` takes, without a batch axis.
    eviction, counts
        Which positions survived and which were evicted, and how many of each head.
    key_ridge, max_error
        See :func:`match_block`.

    Returns
    -------
    tuple of torch.Tensor
        The fields of :class:`kvpress_merging.kernels.match.Match`, without a batch axis.
    """
    keys, values, kept_keys, kept_values, queries, kept_queries = layer
    (n_heads, k_len, head_dim), n_slots = keys.shape, kept_values.shape[1]
    n_survivors, n_evicted, device = eviction.survivors.shape[-1], eviction.evicted.shape[-1], keys.device
    width, length = n_survivors + n_evicted, block_length(eviction.n_survivors, eviction.n_evicted)
    flat = (eviction.positions.flatten(0, 1) + first_rows(n_heads, k_len, device)).view(-1)
    slot_table = (eviction.slots.flatten(0, 1) + first_rows(n_heads, n_slots, device)).view(-1)
    evicted = eviction.evicted.flatten(0, 1)
    if all(n + m == k_len for n, m in counts):
        places = evicted - first_rows(n_evicted, 1, device).view(-1)
    else:
        is_nothing = on_device(is_padding(counts, n_survivors, 0), device)
        survivors = eviction.survivors.flatten(0, 1).masked_fill(is_nothing, k_len)
        places = torch.searchsorted(survivors, evicted.contiguous())
    tables = [part.reshape(-1, part.shape[-1]) for part in (keys, values)]

    found, new_rows, new_slots = [], [], []
    bytes_per_row = 4 * max(1, head_dim, queries.shape[1])
    buckets = []
    for bucket in find_buckets(counts, np.add):
        bytes_of_bucket = len(bucket.heads) * (bucket.n_survivors + bucket.n_evicted) * bytes_per_row
        n_parts = min(len(bucket.heads), 1 + bytes_of_bucket // DEFAULT_TILE_BYTES)
        buckets += [replace(bucket, heads=heads) for heads in np.array_split(bucket.heads, n_parts)]
    for bucket in buckets:
        of_heads = np.array([counts[head] for head in bucket.heads])
        table = bucket_table(counts, bucket, width, n_survivors)
        is_real = ~is_padding(of_heads.tolist(), bucket.n_survivors, bucket.n_evicted)
        in_table = on_device(table, device)
        of_bucket = flat.index_select(0, in_table.view(-1))
        parts = [part.index_select(0, of_bucket).view(*table.shape, -1) for part in tables]
        one = on_device(is_real[..., None].astype(np.float32), device)
        rows = torch.cat([*parts, one], dim=-1).float().mul_(one)
        columns = table[:, bucket.n_survivors :] - n_survivors - bucket.heads[:, None] * n_survivors
        slot_columns = table[:, : bucket.n_survivors] - bucket.heads[:, None] * n_evicted
        is_kept = is_real[:, : bucket.n_survivors]
        old_keys = None
        if eviction.keys_rewritten:
            of_slots = slot_table.index_select(0, on_device(slot_columns.ravel(), device))
            old_keys = kept_keys.reshape(-1, head_dim).index_select(0, of_slots).view(*slot_columns.shape, -1).float()
            old_keys = old_keys * one[:, : bucket.n_survivors]
        heads = on_device(bucket.heads, device)
        of_queries = queries.index_select(0, heads)
        of_kept_queries = of_queries if kept_queries is queries else kept_queries.index_select(0, heads)
        place = places.view(-1).index_select(0, on_device(columns.ravel(), device)).view(columns.shape)
        matched, *errors = match_heads(
            rows,
            head_dim,
            place,
            of_queries,
            of_kept_queries,
            old_keys,
            key_ridge=key_ridge,
            counts=of_heads,
            length=length,
        )
        matched = matched.to(kept_keys.dtype)
        spoil_(errors[1], matched)
        found.append(errors)
        new_rows.append(matched.flatten(0, 1).index_select(0, on_device(np.flatnonzero(is_kept), device)))
        new_slots.append(slot_table.index_select(0, on_device(slot_columns[is_kept], device)))

    # Heads that lost or kept nothing have no error and take nothing: they come last.
    searched = np.concatenate([bucket.heads for bucket in buckets] or [np.zeros(0, dtype=np.int64)])
    nothing = torch.zeros(1, dtype=torch.float32, device=device)
    where_from = np.full(n_heads, len(searched))
    where_from[searched] = np.arange(len(searched))
    where_found = on_device(where_from, device)
    of_eviction, of_matching, output_norm = (
        torch.cat([*parts, nothing]).index_select(0, where_found)
        for parts in (list(part) for part in (zip(*found) if found else ((), (), ())))
    )
    is_fitted = of_matching < sqrt(max_error) * output_norm
    if not found:
        return kept_keys.clone(), kept_values.clone(), is_fitted, of_eviction, of_matching, output_norm
    changed_rows = new_rows[0] if len(new_rows) == 1 else torch.cat(new_rows)
    slots = new_slots[0] if len(new_slots) == 1 else torch.cat(new_slots)
    new = take_fits(kept_keys, kept_values, slots, changed_rows, is_fitted)
    return *new, is_fitted, of_eviction, of_matching, output_norm
