# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""AttentionMatchingPress: change the survivors so that attention over them gives what the full cache gave."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import nn

from kvpress_merging.checks import check_int, check_number, rotates_keys
from kvpress_merging.eviction import Eviction
from kvpress_merging.following.model import layer_index
from kvpress_merging.kernels.match import Match, attention_match
from kvpress_merging.merge_on_evict_press import MergeOnEvictPress
from kvpress_merging.queries import prerope_queries, query_scaling, reference_positions, rotate

Rotation: TypeAlias = tuple[torch.Tensor, torch.Tensor, float]
"""Cosines and sines of one position, each of shape ``(bsz or 1, rotary_dim)``, and the layer's scaling of queries."""

# Tokens seen after the prefill whose queries join those of the context when a press evicts while decoding.
_MAX_RECENT = 64


@dataclass
class LayerQueries:
    """What one layer's reference queries are made of, as long as it works on one cache."""

    # Queries of the context before RoPE, float32, shape (bsz, num_key_value_heads, n, head_dim): one of all rows of the
    # batch or, where rows have padding, one of each, with bsz 1 and an n of its own.
    context: list[torch.Tensor]
    # Of the last token seen.
    rotation: Rotation
    # Hidden states of the tokens that followed the context, each of shape (bsz, 1, hidden_dim).
    recent: deque[torch.Tensor] = field(default_factory=lambda: deque(maxlen=_MAX_RECENT))

    def queries(self, module: nn.Module) -> list[torch.Tensor]:
        """Queries before RoPE: the context's, and those of the tokens seen since."""
        if not self.recent:
            return self.context
        recent = prerope_queries(module, torch.cat(tuple(self.recent), dim=1))
        return [torch.cat(parts, dim=2) for parts in zip(self.context, recent.chunk(len(self.context)))]


