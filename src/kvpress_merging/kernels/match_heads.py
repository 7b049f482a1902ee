# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of matching for heads that kept and lost equally many positions; ``match.py`` says what it is for."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np
import torch

from kvpress_merging.kernels.buckets import is_padding, on_device
from kvpress_merging.kernels.nearby import nearest_rows
from kvpress_merging.kernels.rows import add_rows_, first_rows, scalar

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
# Values whose mean square is less are nothing to tell positions by; a weight of its reciprocal does not overflow.
MIN_SQUARE = 1e-30


def match_block(
    layer: Sequence[torch.Tensor],
    positions: torch.Tensor,
    slots: torch.Tensor,
    *,
    keys_rewritten: bool,
    key_ridge: float,
    max_error: float,
) -> tuple[torch.Tensor, ...]:
    """
    Match a block of heads.

    Parameters
    ----------
    layer : sequence of torch.Tensor
        The tensors that :func:`kvpress_merging.kernels.match.attention_match` takes, of the block's heads, without a
        batch axis.
    positions : torch.Tensor
        Survivors, then evicted positions, int64, shape ``(n_heads, n_survivors + n_evicted)``.
    slots : torch.Tensor
        Of the survivors, int64, shape ``(n_heads, n_survivors)``.
    keys_rewritten, key_ridge
        See :func:`kvpress_merging.kernels.match.attention_match`.
    max_error : float
        Squared error over the reference queries, relative to the output's square, below which a head takes the fit.

    Returns
    -------
    tuple of torch.Tensor
        The fields of :class:`kvpress_merging.kernels.match.Match` for these heads.
    """
    keys, values, kept_keys, kept_values, queries, kept_queries = layer
    (n_heads, k_len, head_dim), n_slots = keys.shape, kept_values.shape[1]
    flat = (positions + first_rows(n_heads, k_len, keys.device)).view(-1)
    slot = (slots + first_rows(n_heads, n_slots, keys.device)).view(-1)
    one = scalar(1.0, keys.dtype, keys.device).expand(n_heads, k_len, 1)
    rows = torch.cat([keys, values, one], dim=-1).flatten(0, 1).index_select(0, flat).view(*positions.shape, -1).float()
    survivors, place = positions.split([slots.shape[1], positions.shape[1] - slots.shape[1]], dim=1)
    counts_evicted = positions.shape[1] == k_len
    if not counts_evicted:
        place = torch.searchsorted(survivors.contiguous(), place.contiguous())
    old_keys = None
    if keys_rewritten:
        old_keys = kept_keys.reshape(-1, head_dim).index_select(0, slot).view(*slots.shape, head_dim).float()
    matched, of_eviction, of_matching, output_norm = match_heads(
        rows, head_dim, place, queries, kept_queries, old_keys, key_ridge=key_ridge, counts_evicted=counts_evicted
    )
    matched = matched.to(kept_keys.dtype)
    spoil_(of_matching, matched)
    is_fitted = of_matching < sqrt(max_error) * output_norm
    new = take_fits(kept_keys, kept_values, slot, matched.flatten(0, 1), is_fitted)
    return *new, is_fitted, of_eviction, of_matching, output_norm


def take_fits(
    kept_keys: torch.Tensor, kept_values: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, is_fitted: torch.Tensor
) -> list[torch.Tensor]:
    """
    Keys and values of a layer, without a batch axis, with the fits of those heads that take them.

    ``rows`` are the new key and value side by side of each of ``slots``, int64, which count through all heads.
    """
    new = []
    for kept, first in ((kept_keys, 0), (kept_values, kept_keys.shape[2])):
        columns = rows[:, first : first + kept.shape[2]]
        changed = kept.reshape(-1, kept.shape[2]).index_copy(0, slots, columns)
        new.append(torch.where(is_fitted[:, None, None], changed.view(kept.shape), kept))
    return new


def spoil_(of_matching: torch.Tensor, matched: torch.Tensor) -> None:
    """
    Make the error of a head NaN, which is less than no other, where a number of what it is given is not finite.

    What is not finite in float32 has shown in the error already: only what float16 has no room for is looked for.
    """
    if matched.dtype == torch.float16:
        of_matching.add_(matched.sum(dim=(1, 2), dtype=torch.float32), alpha=0)


