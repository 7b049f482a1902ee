# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""AttentionMatchingPress: change the survivors so that attention over them gives what the full cache gave."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from transformers import Cache

from kvpress_merging.checks import check_int, check_number, rotates_keys
from kvpress_merging.eviction import Eviction
from kvpress_merging.following.model import layer_index
from kvpress_merging.kernels.match import attention_match
from kvpress_merging.merge_on_evict_press import MergeOnEvictPress
from kvpress_merging.queries import Asked, ask
from kvpress_merging.reference import MAX_RECENT, LayerQueries, sample, turns

# How far the key that a layer makes again of its last token may be from the one in the cache, relative to its norm:
# what 16 bits, or a quantized layer, make of it; and what a quantized cache may.
_MAX_KEY_ERROR, _MAX_QUANTIZED_KEY_ERROR = 0.1, 1.0

# Layers that have been asked for their queries, and whose answers were right.
_SERVED: WeakSet[nn.Module] = WeakSet()


@dataclass
class AttentionMatchingPress(MergeOnEvictPress):
    """
    Match attention on evict: shift the survivors' keys and values so that attention over them gives what it gave.

    The layer is asked for a few reference queries: those of positions all over its own input, as it would ask them from
    where the context ends. Where two survivors are almost the same, one gives its place to an evicted position that is
    like no survivor; everything else is counted to the position nearby, of those that have a place, whose key and value
    are most like its own. That one becomes the mean of what it now stands for, keys and values, weighted by attention;
    a ridge regression then shifts its key from that mean so far that it attracts what those counted to it did, as the
    reference queries see it. How many positions survive is the inner press's choice alone, and which, but for those
    that gave their place away. See :func:`kvpress_merging.kernels.match.attention_match`.

    After [Fast KV Compaction via Attention Matching](https://arxiv.org/abs/2602.16284), which fits a bias per key where
    this shifts the key, so that no attention kernel has to change, and values by regression where these are means;
    [KeepKV](https://arxiv.org/abs/2504.09936) tells why the mass matters.

    Parameters
    ----------
    press : BasePress
        The press whose evictions are made good for: any press that evicts positions.
    n_queries : int, default=96
        Reference queries per KV head, each from a position of its own unless the context is shorter, at least 1. More
        fit better and cost more.
    key_ridge : float, default=0.1
        How strongly keys are held at the mean of what they stand for, above 0, in units of the mean squared query.

    Raises
    ------
    TypeError, ValueError
        If a field has a wrong type or value, at construction and when it is set. At an eviction, a ValueError if a
        layer does not tell its queries: its attention is none of transformers' attention functions, adds to its logits
        what its keys and queries do not tell, or does not make the last token's key again as the cache has it.

    Notes
    -----
    The last token's key is read from the device at a layer's first eviction in the life of a process, and where a press
    evicts after the forward pass; nothing else is.

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
        """Keep what a prefill's reference queries are made of, and the last tokens of what follows."""
        hidden_states = kwargs["hidden_states"].detach()
        given = {name: None if _is_left_out(name, value) else value for name, value in kwargs.items()}
        del given["hidden_states"]
        if is_prefill or module not in self._queries:
            self._queries[module] = LayerQueries(given)
            state, q_len = self._memory.states[module], hidden_states.shape[1]
            is_whole = q_len == state.context_length
            if is_whole or q_len > MAX_RECENT:
                is_padding = state.is_padding if is_whole else None
                self._queries[module].context = sample(hidden_states, is_padding, self.n_queries)
                return
        self._queries[module].kwargs = given
        self._queries[module].add(hidden_states)

    def rearrange(self, module: nn.Module, rows: torch.Tensor | None, n_cut: int) -> None:
        """Follow a cache whose rows were moved, or whose end was cut off, between two forward passes."""
        if module in self._queries and rows is not None:
            self._queries[module].move(rows)
        if module in self._queries and n_cut:
            self._queries[module].cut(n_cut)

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
        seen, state = self._queries[module], self._memory.states[module]
        inputs = seen.hidden_states()
        asked = self._ask(module, inputs, seen.kwargs, -1)
        # Where another press has evicted before this one, the last token's key is no longer where it was.
        has_all = keys.shape[2] >= state.k_len
        if has_all and (module not in _SERVED or hidden_states is None):
            max_error = _MAX_QUANTIZED_KEY_ERROR if state.is_quantized else _MAX_KEY_ERROR
            if _is_far(asked.key[:, :, -1], keys[:, :, state.k_len - 1], max_error):
                raise self._not_served(module, "the key that it makes again of its last token is not the cache's")
            _SERVED.add(module)
        heads = turns(inputs.shape[1] - 1, asked.query.shape[1] // asked.key.shape[1], keys.device)
        queries, sinks = asked.of_heads(heads)
        kept_queries = queries
        if eviction.keys_rewritten:
            if rotates_keys(self.press):
                kept_queries, _ = self._ask(module, inputs, seen.kwargs, kept_keys.shape[2] - 1).of_heads(heads)
            kept_queries = kept_queries * (kept_keys != 0).any(dim=2, keepdim=True)
        match = attention_match(
            keys,
            values,
            kept_keys,
            kept_values,
            queries,
            kept_queries,
            eviction,
            key_ridge=self.key_ridge,
            softcap=asked.softcap,
            sinks=sinks,
        )
        self.report.record_fit(
            layer_index(module),
            eviction,
            match.is_fitted,
            match.n_exchanged,
            match.eviction_error,
            match.matching_error,
            match.output_norm,
            n_queries=queries.shape[2],
        )
        return match.keys, match.values

    def _ask(self, module: nn.Module, hidden_states: torch.Tensor, kwargs: dict[str, Any], position: int) -> Asked:
        """What the layer makes of these at a position, or a ValueError that names it."""
        try:
            asked = ask(module, hidden_states, kwargs, position)
        except Exception as error:
            if module in _SERVED or isinstance(error, torch.OutOfMemoryError):
                raise
            raise self._not_served(module, f"it cannot run on a few positions alone ({error})") from error
        if asked is None:
            raise self._not_served(module, "its attention is none of transformers' attention functions")
        if asked.attention_mask is not None:
            raise self._not_served(module, "it adds to its logits what its keys and queries do not tell")
        return asked

    def _not_served(self, module: nn.Module, reason: str) -> ValueError:
        model = getattr(getattr(module, "config", None), "model_type", "this model")
        return ValueError(
            f"{type(self).__name__} cannot ask layer {layer_index(module)} of {model} ({type(module).__name__}) for "
            f"its queries: {reason}; MergingPress works there"
        )


def _is_left_out(name: str, value: Any) -> bool:
    """Whether an argument of a forward pass is its mask or its cache, which a layer that is asked goes without."""
    return name == "attention_mask" or isinstance(value, Cache)


def _is_far(key: torch.Tensor, cached: torch.Tensor, max_error: float) -> bool:
    """Whether keys of one position, ``(bsz, num_key_value_heads, head_dim)``, differ; not where they are no numbers."""
    if key.shape != cached.shape:
        return True
    error = torch.linalg.vector_norm(key.float() - cached.float(), dim=(1, 2))
    is_far = error > max_error * torch.linalg.vector_norm(cached.float(), dim=(1, 2))
    return not is_far.is_meta and bool(is_far.any())
