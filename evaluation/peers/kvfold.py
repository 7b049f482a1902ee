# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""kvfold: fold what a press evicts into the most similar survivors, and let them attract its attention too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from evaluation.peers.scored_press import ScoredPress, gather_rows, put_rows, real_entries
from kvpress_merging import Eviction
from kvpress_merging.following.model import layer_index
from kvpress_merging.kernels.nearest import nearest_survivors

SCORE_MAPS = ("auto", "log", "z", "identity")
"""The allowed values of ``score_map``."""

# Where these are cut off in the original.
_MAX_LOG_WEIGHT = 30.0
_MIN_SCORE = 1e-30
_LOG_MASS_OF_NO_NUMBER = -1e4


@dataclass
class KVFoldPress(ScoredPress):
    """
    kvfold's rule: the weight of a merge is how much more or less the press thought of one position than of the other.

    Each evicted position ``j`` goes to the survivor ``i`` of its head with the most cosine-similar key, the first
    ``n_sink`` positions left out, with the weight ``w_j = exp(s_j - s_i)``, ``s`` being the press's own score as the
    logarithm of a mass. Then ``v'_i = (v_i + sum_j w_j v_j) / (1 + sum_j w_j)``, and ``log(1 + sum_j w_j)`` is added to
    the logit of ``i`` whenever attention reads the cache, which ``logit_bias.py`` does. Keys stay as they are.

    By the source of [kvfold](https://github.com/jg-codes/kvfold) (``MassFold`` in its ``MergingAnyPress``, October
    2026), read and written anew. Not built: its gate, a switch for whole tasks that reads the context; the choice of
    targets to leave out beyond the sinks; sums in a fixed order. Presses that evict while decoding it passes by, and so
    does our registry.

    Parameters
    ----------
    press : BasePress
        The press whose evictions are folded: any that scores all positions of a layer.
    score_map : str, default="auto"
        How a score becomes ``s``: ``"log"``; ``"z"``, its z-score in the head; ``"identity"``, for scores that are
        logarithms already, as KVzap's; ``"auto"`` takes the logarithm where no score of the layer is negative, else z.
    n_sink : int, default=4
        How many positions at the start take nothing.

    Raises
    ------
    ValueError
        If ``score_map`` is none of these, asks for the logarithm of negative scores, or the press gives no scores.
    """

    score_map: str = "auto"
    n_sink: int = 4

    _logit_bias: dict[int, torch.Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)

    def _check_field(self, name: str, value: Any) -> None:
        super()._check_field(name, value)
        if name == "score_map" and value not in SCORE_MAPS:
            raise ValueError(f"score_map must be one of {', '.join(map(repr, SCORE_MAPS))}, got {value!r}")

    @property
    def logit_bias(self) -> Mapping[int, torch.Tensor]:
        """
        What the last context left of each layer to be added to the logits of its slots.

        By layer, float32, shape ``(bsz, num_key_value_heads, n_slots)``. The next context starts another mapping.
        """
        return self._logit_bias

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[None]:
        """Apply the inner press to ``model`` and fold what it evicts. The bias acts in ``biased_attention`` alone."""
        self._logit_bias = {}
        with super().__call__(model):
            yield

    def observe(self, module: nn.Module, kwargs: dict[str, Any], is_prefill: bool) -> None:
        """Forget what another context left of the layer."""
        super().observe(module, kwargs, is_prefill)
        if is_prefill:
            self._logit_bias.pop(layer_index(module), None)

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
        """Fold; see the class."""
        log_mass = self._log_mass(self.scores_of(module, keys))
        is_survivor, is_evicted = real_entries(eviction)
        # A sink that survived is left out of the search. One that was evicted goes to another position.
        may_move = values.isfinite().all(dim=-1)
        sinks = torch.where(is_survivor & (eviction.survivors < self.n_sink), eviction.survivors, eviction.k_len)
        is_sink = torch.zeros(*may_move.shape[:2], eviction.k_len + 1, dtype=torch.bool, device=keys.device)
        may_move &= ~is_sink.scatter_(-1, sinks, True)[..., :-1]
        similarity, target = nearest_survivors(keys, may_move, eviction)
        is_folded = is_evicted & (similarity > -torch.inf)

        log_weight = log_mass.gather(-1, eviction.evicted) - log_mass.gather(-1, eviction.survivors).gather(-1, target)
        weight = log_weight.clamp(max=_MAX_LOG_WEIGHT).exp().where(is_folded, 0.0)
        moved = gather_rows(values, eviction.evicted).float().where(is_folded[..., None], 0.0) * weight[..., None]
        total_weight = torch.zeros(eviction.survivors.shape, device=keys.device).scatter_add_(-1, target, weight)
        total = torch.zeros(*eviction.survivors.shape, values.shape[-1], device=keys.device)
        total.scatter_add_(2, target[..., None].expand_as(moved), moved)

        takes = total_weight > 0
        folded = (gather_rows(kept_values, eviction.slots).float() + total) / (1 + total_weight[..., None])
        bias = torch.zeros(*kept_values.shape[:3], 1, device=keys.device)
        bias = put_rows(bias, eviction.slots, takes, total_weight.log1p()[..., None])
        self._logit_bias[layer_index(module)] = bias.squeeze(-1)
        return kept_keys, put_rows(kept_values, eviction.slots, takes, folded)

    def _log_mass(self, scores: torch.Tensor) -> torch.Tensor:
        score_map, is_negative = self.score_map, bool((scores < 0).any())
        if score_map == "auto":
            score_map = "z" if is_negative else "log"
        if score_map == "log":
            if is_negative:
                raise ValueError(f"score_map='log' needs scores that are not negative, unlike {self.press}'s: use 'z'")
            scores = scores.clamp(min=_MIN_SCORE).log()
        elif score_map == "z":
            deviation = scores.std(dim=-1, keepdim=True).clamp(min=1e-6)
            scores = (scores - scores.mean(dim=-1, keepdim=True)) / deviation
        return scores.where(scores.isfinite(), _LOG_MASS_OF_NO_NUMBER)
