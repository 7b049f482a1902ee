# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Runs any press, sees which positions it evicted, and folds what they held into the survivors."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from kvpress import BasePress, CAMPress
from kvpress import MergingPress as KVPressMergingPress
from torch import nn
from transformers import PreTrainedModel

from kvpress_merging.checks import check_folded, evicts_no_positions
from kvpress_merging.eviction import Eviction
from kvpress_merging.following.entering import entered
from kvpress_merging.following.model import layer_index
from kvpress_merging.following.state import Memory
from kvpress_merging.following.watch import Watch
from kvpress_merging.report import MergeReport
from kvpress_merging.wrapping import PressWrapper, nested_presses


@dataclass
class MergeOnEvictPress(PressWrapper):
    """
    Base of presses that merge what another press evicts.

    The inner press runs unchanged. What it evicted is seen from what it did, not from its class: a shorter cache
    (``tracing.py``) or newly masked positions, in its forward hook, in its ``compress``, or when its context exits.
    Then ``fold`` gives the survivors' new keys and values. A subclass is a dataclass with a ``fold``.

    Parameters
    ----------
    press : BasePress
        The press whose evictions are merged.

    Raises
    ------
    TypeError
        If ``press`` is not a press, merges already (anywhere inside), or evicts no positions.

    Examples
    --------
    A rule that adds a share of the mean of what each head lost to all of its survivors, for presses that evict equally
    many positions in all heads:

    >>> from dataclasses import dataclass
    >>> import torch
    >>> from kvpress import KnormPress
    >>> from kvpress_merging import MergeOnEvictPress
    >>> from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    >>> @dataclass
    ... class MeanPress(MergeOnEvictPress):
    ...     share: float = 0.1
    ...
    ...     def fold(self, module, hidden_states, keys, values, kept_keys, kept_values, eviction, kwargs):
    ...         index = eviction.evicted.unsqueeze(-1).expand(-1, -1, -1, values.shape[-1])
    ...         return kept_keys, kept_values + self.share * values.gather(2, index).mean(dim=2, keepdim=True)
    >>> config = LlamaConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    >>> model, cache = LlamaForCausalLM(config), DynamicCache()
    >>> with torch.no_grad(), MeanPress(KnormPress(0.5))(model):
    ...     _ = model(torch.arange(40)[None], past_key_values=cache)
    >>> cache.get_seq_length()
    20
    """

    # No part of a press's configuration.
    _report: MergeReport = field(init=False, repr=False, compare=False, default_factory=MergeReport)
    _memory: Memory = field(init=False, repr=False, compare=False, default_factory=Memory)

    @property
    def report(self) -> MergeReport:
        """What was merged of the sequence that each layer saw last."""
        return self._report

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
        """
        Fold what was evicted into the survivors: the one method that a merge rule has to write.

        Parameters
        ----------
        module : nn.Module
            The attention layer.
        hidden_states : torch.Tensor or None
            Its input, shape ``(bsz, q_len, hidden_dim)``; None for an eviction after the forward pass.
        keys, values : torch.Tensor
            The whole layer before the eviction, shape ``(bsz, num_key_value_heads, k_len, head_dim)``. Not to be
            written.
        kept_keys, kept_values : torch.Tensor
            What the bare press left, shape ``(bsz, num_key_value_heads, n_slots, head_dim)``. Not to be written.
        eviction : Eviction
            Which positions survived, in which slots, and which were evicted. At least one was.
        kwargs : dict
            Keyword arguments of the layer's forward pass; empty for an eviction after it.

        Returns
        -------
        tuple of torch.Tensor
            Keys and values in the order, shape, dtype and device of ``kept_keys`` and ``kept_values``. An unchanged
            one is returned as it came: then it is not written (nor quantized) again.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement fold")

    def observe(self, module: nn.Module, kwargs: dict[str, Any], is_prefill: bool) -> None:
        """
        Look at a forward pass of ``module``, before the inner press does: for rules whose ``fold`` needs more later.

        Parameters
        ----------
        module : nn.Module
            The attention layer.
        kwargs : dict
            Keyword arguments of its forward pass: ``hidden_states``, ``position_embeddings``, ``past_key_values``, ...
        is_prefill : bool
            Whether the pass filled an empty cache, or worked on another cache than the one before: what was remembered
            of the layer is then out of date.
        """

    def rearrange(self, module: nn.Module, rows: torch.Tensor | None, n_cut: int) -> None:
        """
        Follow a cache that was rearranged since its last forward pass: for rules that remember something of its rows.

        Parameters
        ----------
        module : nn.Module
            The attention layer.
        rows : torch.Tensor or None
            Which of the earlier rows each row of the batch now is, int64, shape ``(bsz,)``; None if they are as they
            were.
        n_cut : int
            How many positions were cut off its end.
        """

    def _check_field(self, name: str, value: Any) -> None:
        if name != "press":
            return
        own = type(self).__name__
        if not isinstance(value, BasePress):
            hint = f"; pass an instance, {value.__name__}(...)" if isinstance(value, type) else ""
            raise TypeError(f"press must be a kvpress BasePress, got {value!r}{hint}")
        for press in nested_presses(value):
            if isinstance(press, (MergeOnEvictPress, KVPressMergingPress, CAMPress)):
                name = type(press).__name__
                name = f"kvpress.{name}" if isinstance(press, KVPressMergingPress) else name
                raise TypeError(
                    f"{name} already merges what it evicts: give {own} the press inside it, or use {name} alone"
                )
        if evicts_no_positions(value):
            raise TypeError(
                f"{type(value).__name__} prunes key channels and evicts no positions, so there is nothing to merge: "
                f"combine it with a press that does, ComposedPress([{own}(...), ThinKPress(...)])"
            )

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Generator[None, None, None]:
        """
        Context manager: apply the inner press to ``model``, and merge what it evicts.

        If anything inside raises, what the press would do on leaving the context is undone, the model is left as it
        was, and the exception surfaces as it was raised.

        Warns
        -----
        RuntimeWarning
            If a layer of the cache keeps no keys and values that can be followed: what is evicted from it is lost.
        """
        with entered(self._watch(), model):
            yield

    def forward_hook(
        self, module: nn.Module, input: list[torch.Tensor], kwargs: dict[str, Any], output: list[Any]
    ) -> Any:
        """Run the inner press's forward hook and merge what it evicted: for presses that call an inner press's hook."""
        watch = self._watch()
        watch.look(module, input, kwargs, output)
        return watch.follow_hook(self.press.forward_hook)(module, input, kwargs, output)

    def compress(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the inner press's ``compress`` and merge what it evicted: for presses that call their inner press's."""
        return self._watch().compress(module, hidden_states, keys, values, attentions, kwargs)

    def _watch(self) -> Watch:
        return Watch(self.press, self._memory, self.report.start, self.observe, self.rearrange, self._merge)

    def _merge(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Note an eviction, and fold what was evicted: takes what ``fold`` takes."""
        module, *_, kept_keys, kept_values, eviction, _ = args
        self.report.record(layer_index(module), eviction)
        if eviction.n_evicted == 0:
            return kept_keys, kept_values
        new_keys, new_values = self.fold(*args)
        check_folded(self, new_keys, kept_keys)
        check_folded(self, new_values, kept_values)
        return new_keys, new_values
