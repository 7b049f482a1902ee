# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
Match attention: change the survivors of a layer so that attention over them gives what it gave over the full cache.

After [Fast KV Compaction via Attention Matching](https://arxiv.org/abs/2602.16284), and
[KeepKV](https://arxiv.org/abs/2504.09936) for why the attention mass of what is evicted matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch

from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels import match_heads as steps
from kvpress_merging.kernels.nearby import block_length, naive_clusters
from kvpress_merging.kernels.products import full_precision
from kvpress_merging.kernels.rows import alike_heads, flat_rows, padded_lists

# Squared error of output and mass, relative to the output's square: what losing everything leaves.
_MAX_ERROR = 2.0


@dataclass(frozen=True, eq=False)
class Match:
    """
    What matching made of one layer.

    Parameters
    ----------
    keys, values : torch.Tensor
        The survivors after the fit: order, shape, dtype and device of what the press left. Heads that keep eviction's
        result keep its bits.
    is_fitted : torch.Tensor
        Which heads took what matching gave, bool, shape ``(bsz, num_key_value_heads)``.
    n_exchanged : torch.Tensor
        How many survivors gave their place to an evicted position, also where a head did not take the fit; int64, same
        shape.
    eviction_error, matching_error : torch.Tensor
        Root of the squared error of the attention output over the reference queries, as eviction leaves it and as
        matching does; float32, same shape. 0 where nothing was evicted.
    output_norm : torch.Tensor
        Norm of all queries' outputs together, float32, same shape.
    """

    keys: torch.Tensor
    values: torch.Tensor
    is_fitted: torch.Tensor
    n_exchanged: torch.Tensor
    eviction_error: torch.Tensor
    matching_error: torch.Tensor
    output_norm: torch.Tensor

    @property
    def error_before(self) -> torch.Tensor:
        """Squared error of eviction relative to the output's square, float32, shape of ``is_fitted``."""
        return relative_square(self.eviction_error, self.output_norm)

    @property
    def error_after(self) -> torch.Tensor:
        """The same of matching, also where a head did not take it."""
        return relative_square(self.matching_error, self.output_norm)


def relative_square(error: torch.Tensor, output_norm: torch.Tensor) -> torch.Tensor:
    """Square of an error relative to the norm of all queries' outputs together."""
    return (error / output_norm.clamp(min=sqrt(steps.TINY))).square_()


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
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> Match:
    """
    Shift the survivors' keys and values so that reference queries see in them what they saw in all.

    For each head, with ``p_rj`` the attention of reference query r to position j of the full cache and
    ``O_r = sum_j p_rj v_j``:

    1. *clusters*. The squared distance of two positions is
       ``(k_i - k_j)^T (Q^T W Q + u I) (k_i - k_j) / n_queries + 4 |v_i - v_j|^2 / mean |v|^2``, with ``u`` the mean of
       the diagonal of ``Q^T W Q``. ``W`` is diagonal: the more of its output a query lost, the more it weighs,
       ``w_r = (1 + e_r / mean e) / 2`` with ``e_r`` the squared error of eviction for query r. A survivor whose
       nearest other lies before it gives its place to an evicted position that is at least twice as far from every
       survivor (:func:`kvpress_merging.kernels.nearby.clusters`), nearest pairs and farthest positions first.
       Each position without a place is then counted to the nearest that has one, of some that are near it in the
       context (:func:`kvpress_merging.kernels.nearby.nearest_nearby`). Where the press rewrote the survivors' keys no
       place is given away, since there is no such key of an evicted position.
    2. *means*. Survivor j now stands for the position c that has its place, itself as a rule, and for all that was
       counted to that, so its value becomes the mean of those values, ``v'_j = (f_c v_c + sum_i f_i v_i) / (f_c + sum_i
       f_i)``, and ``k'_j`` is the same mean of their keys. A position
       weighs ``f = m + 1e-3``, with m its mean attention from the reference queries: what they look at decides, and
       where they look at nothing all count alike.
    3. *mass*. The logit of survivor j should grow, for query r, by ``d_rj = log((p_rc + sum_i p_ri) / p_rj)`` over the
       i counted to c. The shift of its key that does so best is a ridge regression,
       ``D_j = (Q^T W Q + a I)^-1 (Q^T W d_j + a (k'_j - k_j))``, one factorization for all survivors. The ridge pulls
       towards the mean key: to a query unlike all reference queries, the survivor looks as what was counted to it does
       on average. Where the press rewrote the survivors' keys the mean does not belong, and it pulls towards the key as
       it is.
    4. *check*. A head takes the fit only if it leaves a smaller error of output and mass than losing everything would.
       It may be a larger one than eviction's: presses keep what the context's own queries look at, so by these a head
       often lost next to nothing, and what it lost is asked for later.

    With ``softcap`` c a layer attends by ``z = c tanh(l / c)`` of its logits l, here too. ``d_rj`` is then what z
    should grow by, and the regression is on what that asks of l: ``g(z + d) - g(z)`` with ``g(z) = c artanh(z / c)``,
    where ``z / c`` is held within 0.99, since nearer to its cap a logit cannot get by growing. With ``sinks`` the
    softmax has one logit more, for which there is no value, in the full cache and after the eviction alike: the mass to
    be matched is what it leaves.

    All arithmetic is in float32, by IEEE's rules whatever is allowed elsewhere. Nothing is read back from the device.
    Whatever is not finite leaves its head as eviction left it. Linear in the context.

    Parameters
    ----------
    keys, values, kept_keys, kept_values, eviction
        As :func:`kvpress_merging.kernels.blend.cosine_blend` takes them.
    queries : torch.Tensor
        Reference queries, float32, scaled and rotated to where ``keys`` will be asked from, shape
        ``(bsz, num_key_value_heads, n_queries, head_dim)``.
    kept_queries : torch.Tensor
        The same for ``kept_keys``; the same tensor unless the press rewrote the survivors' keys. No key is shifted in a
        channel in which these are 0.
    key_ridge : float
        ``a / u``.
    softcap : float, optional
        The cap of the layer's logits, above 0, as Gemma 2 has one.
    sinks : torch.Tensor, optional
        A logit for each reference query that attracts attention and has no value, as gpt-oss has them: float32, shape
        ``(bsz, num_key_value_heads, n_queries)``.

    Returns
    -------
    Match
        The survivors' keys and values, and how well they stand for what was evicted.
    """
    shape, n_slots = kept_keys.shape[:2], kept_keys.shape[2]
    n_heads, counts = shape[0] * shape[1], eviction.counts_of_heads
    is_fitted = torch.zeros(n_heads, dtype=torch.bool, device=keys.device)
    n_exchanged = torch.zeros(n_heads, dtype=torch.int64, device=keys.device)
    errors = torch.zeros(3, n_heads, dtype=torch.float32, device=keys.device)
    if eviction.n_survivors == 0 or eviction.n_evicted == 0:
        nothing = is_fitted.view(shape), n_exchanged.view(shape), *errors.view(3, *shape)
        return Match(kept_keys.clone(), kept_values.clone(), *nothing)
    survivors, evicted, slots = padded_lists(eviction, n_slots)
    layer = [part.flatten(0, 1) for part in (keys, values, kept_keys, queries, kept_queries)]
    # With a row more behind the last: nowhere.
    new = [torch.cat([kept.flatten(0, 2), kept.new_zeros(1, kept.shape[3])]) for kept in (kept_keys, kept_values)]
    flat_slots = flat_rows(slots, n_slots)
    length = block_length(eviction.n_survivors, eviction.n_evicted)
    n_channels = keys.shape[3] + values.shape[3]

    def bytes_of(n_survivors: int, n_evicted: int) -> int:
        """Keys and values of all positions, also as measured, and the survivors' as they are, and as they become."""
        return 4 * n_channels * 2 * (eviction.k_len + n_survivors)

    for block, n_survivors, n_evicted in alike_heads(counts, bytes_of, keys.device):
        of_sinks = None if sinks is None else sinks.flatten(0, 1)[block]
        lists = survivors[block, :n_survivors], evicted[block, :n_evicted], slots[block, :n_survivors]
        # A head that lost nothing has nothing to do, and its list may be cut short by those that have.
        listed = np.minimum(counts[block], (n_survivors, n_evicted), dtype=np.int64)
        with full_precision(keys.device):
            *matched, of_heads, exchanged = steps.match_heads(
                (*(part[block] for part in layer), of_sinks),  # type: ignore[arg-type]
                lists,
                listed,
                length,
                keys_rewritten=eviction.keys_rewritten,
                key_ridge=key_ridge,
                softcap=softcap,
            )
        matched = [rows.to(kept_keys.dtype) for rows in matched]
        fits = of_heads[1] < sqrt(_MAX_ERROR) * of_heads[2]
        if kept_keys.dtype == torch.float16:  # which may have no room for it
            for rows in matched:
                fits &= rows.sum(dim=(1, 2), dtype=torch.float32).abs() < torch.inf
        is_fitted[block], n_exchanged[block], errors[:, block] = fits, exchanged, of_heads
        is_put = fits[:, None] & (lists[2] < n_slots)
        to_row = torch.where(is_put, flat_slots[block, : is_put.shape[1]], n_heads * n_slots).flatten()
        for kept, rows in zip(new, matched):
            kept.index_copy_(0, to_row, rows.flatten(0, 1))
    return Match(
        new[0][:-1].view(kept_keys.shape),
        new[1][:-1].view(kept_values.shape),
        is_fitted.view(shape),
        n_exchanged.view(shape),
        *errors.view(3, *shape),
    )


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
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> Match:
    """
    :func:`attention_match` as one would write it down: head by head, in float64.
    """
    new_keys, new_values = kept_keys.clone(), kept_values.clone()
    is_fitted = torch.zeros(kept_keys.shape[:2], dtype=torch.bool)
    n_exchanged = torch.zeros(kept_keys.shape[:2], dtype=torch.int64)
    eviction_error, matching_error, output_norm = torch.zeros(3, *kept_keys.shape[:2], dtype=torch.float32)
    for b, h, survivors, slots, evicted in eviction.heads():
        if len(survivors) == 0 or len(evicted) == 0:
            continue
        all_keys, all_values = keys[b, h].double(), values[b, h].double()
        q, kept_q = queries[b, h].double(), kept_queries[b, h].double()
        old_keys, old_values = kept_keys[b, h, slots].double(), kept_values[b, h, slots].double()

        logits = steps.cap(q @ all_keys[torch.cat([survivors, evicted])].T, softcap)
        normalizer = logits.logsumexp(dim=1, keepdim=True)
        if sinks is not None:
            normalizer = torch.logaddexp(normalizer, sinks[b, h, :, None].double())
        kept_mass, lost_mass = (logits - normalizer).exp().split([len(survivors), len(evicted)], dim=1)
        full_mass = kept_mass.sum(dim=1) + lost_mass.sum(dim=1)
        output = kept_mass @ all_values[survivors] + lost_mass @ all_values[evicted]
        raw_logits = kept_q @ old_keys.T
        mass = (steps.cap(raw_logits, softcap) - normalizer).exp()
        error_of_eviction = _naive_squared_error(output - mass @ old_values, mass.sum(dim=1) - full_mass, output)

        lost = (output - mass @ old_values).square().sum(dim=1)
        weight = (1 + lost / lost.mean().clamp(min=steps.TINY)) / 2
        identity = torch.eye(q.shape[1], dtype=q.dtype)
        gram = q.T @ (weight[:, None] * q)
        some_values = all_values[torch.cat([survivors, evicted])]
        centres, place = naive_clusters(
            all_keys,
            all_values,
            survivors,
            evicted,
            gram + steps.METRIC_RIDGE * gram.diagonal().mean() * identity,
            (steps.VALUE_WEIGHT * len(q) * len(some_values)) ** 0.5 / some_values.norm().clamp(min=steps.MIN_NORM),
            block_length(eviction.n_survivors, eviction.n_evicted),
            exchange=not eviction.keys_rewritten,
        )
        n_exchanged[b, h] = (~torch.isin(centres, survivors)).sum()
        fitted_values, pull = old_values.clone(), torch.zeros_like(old_keys)
        all_mass = torch.zeros(len(q), len(all_keys), dtype=q.dtype)
        all_mass[:, survivors], all_mass[:, evicted] = kept_mass, lost_mass
        growth = torch.zeros_like(kept_mass)
        for j in range(len(survivors)):
            share = all_mass[:, place == j].mean(dim=0) + steps.MIN_SHARE
            share /= share.sum()
            fitted_values[j] = share @ all_values[place == j]
            if not eviction.keys_rewritten:
                pull[j] = share @ all_keys[place == j] - old_keys[j]
            growth[:, j] = all_mass[:, place == j].sum(dim=1) + steps.MIN_MASS
        growth = (growth / (mass + steps.MIN_MASS)).log()
        if softcap is not None:
            capped = steps.cap(raw_logits, softcap)
            growth = steps.uncap(capped + growth, softcap) - steps.uncap(capped, softcap)
        weighted_q = weight[:, None] * kept_q
        gram = kept_q.T @ weighted_q
        ridge = key_ridge * gram.diagonal().mean() * identity
        fitted_keys = old_keys + torch.linalg.solve(gram + ridge, weighted_q.T @ growth + ridge @ pull.T).T
        mass = (steps.cap(kept_q @ fitted_keys.T, softcap) - normalizer).exp()

        error_of_fit = _naive_squared_error(output - mass @ fitted_values, mass.sum(dim=1) - full_mass, output)
        is_fitted[b, h] = error_of_fit < _MAX_ERROR * output.square().sum()
        eviction_error[b, h], matching_error[b, h] = error_of_eviction.sqrt(), error_of_fit.sqrt()
        output_norm[b, h] = output.norm()
        if is_fitted[b, h]:
            new_keys[b, h, slots] = fitted_keys.to(keys.dtype)
            new_values[b, h, slots] = fitted_values.to(values.dtype)
    return Match(new_keys, new_values, is_fitted, n_exchanged, eviction_error, matching_error, output_norm)


def _naive_squared_error(residual: torch.Tensor, missing: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return residual.square().sum() + (missing[:, None] * output).square().sum()
