# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""GRKV: one ridge regression of the survivors' values, then one of their keys, on the full cache's attention output."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from kvpress.utils import get_prerope_query_states
from torch import nn
from transformers.models.llama.modeling_llama import rotate_half

from evaluation.peers.scored_press import ScoredPress, gather_rows, put_rows, real_entries
from kvpress_merging import Eviction
from kvpress_merging.following.model import layer_index

# As in the original's one configuration.
_TOTAL_WEIGHT = 6.0  # of all queries
_MAX_ITERATIONS = 16  # of conjugate gradients
_MAX_SHRINKS = 4

_TINY = 1e-30


@dataclass
class GRKVPress(ScoredPress):
    """
    GRKV's rule: move the survivors so that attention over them gives what attention over the full cache gave.

    Of the context, ``query_count`` evenly spread positions lend their queries, of all query heads, rotated to the
    context's last position. Values are shifted by the ridge regression of what attention over the survivors lacks;
    then keys by that of what it still lacks, linearized, by at most 16 steps of conjugate gradients. Each shift is cut
    to a share of the norm of what may move in its head. A layer takes values alone, both or neither, as leaves the
    least weighted squared error plus ridge. The last ``window`` positions and, in each head, the best-scored share
    ``guard`` of the others that survived stay as they are.

    By the source of [GRKV](https://github.com/pjunjie/GRKV) v0.3.0 (``GRKVDefaultPress`` for Llama, arXiv
    [2605.31105](https://arxiv.org/abs/2605.31105), EMNLP 2026), read and written anew. Not built: its selection, a
    Critical-AdaKV, since here any press selects, at any ratio; its Triton kernels; the paper's variant for spans. The
    queries are made here by the layer's ``q_proj`` (and ``q_norm``), as Llama-like models make them, where the original
    takes them out of the forward pass. For batches without padding.

    Parameters
    ----------
    press : BasePress
        The press whose evictions are made good for: any that scores all positions of a layer and leaves keys where
        they were.
    query_count : int, default=32
        Queries of each query head.
    ridge : float, default=0.01
        How strongly keys and values are held where they were.
    value_cap, key_cap : float, default=0.1 and 0.025
        How far values and keys of a head may move, as a share of their norm.
    guard : float, default=0.1
        Share of the survivors that stays as it is, the best-scored first.
    window : int, default=32
        Positions at the end that stay as they are.

    Raises
    ------
    ValueError
        If the press gives no scores, or rotates keys to other positions.
    """

    query_count: int = 32
    ridge: float = 0.01
    value_cap: float = 0.1
    key_cap: float = 0.025
    guard: float = 0.1
    window: int = 32

    # By layer, float32, shape (bsz, num_key_value_heads, num_key_value_groups * query_count, head_dim).
    _queries: dict[int, torch.Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)

    @torch.no_grad()
    def observe(self, module: nn.Module, kwargs: dict[str, Any], is_prefill: bool) -> None:
        """Make the queries of a context."""
        super().observe(module, kwargs, is_prefill)
        if not is_prefill:
            return
        hidden_states, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        bsz, q_len, _ = hidden_states.shape
        positions = stratified_positions(q_len, min(self.query_count, q_len)).to(hidden_states.device)
        queries = get_prerope_query_states(module, hidden_states[:, positions]).float()
        cos, sin = cos[:, None, -1:].float(), sin[:, None, -1:].float()
        queries = queries * cos + rotate_half(queries) * sin
        num_key_value_heads = queries.shape[1] // int(module.num_key_value_groups)  # type: ignore[arg-type]
        self._queries[layer_index(module)] = queries.reshape(bsz, num_key_value_heads, -1, queries.shape[-1])

    @torch.no_grad()
    def fold(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        kept_keys: torch.Tensor,
        kept_values: torch.Tensor,
        eviction: Eviction,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fit; see the class."""
        if eviction.keys_rewritten:
            raise ValueError(f"GRKVPress fits keys where the context put them, and {self.press} writes others")
        is_survivor, _ = real_entries(eviction)
        scores = self.scores_of(module, keys).gather(-1, eviction.survivors)
        is_before_window = is_survivor & (eviction.survivors < eviction.k_len - self.window)
        n_fixed = (is_before_window.sum(dim=-1, keepdim=True).double() * self.guard).long()
        rank = scores.where(is_before_window, -torch.inf).argsort(dim=-1, descending=True).argsort(dim=-1)
        is_free = is_before_window & (rank >= n_fixed)

        queries = self._queries[layer_index(module)]
        scaling = float(getattr(module, "scaling", queries.shape[-1] ** -0.5))
        _, full_output = _attention(queries, keys.float(), values.float(), None, scaling)
        keys, values = (gather_rows(kept, eviction.slots) for kept in (kept_keys, kept_values))
        weight = _TOTAL_WEIGHT * int(module.num_key_value_groups) / queries.shape[2]  # type: ignore[arg-type]
        new_keys, new_values = self._fit(queries * scaling, full_output, keys, values, is_survivor, is_free, weight)
        return (
            put_rows(kept_keys, eviction.slots, is_free, new_keys),
            put_rows(kept_values, eviction.slots, is_free, new_values),
        )

    def _fit(
        self,
        queries: torch.Tensor,
        full_output: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        is_survivor: torch.Tensor,
        is_free: torch.Tensor,
        weight: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The regression.

        With ``A`` the attention weights of the queries over the survivors, ``A'`` its columns that are free, ``w`` the
        ``weight``, ``r`` what the output lacks: values move by ``sqrt(w) A'^T x`` with
        ``(w A' A'^T + ridge) x = sqrt(w) r``, and keys likewise with the output's derivative by the keys in place of
        ``A'``.

        Parameters
        ----------
        queries, full_output : torch.Tensor
            Scaled queries, and the output of attention over the full cache, float32, shape
            ``(bsz, num_key_value_heads, n, head_dim)``.
        keys, values : torch.Tensor
            The survivors', any float dtype, shape ``(bsz, num_key_value_heads, n_survivors, head_dim)``.
        is_survivor, is_free : torch.Tensor
            Which of them are no padding, and which may move, bool, shape ``(bsz, num_key_value_heads, n_survivors)``.
        weight : float
            Weight of the squared error of one query.

        Returns
        -------
        tuple of torch.Tensor
            New keys and values, float32, in the survivors' places.
        """
        dtype, keys, values = keys.dtype, keys.float(), values.float()
        free = is_free[:, :, None].float()

        attention, output = _attention(queries, keys, values, is_survivor)
        moving = attention * free * weight**0.5
        gram = moving @ moving.transpose(-1, -2)
        gram.diagonal(dim1=-2, dim2=-1).add_(self.ridge)
        shift = moving.transpose(-1, -2) @ torch.linalg.solve(gram, (full_output - output) * weight**0.5)
        new_values = _capped(values, shift, is_free, self.value_cap, dtype)

        output = attention @ new_values
        shift = self._key_shift(queries, attention * free, new_values, output, full_output - output, weight)
        new_keys = _capped(keys, shift, is_free, self.key_cap, dtype)

        states = [(keys, values), (keys, new_values), (new_keys, new_values)]
        objectives = []
        for state in states:
            error = (_attention(queries, *state, is_survivor)[1] - full_output).square().sum(dim=(1, 2, 3))
            moved = sum((new - old).square().sum(dim=(1, 2, 3)) for new, old in zip(state, (keys, values)))
            objectives.append((weight * error + self.ridge * moved).nan_to_num(torch.inf, torch.inf))
        best = torch.stack(objectives).argmin(dim=0)
        rows = torch.arange(len(best), device=best.device)
        return tuple(torch.stack(kind)[best, rows] for kind in zip(*states))  # type: ignore[return-value]

    def _key_shift(
        self,
        queries: torch.Tensor,
        attention: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        residual: torch.Tensor,
        weight: float,
    ) -> torch.Tensor:
        """Conjugate gradients on the dual, one system for the heads of a row of the batch, as in the original."""

        def derivative(shift: torch.Tensor) -> torch.Tensor:
            weighted = attention * (queries @ shift.transpose(-1, -2))
            return weighted @ values - weighted.sum(dim=-1, keepdim=True) * output

        def adjoint(dual: torch.Tensor) -> torch.Tensor:
            pull = dual @ values.transpose(-1, -2) - (dual * output).sum(dim=-1, keepdim=True)
            return (attention * pull).transpose(-1, -2) @ queries

        def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a * b).sum(dim=(1, 2, 3), keepdim=True)

        remainder = residual * weight**0.5
        dual, direction = torch.zeros_like(remainder), remainder
        size = inner(remainder, remainder)
        for _ in range(_MAX_ITERATIONS):
            applied = weight * derivative(adjoint(direction)) + self.ridge * direction
            step = size / inner(direction, applied).clamp(min=_TINY)
            dual, remainder = dual + step * direction, remainder - step * applied
            size, before = inner(remainder, remainder), size
            direction = remainder + size / before.clamp(min=_TINY) * direction
        return weight**0.5 * adjoint(dual)


