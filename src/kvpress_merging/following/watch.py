# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""One press at work on the layers of one model: what it evicts is seen, and merged before it is gone."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from kvpress import BasePress
from torch import nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from kvpress_merging.checks import not_followed, refuse_what_the_press_gets_wrong
from kvpress_merging.following.cache import OpenLayer, is_followed, layer_length, open_layer, tokens_seen
from kvpress_merging.following.model import layer_index
from kvpress_merging.following.state import LayerState, Masks, Memory, is_same, masks_on
from kvpress_merging.following.undo import Snapshot
from kvpress_merging.wrapping import nested_presses

Tensors: TypeAlias = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Watch:
    """Follows what a press does to each layer of a model."""

    press: BasePress
    memory: Memory
    # What is done where a layer starts anew, with its index; at each forward pass, as ``MergeOnEvictPress.observe``;
    # where a cache was rearranged, as its ``rearrange``; and with each eviction, as its ``fold``.
    start: Callable[[int], None]
    observe: Callable[[nn.Module, dict[str, Any], bool], None]
    rearrange: Callable[[nn.Module, torch.Tensor | None, int], None]
    merge: Callable[..., Tensors]
    # The attention layers that the press has hooks on; all where it has none, and what it does comes later.
    hooked: set[nn.Module] = field(default_factory=set)
    # The layers that have run, with their caches; and how long each was, and what was masked, when its attention was
    # done in the present forward pass.
    seen: dict[nn.Module, Cache] = field(default_factory=dict)
    ran: dict[nn.Module, tuple[int, Masks | None]] = field(default_factory=dict)
    # The last TypeError of a hook, and the cache of that forward pass.
    failure: tuple[TypeError, Cache] | None = None

    # Each forward pass of a layer.

    def look(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Note a forward pass of ``module``, after its attention and before the press: a forward hook."""
        cache = kwargs.get("past_key_values")
        if cache is None or not self._is_followed(module, cache):
            return
        with self._noting_failure(cache):
            self._look(module, kwargs, cache)

    def _look(self, module: nn.Module, kwargs: dict[str, Any], cache: Cache) -> None:
        layer = cache.layers[layer_index(module)]
        bsz, q_len = kwargs["hidden_states"].shape[:2]
        is_prefill = tokens_seen(layer) == q_len  # as kvpress's, without reading from the device
        state = self.memory.state_of(module, cache)
        if not self.hooked and state is not None and not is_prefill:
            # By hand: no hook of ours ran before the pass.
            state = self._follow_cache(module, state, layer, n_new=q_len)
        is_new = is_prefill or state is None
        if is_prefill:
            refuse_what_the_press_gets_wrong(self.press, cache, bsz)
        if is_new:
            self.memory.start(module, kwargs, bsz, is_prefill=is_prefill)
        else:
            state.look_at(layer)  # type: ignore[union-attr]
        self.seen[module] = cache
        if module in self.ran:
            self.ran.clear()  # by another pass
        if module in self.hooked or not self.hooked:
            if is_new:
                self.start(layer_index(module))
            self.observe(module, kwargs, is_new)

    def follow_hook(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The press's forward hook, followed in what it does to its layer."""

        def followed_hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            cache = kwargs.get("past_key_values")
            if cache is None or not self._is_followed(module, cache):
                return hook(module, args, kwargs, output)
            layer = open_layer(cache, layer_index(module))
            with self._noting_failure(cache), self._following(module, layer, kwargs.get("hidden_states"), kwargs):
                result = hook(module, args, kwargs, output)
            self.memory.states[module].look_at(cache.layers[layer_index(module)])
            if not self.hooked:
                self.memory.states[module].note_rows(cache.layers[layer_index(module)])
            return result

        return followed_hook

    def compress(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> Tensors:
        """Follow the press's ``compress``, called by hand."""
        bsz, k_len = keys.shape[0], keys.shape[2]
        is_prefill = hidden_states.shape[1] == k_len
        held: Any = DynamicLayer()  # type: ignore[no-untyped-call]
        held.keys, held.values, held.is_initialized = keys, values, True
        state = self.memory.state_of(module, kwargs.get("past_key_values"))
        if state is not None and not is_prefill:
            state = self._follow_cache(module, state, held, n_new=0)
        if is_prefill or state is None:
            self.memory.start(module, kwargs, bsz, is_prefill=is_prefill, k_len=k_len)
            self.start(layer_index(module))
        self.memory.states[module].k_len = k_len
        # All that is known of the layer is what came along.
        self.observe(module, {**kwargs, "hidden_states": hidden_states}, True)
        layer = OpenLayer(SimpleNamespace(layers=[held]), 0)
        with self._following(module, layer, hidden_states, kwargs):
            held.keys, held.values = self.press.compress(
                module, hidden_states, held.keys, held.values, attentions, kwargs
            )
        self.memory.states[module].note_rows(held)
        return held.keys, held.values

    def _is_followed(self, module: nn.Module, cache: Cache) -> bool:
        if is_followed(cache.layers[layer_index(module)]):
            return True
        if module in self.hooked and not self.memory.has_warned:
            self.memory.has_warned = True
            others = [f"{i} ({type(layer).__name__})" for i, layer in enumerate(cache.layers) if not is_followed(layer)]
            warnings.warn(
                f"what {type(self.press).__name__} evicts from these cache layers is not merged, since they keep no "
                f"keys and values that can be followed: {', '.join(others)}",
                RuntimeWarning,
                stacklevel=2,
            )
        return False

    @contextmanager
    def _following(
        self, module: nn.Module, layer: OpenLayer, hidden_states: torch.Tensor | None, kwargs: dict[str, Any]
    ) -> Generator[None, None, None]:
        """Let the press work on an open layer and merge, or put everything back."""
        state = self.memory.states[module]
        masks_before = state.masks_on(module)
        with Snapshot(module, state, *nested_presses(self.press), layers=[layer]):
            layer.open()
            yield
            self.commit(module, layer, masks_before, hidden_states, kwargs, limit=None)

    def commit(
        self,
        module: nn.Module,
        layer: OpenLayer,
        masks_before: Masks | None,
        hidden_states: torch.Tensor | None,
        kwargs: dict[str, Any],
        limit: int | None,
    ) -> None:
        """Commit what the press left, with the survivors of a new eviction merged into."""
        state = self.memory.states[module]
        masks_after = state.masks_on(module)
        k_len, n_slots = layer.lengths()
        is_newly_masked = masks_after is not None and not is_same(masks_after, masks_before)
        if n_slots >= k_len and not is_newly_masked:
            layer.commit()
            return
        compressed = layer.compressed()
        if n_slots < k_len and compressed.positions is None:
            raise not_followed(self.press)
        eviction = state.find_eviction(compressed, k_len, masks_before, masks_after, limit)
        keys, values = self.merge(
            module, hidden_states, *layer.before(), compressed.keys, compressed.values, eviction, kwargs
        )
        layer.commit(None if keys is compressed.keys else keys, None if values is compressed.values else values)
        if eviction.n_evicted:
            state.mark(layer_index(module))

    # What would go wrong unseen.

    @contextmanager
    def _noting_failure(self, cache: Cache) -> Generator[None, None, None]:
        try:
            yield
        except TypeError as error:
            self.failure = error, cache
            raise

    def before_pass(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """
        Follow what became of a cache since the last pass; refuse to go on where masks do not, or in a second pass.

        Some releases of transformers answer a TypeError inside a forward pass with the same pass anew, over a cache
        that has taken in the first one: such a pass ends with the same error before it reaches the cache.
        """
        cache = kwargs.get("past_key_values")
        if self.failure is not None:
            error, failed_cache = self.failure
            if error is sys.exc_info()[1] and cache is failed_cache:
                raise error
            self.failure = None
        state = None if cache is None else self.memory.state_of(module, cache)
        if cache is not None and state is not None and layer_index(module) < len(cache.layers):
            layer = cache.layers[layer_index(module)]
            state.check_cut(self.press, module, layer, kwargs["hidden_states"].shape[1])
            self._follow_cache(module, state, layer, n_new=0)

    def _follow_cache(self, module: nn.Module, state: LayerState, layer: Any, n_new: int) -> LayerState | None:
        """
        Have what is remembered of a layer follow its rows, and forget what was cut off its end.

        ``n_new`` tokens have come since. None if it holds another batch: the layer starts anew.
        """
        if not is_followed(layer) or not layer_length(layer):
            return state
        rows = state.find_rows(self.press, module, layer)
        if rows is not None and -1 in rows:
            del self.memory.states[module]
            return None
        n_cut = max(0, state.n_forgotten + state.k_len + n_new - tokens_seen(layer))
        if rows is not None or n_cut:
            index = None if rows is None else torch.tensor(rows, device=layer.values.device)
            state.rearrange(index, n_cut)
            self.rearrange(module, index, n_cut)
        return state

    def check_unseen(self, model: nn.Module, args: Any, output: Any) -> None:
        """Refuse an eviction from a layer that was made elsewhere than in the layer's own hook."""
        for module, (k_len, masks) in self.ran.items():
            if self._length(module) < k_len or not is_same(masks_on(module), masks):
                raise ValueError(
                    f"{type(self.press).__name__} evicted from layer {layer_index(module)} in a hook of another "
                    "module, where it does not show what was evicted, so nothing of it was merged: let it evict in a "
                    "forward hook of the layer's own attention, in compress, or when its context exits, or use it "
                    "without merging"
                )

    def settle(self, module: nn.Module) -> None:
        """Note a layer as all hooks on its attention have left it, those of presses around this one too."""
        if module in self.seen:
            self.ran[module] = (self._length(module), masks_on(module))
            self.memory.states[module].note_rows(self.seen[module].layers[layer_index(module)])

    def _length(self, module: nn.Module) -> int:
        return layer_length(self.seen[module].layers[layer_index(module)])
