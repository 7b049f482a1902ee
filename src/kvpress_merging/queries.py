# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Reference queries of a layer: what its own context would ask, from where the context ends."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn

# Positions are the n equal steps of (0, 1) raised to this power, times the length: denser towards the end, whose
# queries are most like those that will be asked.
_CROWDING = 2 / 3


@lru_cache(maxsize=32)
def reference_positions(q_len: int, n_queries: int, device: torch.device) -> torch.Tensor:
    """
    Positions to take reference queries from: over the whole context of ``q_len``, denser towards its end.

    They are int64, of shape ``(min(n_queries, q_len),)``, ascending. All who ask for the same share them: not to be
    written.
    """
    if n_queries >= q_len:
        return torch.arange(q_len, device=device)
    steps = (torch.arange(n_queries, device=device, dtype=torch.float64) + 0.5) / n_queries
    # Even steps where the last ones would otherwise meet at one position.
    power = _CROWDING if n_queries <= _CROWDING * q_len else 1.0
    return (q_len * steps**power).long()


def prerope_queries(module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    Queries of a layer before RoPE, one per position and KV head.

    Each KV head serves a group of query heads; position after position takes the next of them in turn. So n positions
    give n different queries for the price of n, and every query head has its say. The number of heads is read off what
    the projection made, so that a layer split over several devices works with the heads it has.

    Parameters
    ----------
    module : nn.Module
        An attention layer; its ``q_norm``, as Qwen3 and Gemma3 have it, is applied.
    hidden_states : torch.Tensor
        Its input at the chosen positions, shape ``(bsz, n, hidden_dim)``.

    Returns
    -------
    torch.Tensor
        float32, shape ``(bsz, num_key_value_heads, n, head_dim)``, not scaled.

    Raises
    ------
    TypeError
        If the layer makes its queries neither by ``q_proj`` nor, as Phi3, by ``qkv_proj``.
    """
    projection = getattr(module, "q_proj", getattr(module, "qkv_proj", None))
    if projection is None:
        raise TypeError(f"{type(module).__name__} has neither q_proj nor qkv_proj to make reference queries with")
    bsz, n, _ = hidden_states.shape
    projected = projection(hidden_states.flatten(0, 1))
    head_dim, n_channels = int(module.head_dim), projected.shape[-1]  # type: ignore[arg-type]
    n_groups = int(module.num_key_value_groups)  # type: ignore[arg-type]
    if not hasattr(module, "q_proj"):
        # Queries, keys and values side by side, n_groups : 1 : 1 in heads.
        projected = projected[..., : n_channels * n_groups // (n_groups + 2)]
    queries = projected.reshape(bsz, n, -1, n_groups, head_dim)
    turn = _turns(n, n_groups, queries.device)[:, None, None, None]
    queries = queries.gather(3, turn.expand(bsz, -1, queries.shape[2], 1, head_dim)).squeeze(3)
    if hasattr(module, "q_norm"):
        queries = module.q_norm(queries)  # type: ignore[operator]
    return queries.transpose(1, 2).float()


@lru_cache(maxsize=32)
def _turns(n: int, n_groups: int, device: torch.device) -> torch.Tensor:
    """Which query head of each group has its say at each of n positions, int64, shape ``(n,)``; not to be written."""
    return torch.arange(n, device=device) % n_groups


def query_scaling(module: nn.Module) -> float:
    """What a layer multiplies products of queries and keys by: they are attention logits then."""
    return float(getattr(module, "scaling", int(module.head_dim) ** -0.5))  # type: ignore[arg-type]


def rotate(queries: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scaling: float) -> torch.Tensor:
    """
    RoPE: queries as they are when asked at another position, times ``scaling``.

    ``queries``, float32, have the shape ``(bsz, num_key_value_heads, n, head_dim)``; ``cos`` and ``sin`` are those of
    that position, ``(bsz or 1, rotary_dim)``. Where ``rotary_dim`` is less than ``head_dim`` the rest is not rotated.
    """
    rotary_dim = cos.shape[-1]
    turned, rest = queries[..., :rotary_dim], queries[..., rotary_dim:]
    first, second = turned.chunk(2, dim=-1)
    cos, sin = cos.float()[:, None, None], sin.float()[:, None, None]
    rotated = torch.addcmul(queries.new_zeros(()), turned, cos, value=scaling)
    for half, other, its_sin, sign in zip(rotated.chunk(2, dim=-1), (second, first), sin.chunk(2, dim=-1), (-1, 1)):
        half.addcmul_(other, its_sin, value=sign * scaling)
    return torch.cat([rotated, rest * scaling], dim=-1) if rest.shape[-1] else rotated
