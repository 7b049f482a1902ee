# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
The arithmetic of matching, for heads that are worked on together; ``match.py`` says what it is for.

Positions stand where they stood in the layer, with rows more behind the last: nowhere, rows of zeros that attract no
attention. What is neither survivor nor evicted is made such a row, and lists of positions are padded with one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvpress_merging.kernels.nearby import BLOCK, clusters, points_of
from kvpress_merging.kernels.rows import add_rows_, flat_rows, gather_rows, on_device

# Attention below this share is nothing: no key is asked to attract more than the reciprocal of it times its own.
MIN_MASS = 1e-20
# What the distance of two positions makes of their values: the mean square of their difference, in units of the mean
# square of a value, weighs as much as so many squared differences of logits.
VALUE_WEIGHT = 4.0
# The same of their keys where reference queries see no difference, in units of the mean squared reference query: other
# queries may.
METRIC_RIDGE = 1.0
# In means, each position counts as if it had this share of the attention on top of its own: what no reference query
# looks at may be what is asked for later.
MIN_SHARE = 1e-3
TINY = torch.finfo(torch.float32).tiny
# Values of a head whose norm together is less are nothing to tell positions by.
MIN_NORM = 1e-15
# Of a cap: nearer to it, a logit moves by less than a fiftieth of what is added to it, and no key is asked to.
MAX_CAPPED = 0.99


