# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
Re-fit the survivors of a layer so that attention over them gives what attention over the full cache gave.

After [Fast KV Compaction via Attention Matching](https://arxiv.org/abs/2602.16284), and
[KeepKV](https://arxiv.org/abs/2504.09936) for why the attention mass of what is evicted matters.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels.nearby import naive_nearest_nearby, nearest_nearby
from kvpress_merging.kernels.rows import (
    add_rows_,
    adds_by_segment,
    block_bytes,
    flat_rows,
    gather_rows,
    head_blocks,
    scatter_rows,
)

# Attention below this share is nothing: no key is asked to attract more than the reciprocal of it times its own.
_LEAST_MASS = 1e-20
# Share of eviction's error that a fit may leave on queries left out: what few queries say of others is uncertain.
_MOST_ERROR = 0.8
# What the distance of two positions makes of their values: the mean square of their difference, in units of the mean
# square of a value, weighs as much as so many squared differences of logits.
_VALUE_WEIGHT = 4.0
# The same of their keys where reference queries see no difference, in units of the mean squared reference query: other
# queries may.
_METRIC_RIDGE = 1.0
# In means, each position counts as if it had this share of the attention on top of its own: what no reference query
# looks at may be what is asked for later.
_LEAST_SHARE = 1e-3
# No query is taken to decide its own fit by more than all but this: it bounds what leaving it out divides by.
_LEAST_FREEDOM = 1e-3
_TINY = torch.finfo(torch.float32).tiny
# Values whose mean square is less are nothing to tell positions by; a weight of its reciprocal does not overflow.
_LEAST_SQUARE = 1e-30


@dataclass(frozen=True, eq=False)
class Match:
    """
    What the re-fit made of one layer.

    Parameters
    ----------
    keys, values : torch.Tensor
        The survivors after the fit: order, shape, dtype and device of what the press left. Heads that keep eviction's
        result keep its bits.
    is_fitted : torch.Tensor
        Which heads took the fit, bool, shape ``(bsz, num_key_value_heads)``.
    error_before, error_after : torch.Tensor
        Squared error of the attention output over the reference queries, relative to the full output's, of eviction and
        of the fit, each query left out of the fit in its turn; float32, same shape. 0 where nothing was evicted.
    """

    keys: torch.Tensor
    values: torch.Tensor
    is_fitted: torch.Tensor
    error_before: torch.Tensor
    error_after: torch.Tensor


@torch.no_grad()
def attention_match(
    keys: torch.Tensor,
    values: torch.Tensor,
    kept_keys: torch.Tensor,
    kept_values: torch.Tensor,
    queries: torch.Tensor,
    kept_queries: torch.Tensor,
    eviction: Eviction,
    *,
    key_ridge: float,
) -> Match:
    """
    Shift the survivors' keys and values so that reference queries see in them what they saw in all.

    For each head, with ``p_rj`` the attention of reference query r to position j of the full cache and
    ``O_r = sum_j p_rj v_j``:

    1. *clusters*. Each evicted position i is counted to the survivor j whose logits and value are most like its own, of
       some that are near it in the context (:func:`kvpress_merging.kernels.nearby.nearest_nearby`): the one with the
       least ``(k_i - k_j)^T (Q^T W Q + u I) (k_i - k_j) / n_queries + 4 |v_i - v_j|^2 / mean |v|^2``, with ``u`` the
       mean of the diagonal of ``Q^T W Q``. ``W`` is diagonal: the more of its output a query lost, the more it weighs,
       ``w_r = (1 + e_r / mean e) / 2`` with ``e_r`` the squared error of eviction for query r.
    2. *means*. Survivor j now stands for all that was counted to it, so its value becomes the mean of those values,
       ``v'_j = (f_j v_j + sum_i f_i v_i) / (f_j + sum_i f_i)``, and ``k'_j`` is the same mean of their keys. A position
       weighs ``f = m + 1e-3``, with m its mean attention from the reference queries: what they look at decides, and
       where they look at nothing all count alike.
    3. *mass*. The logit of survivor j should grow, for query r, by ``d_rj = log((p_rj + sum_i p_ri) / p_rj)`` over the
       i counted to j. The shift of its key that does so best is a ridge regression,
       ``D_j = (Q^T W Q + a I)^-1 (Q^T W d_j + a (k'_j - k_j))``, one factorization for all survivors. The ridge pulls
       towards the mean key: to a query unlike all reference queries, the survivor looks as what was counted to it does
       on average. Where the press rewrote the survivors' keys the mean does not belong, and it pulls towards the key as
       it is.
    4. *do no harm*. What the others would say of each query's ``d_rj`` is known in closed form (leave one out). A head
       takes the fit only if attention by those logits leaves less than 0.8 of eviction's squared error of output and
       mass.

    All arithmetic is in float32; systems are solved by Cholesky factorization. Nothing is read back from the device.
    Whatever is not finite leaves its head as eviction left it. Linear in the context.

    Parameters
    ----------
    keys, values : torch.Tensor
        The layer before the eviction, shapes ``(bsz, num_key_value_heads, k_len, head_dim)``; the head_dim of values
        may differ from that of keys.
    kept_keys, kept_values : torch.Tensor
        What the press left, shapes ``(bsz, num_key_value_heads, n_slots, head_dim)``. Not written to.
    queries : torch.Tensor
        Reference queries, float32, scaled and rotated to where ``keys`` will be asked from, shape
        ``(bsz, num_key_value_heads, n_queries, head_dim)``.
    kept_queries : torch.Tensor
        The same for ``kept_keys``; the same tensor unless the press rewrote the survivors' keys. No key is shifted in a
        channel in which these are 0.
    eviction : Eviction
        Which positions survived, where they stand in what the press left, and which were evicted.
    key_ridge : float
        ``a / u``.

    Returns
    -------
    Match
        The survivors' keys and values, and how well they stand for what was evicted.
    """
    bsz, num_key_value_heads, _, head_dim = kept_keys.shape
    new_keys, new_values = (rows.clone(memory_format=torch.contiguous_format) for rows in (kept_keys, kept_values))
    is_fitted = torch.zeros((bsz, num_key_value_heads), dtype=torch.bool, device=keys.device)
    error_before = torch.zeros((bsz, num_key_value_heads), dtype=torch.float32, device=keys.device)
    error_after = torch.zeros_like(error_before)

    n_rows = eviction.survivors.shape[-1] + eviction.evicted.shape[-1]
    bytes_per_head = 4 * max(1, n_rows) * max(1, head_dim, queries.shape[2])
    for b, heads, n_survivors, n_evicted in head_blocks(eviction, max(1, block_bytes(keys.device) // bytes_per_head)):
        if n_survivors == 0 or n_evicted == 0:
            continue
        survivors, evicted = eviction.survivors[b, heads, :n_survivors], eviction.evicted[b, heads, :n_evicted]
        slots = eviction.slots[b, heads, :n_survivors]
        both_keys = gather_rows(keys[b, heads], torch.cat([survivors, evicted], dim=-1))
        before = both_keys.float()
        old_keys, survivor_keys = both_keys[:, :n_survivors], before[:, :n_survivors]
        if eviction.keys_rewritten:
            old_keys = gather_rows(kept_keys[b, heads], slots)
            survivor_keys = old_keys.float()
        old_values = gather_rows(kept_values[b, heads], slots)
        with _without_autocast(keys.device):
            fitted_keys, fitted_values, *rest = _fit(
                before,
                gather_rows(values[b, heads], evicted).float(),
                survivor_keys,
                old_values.float(),
                queries[b, heads],
                kept_queries[b, heads],
                torch.searchsorted(survivors.contiguous(), evicted.contiguous()),
                keys_rewritten=eviction.keys_rewritten,
                key_ridge=key_ridge,
            )
        is_better, error_before[b, heads], error_after[b, heads] = rest
        fitted_keys, fitted_values = fitted_keys.to(keys.dtype), fitted_values.to(values.dtype)
        for fitted in (fitted_keys, fitted_values):  # one that is not finite spoils the sum
            is_better = is_better & fitted.sum(dim=(1, 2), dtype=torch.float32).isfinite()
        is_fitted[b, heads] = is_better
        for new, old, fitted in ((new_keys, old_keys, fitted_keys), (new_values, old_values, fitted_values)):
            scatter_rows(new[b, heads], slots, torch.where(is_better[:, None, None], fitted, old))
    return Match(new_keys, new_values, is_fitted, error_before, error_after)


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """Products in the dtype of their factors, also inside an autocast region."""
    is_available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if is_available else nullcontext()


def _fit(
    keys: torch.Tensor,
    evicted_values: torch.Tensor,
    kept_keys: torch.Tensor,
    kept_values: torch.Tensor,
    queries: torch.Tensor,
    kept_queries: torch.Tensor,
    place: torch.Tensor,
    *,
    keys_rewritten: bool,
    key_ridge: float,
) -> tuple[torch.Tensor, ...]:
    """
    Fit a block of heads.

    Parameters
    ----------
    keys : torch.Tensor
        Of the layer before the eviction, first the survivors', then those evicted, float32, shape
        ``(n_heads, n_survivors + n_evicted, head_dim)``.
    evicted_values : torch.Tensor
        float32, shape ``(n_heads, n_evicted, head_dim)``.
    kept_keys, kept_values : torch.Tensor
        The survivors as the press left them, float32, shape ``(n_heads, n_survivors, head_dim)``.
    queries, kept_queries : torch.Tensor
        Shape ``(n_heads, n_queries, head_dim)``.
    place : torch.Tensor
        How many survivors stand before each evicted position, int64, shape ``(n_heads, n_evicted)``.
    keys_rewritten, key_ridge
        See :func:`attention_match`.

    Returns
    -------
    tuple of torch.Tensor
        Keys, values, whether the fit is better than eviction, and the relative errors of eviction and of the fit.
    """
    n_survivors = kept_keys.shape[1]

    # Positions run along rows, queries along columns, so that rows can be gathered and added. In place where it can be:
    # on a CPU most of the time goes into passes over these matrices.
    logits = torch.bmm(keys, queries.transpose(1, 2))
    normalizer = logits.logsumexp(dim=1, keepdim=True) if keys_rewritten else None
    mass = logits.softmax(dim=1)
    del logits
    kept_mass, lost_mass = mass[:, :n_survivors], mass[:, n_survivors:]
    residual = torch.bmm(lost_mass.transpose(1, 2), evicted_values)
    output = torch.baddbmm(residual, kept_mass.transpose(1, 2), kept_values)

    # What the survivors have without a fit, as the press left their keys.
    mass = kept_mass
    if normalizer is not None:
        mass = torch.bmm(kept_keys, kept_queries.transpose(1, 2)).sub_(normalizer).exp_()
        residual = torch.baddbmm(output, mass.transpose(1, 2), kept_values, alpha=-1)
    error_of_eviction = _squared_error(residual, mass, output)

    weight = _weights(residual)
    moment, unit = _second_moment(queries, weight)
    mean_square = (kept_values.square().sum(dim=(1, 2)) + evicted_values.square().sum(dim=(1, 2))) / keys.shape[1]
    value_metric = (_VALUE_WEIGHT * queries.shape[1] / mean_square.clamp(min=_LEAST_SQUARE))[:, None, None]
    target = nearest_nearby(
        keys[:, :n_survivors],
        keys[:, n_survivors:],
        kept_values,
        evicted_values,
        place,
        _with_ridge(moment, _METRIC_RIDGE * unit),
        value_metric,
    )
    rows = _rows_of(target, n_survivors)
    kept_share, lost_share = (m.mean(dim=2, keepdim=True).add_(_LEAST_SHARE) for m in (kept_mass, lost_mass))
    mean_keys, fitted_values = (
        _add_counted_(kept * kept_share, evicted * lost_share, rows)
        for kept, evicted in ((keys[:, :n_survivors], keys[:, n_survivors:]), (kept_values, evicted_values))
    )
    share = _add_counted_(kept_share, lost_share, rows)
    mean_keys.div_(share)
    fitted_values.div_(share)

    growth = _add_counted_(kept_mass.clone(memory_format=torch.contiguous_format), lost_mass, rows)
    growth.add_(_LEAST_MASS).div_(mass + _LEAST_MASS).log_()
    if keys_rewritten:
        moment, unit = _second_moment(kept_queries, weight)
    ridge = key_ridge * unit
    inverse = torch.cholesky_inverse(_cholesky(_with_ridge(moment, ridge)))
    smoother = torch.bmm(kept_queries * weight, inverse)
    shift = torch.bmm(growth, smoother)
    if not keys_rewritten:
        shift.baddbmm_(mean_keys.sub_(kept_keys).mul_(ridge), inverse)
    # A query's growth as the others would have it, (fit - leverage * growth) / (1 - leverage).
    leverage = (kept_queries * smoother).sum(dim=-1, keepdim=True)
    of_fit = 1 / (1 - leverage).clamp_(min=_LEAST_FREEDOM)
    growth.mul_((1 - of_fit).transpose(1, 2)).baddbmm_(shift, (kept_queries * of_fit).transpose(1, 2))
    mass = growth.exp_().mul_(mass)
    residual = torch.baddbmm(output, mass.transpose(1, 2), fitted_values, alpha=-1)
    error_of_fit = _squared_error(residual, mass, output)

    scale = output.square().sum(dim=(1, 2)).clamp(min=_TINY)
    # False where either is not a number.
    is_better = error_of_fit < _MOST_ERROR * error_of_eviction
    return kept_keys + shift, fitted_values, is_better, error_of_eviction / scale, error_of_fit / scale


def _rows_of(target: torch.Tensor, n_survivors: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The row among all heads' survivors that each evicted position is counted to, and the order that they are in, if it
    is another than the evicted positions' own.
    """
    to_row = flat_rows(target, n_survivors)
    return to_row.sort(stable=True) if adds_by_segment(target.device) else (to_row, None)


def _add_counted_(
    survivors: torch.Tensor, evicted: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor | None]
) -> torch.Tensor:
    """Add to rows of the survivors, shape ``(n_heads, n_survivors, n)``, contiguous, those that are counted to each."""
    to_row, order = rows
    evicted = evicted.reshape(-1, evicted.shape[-1])
    if order is not None:
        evicted = evicted[order]
    add_rows_(survivors.view(-1, survivors.shape[-1]), to_row, evicted)
    return survivors


def naive_attention_match(
    keys: torch.Tensor,
    values: torch.Tensor,
    kept_keys: torch.Tensor,
    kept_values: torch.Tensor,
    queries: torch.Tensor,
    kept_queries: torch.Tensor,
    eviction: Eviction,
    *,
    key_ridge: float,
) -> Match:
    """
    :func:`attention_match` as one would write it down: head by head, in float64, with a fit of its own for each query
    that is left out.
    """
    new_keys, new_values = kept_keys.clone(), kept_values.clone()
    is_fitted = torch.zeros(kept_keys.shape[:2], dtype=torch.bool)
    error_before, error_after = torch.zeros(2, *kept_keys.shape[:2], dtype=torch.float32)
    for b, heads, n_survivors, n_evicted in head_blocks(eviction, heads_per_block=1):
        h = heads.start
        survivors, evicted = eviction.survivors[b, h, :n_survivors], eviction.evicted[b, h, :n_evicted]
        slots = eviction.slots[b, h, :n_survivors]
        if n_survivors == 0 or n_evicted == 0:
            continue
        all_keys, all_values = keys[b, h].double(), values[b, h].double()
        q, kept_q = queries[b, h].double(), kept_queries[b, h].double()
        old_keys, old_values = kept_keys[b, h, slots].double(), kept_values[b, h, slots].double()

        logits = q @ all_keys[torch.cat([survivors, evicted])].T
        normalizer = logits.logsumexp(dim=1, keepdim=True)
        kept_mass, lost_mass = (logits - normalizer).exp().split([n_survivors, n_evicted], dim=1)
        output = kept_mass @ all_values[survivors] + lost_mass @ all_values[evicted]
        mass = (kept_q @ old_keys.T - normalizer).exp()
        error_of_eviction = _naive_squared_error(output - mass @ old_values, mass, output)

        lost = (output - mass @ old_values).square().sum(dim=1)
        weight = (1 + lost / lost.mean().clamp(min=_TINY)) / 2
        identity = torch.eye(q.shape[1], dtype=q.dtype)
        gram = q.T @ (weight[:, None] * q)
        some_values = torch.cat([old_values, all_values[evicted]])
        target = naive_nearest_nearby(
            all_keys[survivors],
            all_keys[evicted],
            old_values,
            all_values[evicted],
            torch.searchsorted(survivors, evicted),
            gram + _METRIC_RIDGE * gram.diagonal().mean() * identity,
            _VALUE_WEIGHT * len(q) / some_values.square().sum(dim=1).mean().clamp(min=_LEAST_SQUARE),
        )
        fitted_values, pull = old_values.clone(), torch.zeros_like(old_keys)
        for j in range(n_survivors):
            counted = target == j
            share = torch.cat([kept_mass[:, [j]], lost_mass[:, counted]], dim=1).mean(dim=0) + _LEAST_SHARE
            share /= share.sum()
            fitted_values[j] = share @ torch.cat([old_values[[j]], all_values[evicted[counted]]])
            if not eviction.keys_rewritten:
                pull[j] = share @ all_keys[torch.cat([survivors[[j]], evicted[counted]])] - old_keys[j]
        growth = kept_mass.index_add(1, target, lost_mass) + _LEAST_MASS
        growth = (growth / (mass + _LEAST_MASS)).log()
        weighted_q = weight[:, None] * kept_q
        gram = kept_q.T @ weighted_q
        ridge = key_ridge * gram.diagonal().mean() * identity
        fitted_keys = old_keys + torch.linalg.solve(gram + ridge, weighted_q.T @ growth + ridge @ pull.T).T
        others_say = []
        for r in range(len(q)):
            others = torch.arange(len(q)) != r
            gram = kept_q[others].T @ weighted_q[others]
            wanted = weighted_q[others].T @ growth[others] + ridge @ pull.T
            others_say.append(kept_q[r] @ torch.linalg.solve(gram + ridge, wanted))
        mass = mass * torch.stack(others_say).exp()

        error_of_fit = _naive_squared_error(output - mass @ fitted_values, mass, output)
        is_fitted[b, h] = error_of_fit < _MOST_ERROR * error_of_eviction
        scale = output.square().sum()
        error_before[b, h], error_after[b, h] = error_of_eviction / scale, error_of_fit / scale
        if is_fitted[b, h]:
            new_keys[b, h, slots] = fitted_keys.to(keys.dtype)
            new_values[b, h, slots] = fitted_values.to(values.dtype)
    return Match(new_keys, new_values, is_fitted, error_before, error_after)


def _naive_squared_error(residual: torch.Tensor, mass: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    missing = mass.sum(dim=1, keepdim=True) - 1
    return residual.square().sum() + (missing * output).square().sum()


def _squared_error(residual: torch.Tensor, mass: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Squared error of output and mass over all queries of a head, the mass in units of the output."""
    of_output = residual.square().sum(dim=(1, 2))
    of_mass = ((mass.sum(dim=1) - 1).square() * output.square().sum(dim=-1)).sum(dim=-1)
    return of_output + of_mass


def _weights(residual: torch.Tensor) -> torch.Tensor:
    """What each query weighs by what it lost, shape ``(n_heads, n_queries, 1)``; see :func:`attention_match`."""
    error = residual.square().sum(dim=-1, keepdim=True)
    return (error / error.mean(dim=1, keepdim=True).clamp(min=_TINY) + 1) / 2


def _second_moment(queries: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``Q^T W Q``, shape ``(n_heads, head_dim, head_dim)``, and the mean of its diagonal, shape ``(n_heads, 1, 1)``."""
    moment = torch.bmm(queries.transpose(1, 2), queries * weight)
    return moment, moment.diagonal(dim1=1, dim2=2).mean(dim=-1)[:, None, None]


def _with_ridge(moment: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """``moment`` plus ``ridge`` times the identity."""
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    return torch.addcmul(moment, ridge, identity)


def _cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """Without an exception, and the reading back that it would take: what has no factor fails as not finite."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return factor.masked_fill_((info != 0)[:, None, None], torch.nan)