def match_heads(
    rows: torch.Tensor,
    head_dim: int,
    place: torch.Tensor,
    queries: torch.Tensor,
    kept_queries: torch.Tensor,
    old_keys: torch.Tensor | None,
    *,
    key_ridge: float,
    counts: np.ndarray | None = None,
    length: int | None = None,
    counts_evicted: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Match heads, however well they can be.

    The ones beside the values carry the attention mass through every product, and the weights through every mean.

    Parameters
    ----------
    rows : torch.Tensor
        Keys, values and a one for each survivor and then for each evicted position, float32, shape
        ``(n_heads, n_survivors + n_evicted, head_dim + value_dim + 1)``.
    head_dim : int
        Of the keys.
    place : torch.Tensor
        How many survivors stand before each evicted position, or with ``counts_evicted`` how many positions, int64,
        shape ``(n_heads, n_evicted)``.
    queries, kept_queries : torch.Tensor
        Shape ``(n_heads, n_queries, head_dim)``.
    old_keys : torch.Tensor or None
        The survivors' keys where the press rewrote them, float32, shape ``(n_heads, n_survivors, head_dim)``.
    key_ridge
        See :func:`kvpress_merging.kernels.match.attention_match`.
    counts : numpy.ndarray, optional
        How many survivors and evicted positions of each head are real, int64, shape ``(n_heads, 2)``, where the rest is
        padding: rows of zeros.
    length : int, optional
        How many evicted positions share a window in the search for the nearest, see ``nearby.py``.

    Returns
    -------
    matched : torch.Tensor
        Keys, values and a one for each survivor, float32, shape ``(n_heads, n_survivors, head_dim + value_dim + 1)``.
    of_eviction, of_matching, output_norm : torch.Tensor
        Root of the squared error of eviction and of matching, and norm of the output, over all queries of a head,
        float32, shape ``(n_heads,)``.
    """
    n_heads, width, n_columns = rows.shape
    n_queries, n_survivors = queries.shape[1], width - place.shape[1]
    keys, values = rows[..., :head_dim], rows[..., head_dim:]

    # Positions run along rows, queries along columns, so that rows can be gathered and added.
    logits = torch.bmm(keys, queries.transpose(1, 2))
    if counts is not None:
        is_nothing = is_padding(counts.tolist(), n_survivors, width - n_survivors)
        logits.masked_fill_(on_device(is_nothing, rows.device)[..., None], -torch.inf)
    all_mass = logits.softmax(dim=1).add_(MIN_MASS)
    mass, kept_values = all_mass[:, :n_survivors], values[:, :n_survivors]
    residual = torch.bmm(all_mass[:, n_survivors:].transpose(1, 2), values[:, n_survivors:])
    output = torch.baddbmm(residual, mass.transpose(1, 2), kept_values)
    if old_keys is not None:  # what the survivors have without matching, as the press left their keys
        normalizer = logits.logsumexp(dim=1, keepdim=True)
        mass = torch.bmm(old_keys, kept_queries.transpose(1, 2)).sub_(normalizer).exp_().add_(MIN_MASS)
        residual = torch.baddbmm(output, mass.transpose(1, 2), kept_values, alpha=-1)
    del logits

    # Distances are scaled so that those of values need no factor; the fit does not depend on it.
    weight = query_weights(residual[..., :-1], 1 / (VALUE_WEIGHT * n_queries * width))
    output_norm = torch.linalg.vector_norm(output[..., :-1], dim=-1)
    of_eviction = _error(residual, output_norm)
    weighted = queries * weight
    moment, unit = _second_moment(queries, weighted)

    value_norm = torch.linalg.vector_norm(values[..., :-1], dim=(1, 2), keepdim=True)
    value_metric = value_norm.clamp_(min=(MIN_SQUARE * width) ** 0.5).pow_(-2)
    if counts is not None:
        value_metric.mul_(on_device((counts.sum(axis=1) / width)[:, None, None].astype(np.float32), rows.device))
    both = rows[..., :-1]
    _add_ridge_(moment, unit, METRIC_RIDGE)
    target = nearest_rows(
        both[:, :n_survivors],
        both[:, n_survivors:],
        place,
        moment,
        value_metric,
        counts,
        length,
        counts_evicted=counts_evicted,
    )
    _add_ridge_(moment, unit, key_ridge - METRIC_RIDGE)

    # All that is counted to a survivor, added to it: rows weighted by f, and attention.
    least, mean = (scalar(number, torch.float32, rows.device) for number in (MIN_SHARE, 1 / n_queries))
    share = torch.baddbmm(least, all_mass, mean.expand(n_heads, n_queries, 1))
    weighted_rows = rows * share
    counted, lost = (
        torch.cat([weighted_rows[:, some], all_mass[:, some]], dim=-1)
        for some in (slice(n_survivors), slice(n_survivors, None))
    )
    add_rows_(counted.flatten(0, 1), target.flatten(), lost.flatten(0, 1))
    total = counted[..., n_columns - 1 : n_columns]
    matched = counted[..., :n_columns] / (total if counts is None else total.clamp(min=TINY))
    growth = (counted[..., n_columns:] / mass).log_()

    if old_keys is not None:
        weighted = kept_queries * weight
        moment, unit = _second_moment(kept_queries, weighted)
        _add_ridge_(moment, unit, key_ridge)
    smoother = torch.bmm(weighted, torch.linalg.inv_ex(moment).inverse)
    new_keys = matched[..., :head_dim]
    if old_keys is None:
        # The mean key is a step of the way already; the regression is on what that leaves.
        old_keys = keys[:, :n_survivors]
        growth.baddbmm_(new_keys - old_keys, kept_queries.transpose(1, 2), alpha=-1)
        new_keys.baddbmm_(growth, smoother)
    else:
        torch.baddbmm(old_keys, growth, smoother, out=new_keys)
    mass = torch.bmm(new_keys - old_keys, kept_queries.transpose(1, 2)).exp_().mul_(mass)
    of_matching = _error(torch.baddbmm(output, mass.transpose(1, 2), matched[..., head_dim:], alpha=-1), output_norm)
    return matched, of_eviction, of_matching, torch.linalg.vector_norm(output_norm, dim=1)


def query_weights(residual: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """
    What each query weighs by what it lost: ``scale (1 + e_r / mean e) / 2``, shape ``(n_heads, n_queries, 1)``.

    Parameters
    ----------
    residual : torch.Tensor
        What each lost of its output, float32, shape ``(n_heads, n_queries, value_dim)``: ``e_r`` is its squared norm.
    scale : float
        A factor for all.
    """
    norm = torch.linalg.vector_norm(residual, dim=-1, keepdim=True)
    share = norm / torch.linalg.vector_norm(norm, dim=1, keepdim=True).clamp_(min=TINY)
    half = scalar(scale / 2, torch.float32, residual.device)
    return torch.addcmul(half, share, share, value=scale / 2 * residual.shape[1])


def _error(residual: torch.Tensor, output_norm: torch.Tensor) -> torch.Tensor:
    """Root of the squared error of output and mass over all queries of a head, the mass in units of the output."""
    residual[..., -1].mul_(output_norm)
    return torch.linalg.vector_norm(residual, dim=(1, 2))


def _second_moment(queries: torch.Tensor, weighted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``Q^T W Q``, shape ``(n_heads, head_dim, head_dim)``, and the mean of its diagonal, shape ``(n_heads, 1)``."""
    moment = torch.bmm(queries.transpose(1, 2), weighted)
    return moment, moment.diagonal(dim1=1, dim2=2).mean(dim=-1, keepdim=True)


def _add_ridge_(moment: torch.Tensor, unit: torch.Tensor, ridge: float) -> None:
    """Add ``ridge`` units to the diagonal, in place."""
    moment.diagonal(dim1=1, dim2=2).add_(unit, alpha=ridge)