def match_heads(
    layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    lists: Sequence[torch.Tensor],
    counts: np.ndarray,
    length: int,
    *,
    keys_rewritten: bool,
    key_ridge: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Match some heads, however well they can be: the steps of :func:`kvpress_merging.kernels.match.attention_match`.

    ``layer`` is that function's keys, values, kept keys, queries, kept queries and sinks, of these heads, without a
    batch axis; ``lists`` are survivors and evicted positions, padded with ``k_len``, and slots, padded with
    ``n_slots``. ``counts`` says how many survivors and evicted positions of each are no padding, int64, shape
    ``(n_heads, 2)``; ``length`` how many positions share a window, see
    :func:`kvpress_merging.kernels.nearby.block_length`. Returns new keys and values of the survivors, float32, shapes
    ``(n_heads, n_survivors, head_dim)`` and ``(n_heads, n_survivors, value_dim)``; of each head the roots of the
    squared errors of eviction and of matching and the norm of the output, float32, shape ``(3, n_heads)``; and how
    many survivors of each gave their place away, int64, shape ``(n_heads,)``.
    """
    (keys, all_values, kept_keys, queries, kept_queries, sinks), (survivors, evicted, slots) = layer, lists
    (n_heads, k_len, head_dim), value_dim, n_queries = keys.shape, all_values.shape[2], queries.shape[1]
    device = keys.device
    n_rows = k_len + BLOCK - k_len % BLOCK
    is_nowhere = torch.ones(n_heads, n_rows, dtype=torch.bool, device=device)
    is_nowhere.scatter_(1, survivors, False).scatter_(1, evicted, False)[:, k_len] = True
    # Keys and values side by side.
    rows = torch.zeros(n_heads, n_rows, head_dim + value_dim, dtype=torch.float32, device=device)
    rows[:, :k_len, :head_dim], rows[:, :k_len, head_dim:] = keys, all_values
    rows.masked_fill_(is_nowhere[..., None], 0.0)
    values = rows[..., head_dim:]

    # Attention of the full cache, and what is left of it. Positions run along rows, queries along columns.
    raw_logits = torch.bmm(rows[..., :head_dim], queries.mT)
    logits = cap(raw_logits, softcap).masked_fill_(is_nowhere[..., None], -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None]], dim=1)
    all_mass = logits.softmax(dim=1)[:, :n_rows]
    output = torch.bmm(all_mass.mT, values)
    flat = flat_rows(survivors, n_rows)
    old_keys, old_values = gather_rows(rows, flat).split([head_dim, value_dim], dim=-1)
    if not keys_rewritten:
        mass = gather_rows(all_mass, flat)
        raw_logits = raw_logits if softcap is None else gather_rows(raw_logits, flat)
    else:
        n_slots = kept_keys.shape[1]
        old_keys = gather_rows(kept_keys, flat_rows(slots.clamp(max=n_slots - 1), n_slots)).float()
        raw_logits = torch.bmm(old_keys, kept_queries.mT)
        mass = (cap(raw_logits, softcap) - logits.logsumexp(dim=1, keepdim=True)).exp_()
        mass.masked_fill_((survivors == k_len)[..., None], 0.0)
    residual = torch.baddbmm(output, mass.mT, old_values, alpha=-1)
    output_norm, lost = (torch.linalg.vector_norm(part, dim=-1) for part in (output, residual))
    full_mass = 1.0 if sinks is None else all_mass.sum(dim=1)
    eviction_error = _error(lost, mass, full_mass, output_norm)

    # 1. Clusters, each with a centre that has the place of a survivor.
    weight = query_weights(lost)[..., None]
    n_listed = counts.sum(axis=1, dtype=np.float32)[:, None, None]
    norm = torch.linalg.vector_norm(values, dim=(1, 2), keepdim=True).clamp_(min=MIN_NORM)
    value_scale = on_device(np.sqrt(VALUE_WEIGHT * n_queries * n_listed), device) / norm
    key_metric = _ridged_moment(queries, weight, METRIC_RIDGE)
    points = points_of(rows[..., :head_dim], values, key_metric, value_scale)
    # There is no such key of an evicted position as the press made of the survivors'.
    place, n_exchanged = clusters(points, is_nowhere, survivors, counts, length, exchange=not keys_rewritten)

    # 2. Means of all that a survivor stands for, and the attention that all of it gets.
    share = (all_mass.mean(dim=-1, keepdim=True) + MIN_SHARE).masked_fill_(is_nowhere[..., None], 0.0)
    weighted = torch.cat([rows.mul_(share), share, all_mass], dim=-1)
    sums = weighted.new_zeros(survivors.numel() + 1, weighted.shape[2])  # the last is what no survivor stands for
    sums = add_rows_(sums, place.flatten(), weighted.flatten(0, 1))[:-1].view(n_heads, -1, weighted.shape[2])
    mean, total, counted_mass = sums.split([head_dim + value_dim, 1, n_queries], dim=-1)
    mean_keys, new_values = (mean / total.clamp(min=TINY)).split([head_dim, value_dim], dim=-1)

    # 3. Mass: on from the mean key, a ridge regression on what the mean leaves of the growth that is wanted.
    growth = ((counted_mass + MIN_MASS) / (mass + MIN_MASS)).log_()
    if softcap is not None:
        capped = cap(raw_logits, softcap)
        growth = uncap(capped + growth, softcap) - uncap(capped, softcap)
    shift = torch.zeros_like(old_keys) if keys_rewritten else mean_keys - old_keys
    inverse = torch.linalg.inv_ex(_ridged_moment(kept_queries, weight, key_ridge)).inverse
    left = torch.baddbmm(growth, shift, kept_queries.mT, alpha=-1)
    shift = torch.baddbmm(shift, left, torch.bmm(kept_queries * weight, inverse))
    grown = torch.bmm(shift, kept_queries.mT)
    if softcap is not None:
        grown = cap(raw_logits + grown, softcap) - capped
    mass = grown.exp_().mul_(mass)

    residual = torch.baddbmm(output, mass.mT, new_values, alpha=-1)
    matching_error = _error(torch.linalg.vector_norm(residual, dim=-1), mass, full_mass, output_norm)
    errors = torch.stack([eviction_error, matching_error, torch.linalg.vector_norm(output_norm, dim=1)])
    # A head that lost or kept nothing has nothing to match.
    has_nothing = on_device(counts.min(axis=1) == 0, device)
    return shift.add_(old_keys), new_values, errors.masked_fill_(has_nothing, 0.0), n_exchanged


def cap(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """``softcap tanh(logits / softcap)``, new; the logits themselves without a cap."""
    return logits if softcap is None else (logits / softcap).tanh_().mul_(softcap)


def uncap(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """The inverse of :func:`cap`, of logits held within :data:`MAX_CAPPED` of the cap."""
    return (logits / softcap).clamp_(-MAX_CAPPED, MAX_CAPPED).atanh_().mul_(softcap)


def query_weights(lost: torch.Tensor) -> torch.Tensor:
    """What each query weighs by the norm of what it lost: ``(1 + e_r / mean e) / 2``, with ``e_r`` its square."""
    error = lost.square()
    return (1 + error / error.mean(dim=1, keepdim=True).clamp_(min=TINY)) / 2


def _error(
    lost: torch.Tensor, mass: torch.Tensor, full_mass: torch.Tensor | float, output_norm: torch.Tensor
) -> torch.Tensor:
    """Root of the squared error of output and mass over all queries of a head, the mass in units of the output."""
    return torch.linalg.vector_norm(torch.hypot(lost, (mass.sum(dim=1) - full_mass) * output_norm), dim=1)


def _ridged_moment(queries: torch.Tensor, weight: torch.Tensor, ridge: float) -> torch.Tensor:
    """``Q^T W Q + ridge u I`` of each head, with u the mean of the diagonal of ``Q^T W Q``."""
    moment = torch.bmm(queries.mT, queries * weight)
    diagonal = moment.diagonal(dim1=1, dim2=2)
    diagonal.add_(diagonal.mean(dim=-1, keepdim=True), alpha=ridge)
    return moment