@dataclass
class AttentionMatchingPress(MergeOnEvictPress):
    """
    Match attention on evict: shift the survivors' keys and values so that attention over them gives what it gave.

    A few reference queries are made of the layer's own input and rotated to where the context ends. Each evicted
    position is counted to the survivor nearby whose key and value are most like its own. The survivor becomes the mean
    of what it now stands for, keys and values, weighted by attention; a ridge regression then shifts its key from that
    mean so far that it attracts what those counted to it did, as the reference queries see it. Which positions survive
    is the inner press's choice alone. See :func:`kvpress_merging.kernels.match.attention_match`.

    After [Fast KV Compaction via Attention Matching](https://arxiv.org/abs/2602.16284), which fits a bias per key where
    this shifts the key, so that no attention kernel has to change, and values by regression where these are means;
    [KeepKV](https://arxiv.org/abs/2504.09936) tells why the mass matters.

    Parameters
    ----------
    press : BasePress
        The press whose evictions are made good for: any press that evicts positions.
    n_queries : int, default=96
        Reference queries per KV head, each from a position of its own, at least 1. More fit better and cost more.
    key_ridge : float, default=0.1
        How strongly keys are held at the mean of what they stand for, above 0, in units of the mean squared query.

    Raises
    ------
    TypeError, ValueError
        If a field has a wrong type or value, at construction and when it is set.

    Examples
    --------
    >>> import torch
    >>> from kvpress import KnormPress
    >>> from kvpress_merging import AttentionMatchingPress
    >>> from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    >>> model, cache = LlamaForCausalLM(config), DynamicCache()
    >>> press = AttentionMatchingPress(KnormPress(compression_ratio=0.5), n_queries=64)
    >>> with torch.no_grad(), press(model):
    ...     _ = model(torch.arange(40)[None], past_key_values=cache)
    >>> cache.get_seq_length()
    20
    >>> press.report.to_frame()["heads"].tolist()  # that lost positions; "heads_fitted" of them took the fit
    [2, 2]
    """

    n_queries: int = 96
    key_ridge: float = 0.1

    _queries: WeakKeyDictionary[nn.Module, LayerQueries] = field(
        init=False, repr=False, compare=False, default_factory=WeakKeyDictionary
    )

    def _check_field(self, name: str, value: Any) -> None:
        super()._check_field(name, value)
        if name == "n_queries":
            check_int(name, value, min_value=1)
        if name == "key_ridge" and not 0 < check_number(name, value) < float("inf"):
            raise ValueError(f"{name} must be above 0 and finite, got {value!r}")

    @torch.no_grad()
    def observe(self, module: nn.Module, kwargs: dict[str, Any], is_prefill: bool) -> None:
        """Keep the queries of a prefill, sampled, and the last tokens of what follows."""
        hidden_states, rotation = kwargs["hidden_states"], _rotation_at(module, kwargs, -1)
        if is_prefill or module not in self._queries:
            self._queries[module] = LayerQueries(self._sample(module, hidden_states), rotation)
        else:
            self._queries[module].recent.extend(hidden_states[:, -_MAX_RECENT:].detach().split(1, dim=1))
            self._queries[module].rotation = rotation

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
        """Re-fit; see the class. Where a press pruned channels of the survivors' keys, they stay pruned."""
        prerope, rotation = self._queries[module].queries(module), self._queries[module].rotation
        kept_rotation = None  # as rotation
        if eviction.keys_rewritten and rotates_keys(self.press):
            kept_rotation = _rotation_at(module, kwargs, kept_keys.shape[2] - 1)

        if len(prerope) == 1:
            layer = keys, values, kept_keys, kept_values
            match = self._match(layer, prerope[0], rotation, kept_rotation, eviction)
        else:
            matches = []
            for row, row_prerope in enumerate(prerope):
                one = slice(row, row + 1)
                layer = keys[one], values[one], kept_keys[one], kept_values[one]
                rotations = _of_row(rotation, one), kept_rotation and _of_row(kept_rotation, one)
                matches.append(self._match(layer, row_prerope, *rotations, eviction.of_row(row)))
            match = Match(*(torch.cat([getattr(m, f.name) for m in matches]) for f in fields(Match)))
        self.report.record_fit(
            layer_index(module),
            eviction,
            match.is_fitted,
            match.eviction_error,
            match.matching_error,
            match.output_norm,
        )
        return match.keys, match.values

    def _match(
        self,
        layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        prerope: torch.Tensor,
        rotation: Rotation,
        kept_rotation: Rotation | None,
        eviction: Eviction,
    ) -> Match:
        queries = kept_queries = rotate(prerope, *rotation).contiguous()
        if eviction.keys_rewritten:
            if kept_rotation is not None:
                kept_queries = rotate(prerope, *kept_rotation).contiguous()
            kept_queries = kept_queries * (layer[2] != 0).any(dim=2, keepdim=True)
        return attention_match(*layer, queries, kept_queries, eviction, key_ridge=self.key_ridge)

    def _sample(self, module: nn.Module, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        """Queries at the reference positions of each row's tokens."""
        is_padding = self._memory.states[module].is_padding
        q_len, device = hidden_states.shape[1], hidden_states.device
        if is_padding is None or is_padding.shape[1] != q_len:
            positions = reference_positions(q_len, self.n_queries, device)
            return [prerope_queries(module, hidden_states[:, positions])]
        return [
            prerope_queries(module, row[None, tokens[reference_positions(len(tokens), self.n_queries, device)]])
            for row, tokens in zip(hidden_states, self._memory.padding.tokens(is_padding))
        ]


def _of_row(rotation: Rotation, one: slice) -> Rotation:
    cos, sin = (part if part.shape[0] == 1 else part[one] for part in rotation[:2])
    return cos, sin, rotation[2]


def _rotation_at(module: nn.Module, kwargs: dict[str, Any], position: int) -> Rotation:
    """Of one position of a forward pass."""
    if kwargs.get("position_embeddings") is None:
        raise ValueError(
            f"{type(module).__name__} is not given position_embeddings (cos, sin), so its queries cannot be rotated to "
            "where the context ends: AttentionMatchingPress needs a model with rotary embeddings"
        )
    cos, sin = kwargs["position_embeddings"]
    return cos[:, position], sin[:, position], query_scaling(module)