def stratified_positions(q_len: int, n: int) -> torch.Tensor:
    """The middle of each of ``n`` equal parts of a context, int64, shape ``(n,)``."""
    edges = torch.arange(n + 1) * q_len // n
    return (edges[:-1] + edges[1:] - 1) // 2


def _attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    is_there: torch.Tensor | None,
    scaling: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention weights and output; a head without any position attends to nothing."""
    logits = queries @ keys.transpose(-1, -2) * scaling
    if is_there is not None:
        logits = logits.masked_fill(~is_there[:, :, None], -torch.inf)
    attention = logits.softmax(dim=-1)
    if is_there is not None:
        attention = attention.where(is_there[:, :, None], 0.0)
    return attention, attention @ values


def _capped(
    rows: torch.Tensor, shift: torch.Tensor, is_free: torch.Tensor, cap: float, dtype: torch.dtype
) -> torch.Tensor:
    """``rows`` shifted, by at most ``cap`` times their norm in each head also when rounded to ``dtype``, float32."""
    free = is_free[..., None]
    shift = shift.where(free, 0.0)
    limit = cap * torch.linalg.vector_norm(rows * free, dim=(-2, -1), keepdim=True)
    scale = (limit / torch.linalg.vector_norm(shift, dim=(-2, -1), keepdim=True).clamp(min=_TINY)).clamp(max=1)
    for _ in range(1 + _MAX_SHRINKS):
        moved = (rows + scale * shift).to(dtype).float().where(free, rows)
        is_over = torch.linalg.vector_norm(moved - rows, dim=(-2, -1), keepdim=True) > limit
        scale = scale.where(~is_over, 0.9 * scale)
    return moved.where(~is_over, rows)
