# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Merge rules that need the scores by which the press inside evicts, and what both of them do with an eviction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from kvpress import BasePress
from torch import nn
from transformers import PreTrainedModel

from kvpress_merging import Eviction, MergeOnEvictPress
from kvpress_merging.following.model import layer_index
from kvpress_merging.following.tracing import plain
from kvpress_merging.kernels.rows import padded_lists
from kvpress_merging.wrapping import nested_presses


def gives_scores(press: BasePress) -> bool:
    """Whether a press, or one inside it, has a method from which scores come: ``score`` or ``compress_post``."""
    return any(_scoring(inner) for inner in nested_presses(press))


def _scoring(press: BasePress) -> list[str]:
    return [name for name in ("score", "compress_post") if callable(getattr(press, name, None))]


@dataclass
class ScoredPress(MergeOnEvictPress):
    """
    Base of merge rules that need the scores of the press inside.

    They are what its ``score`` gave, before a press around it writes into them, as AdaKVPress does; of several presses
    one in another, the innermost. Of KVzip and its kin, whose scores come of several passes, they are the ``score_val``
    that they evict by. Both are written down as they come, so that no score is computed twice or drawn anew.
    """

    # By layer, float32, shape (bsz, num_key_value_heads, k_len).
    _scores: dict[int, torch.Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)

    def observe(self, module: nn.Module, kwargs: dict[str, Any], is_prefill: bool) -> None:
        """Forget the scores of another context."""
        if is_prefill:
            self._scores.pop(layer_index(module), None)

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[None]:
        """Apply the inner press to ``model``, note its scores, and merge what it evicts."""
        noted = []
        try:
            for press in nested_presses(self.press):
                for name, note in zip(("score", "compress_post"), (self._note_score, self._note_score_val)):
                    if name in _scoring(press):
                        setattr(press, name, note(press, getattr(press, name)))  # before the class's own
                        noted.append((press, name))
            with super().__call__(model):
                yield
        finally:
            for press, name in noted:
                vars(press).pop(name, None)
            self._scores.clear()

    def scores_of(self, module: nn.Module, keys: torch.Tensor) -> torch.Tensor:
        """
        The scores by which positions of a layer were kept or evicted.

        Parameters
        ----------
        module : nn.Module
            The attention layer.
        keys : torch.Tensor
            The whole layer before the eviction, shape ``(bsz, num_key_value_heads, k_len, head_dim)``.

        Returns
        -------
        torch.Tensor
            float32, shape ``(bsz, num_key_value_heads, k_len)``.

        Raises
        ------
        ValueError
            If the press inside gave no score to each of the positions.
        """
        scores = self._scores.get(layer_index(module))
        if scores is None or scores.shape != keys.shape[:3]:
            own, inner = type(self).__name__, type(self.press).__name__
            raise ValueError(
                f"{own} needs a score of each of the {keys.shape[2]} positions, which {inner} did not give in the "
                f"context of {own}: use a press that scores whole layers, or {inner} alone"
            )
        return scores

    def _note(self, layer_idx: int, scores: Any) -> None:
        if isinstance(scores, torch.Tensor):
            self._scores.setdefault(layer_idx, plain(scores).detach().float().clone())

    def _note_score(self, press: Any, score: Callable[..., Any]) -> Callable[..., Any]:
        def noted_score(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            scores = score(module, *args, **kwargs)
            self._note(layer_index(module), scores)
            return scores

        return noted_score

    def _note_score_val(self, press: Any, compress_post: Callable[..., Any]) -> Callable[..., Any]:
        def noted_compress_post(model: PreTrainedModel) -> None:
            compress_post(model)
            for layer_idx, scores in enumerate(press.score_val):
                self._note(layer_idx, scores)

        return noted_compress_post


def real_entries(eviction: Eviction) -> tuple[torch.Tensor, torch.Tensor]:
    """Which entries of ``eviction.survivors`` and of ``eviction.evicted`` are no padding; bool, of their shapes."""
    survivors, evicted = (padded < eviction.k_len for padded in padded_lists(eviction))
    return survivors.view(eviction.survivors.shape), evicted.view(eviction.evicted.shape)


def gather_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of each head, of shape ``(bsz, num_key_value_heads, n, head_dim)``, at ``index``, ``(bsz, heads, m)``."""
    return rows.gather(2, index.unsqueeze(-1).expand(*index.shape, rows.shape[-1]))


def put_rows(kept: torch.Tensor, index: torch.Tensor, is_put: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """
    A copy of ``kept`` with ``rows`` at the slots ``index`` where ``is_put``; all other slots have the bits they had.

    Parameters
    ----------
    kept : torch.Tensor
        Shape ``(bsz, num_key_value_heads, n_slots, head_dim)``.
    index, is_put : torch.Tensor
        int64 and bool, shape ``(bsz, num_key_value_heads, m)``.
    rows : torch.Tensor
        Shape ``(bsz, num_key_value_heads, m, head_dim)``, of any float dtype.
    """
    with_spare = torch.cat([kept, kept.new_zeros(*kept.shape[:2], 1, kept.shape[-1])], dim=2)
    index = torch.where(is_put, index, kept.shape[2]).unsqueeze(-1).expand_as(rows)
    return with_spare.scatter_(2, index, rows.to(kept.dtype))[:, :, :-1]
