# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What is remembered of one attention layer of one cache between forward passes, and the eviction that follows."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, ref

import torch
from kvpress import BasePress
from torch import nn
from transformers import Cache
from transformers.cache_utils import QuantizedLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpress_merging.eviction import Eviction, masked_positions
from kvpress_merging.following.cache import CompressedLayer, layer_length, tokens_seen
from kvpress_merging.following.model import layer_index
from kvpress_merging.following.padding import Padding

Masks: TypeAlias = tuple[torch.Tensor, ...]
"""Batch rows, heads and positions of what is masked."""

# What a cache layer is told, so that its copies know it, when positions of a batch with padding are evicted from it.
_IS_OUT_OF_LINE = "is_out_of_line_with_masks"


def masks_on(module: nn.Module) -> Masks | None:
    """What ``module.masked_key_indices`` says now: a press may write into the list."""
    masks = getattr(module, "masked_key_indices", None)
    return None if masks is None else tuple(masks)


def is_same(masks: Masks | None, others: Masks | None) -> bool:
    """Whether these are the very same tensors, so that nothing was masked in between."""
    if masks is None or others is None:
        return masks is others
    return len(masks) == len(others) and all(map(operator.is_, masks, others))


@dataclass
class LayerState:
    """What is remembered of one attention layer as long as it works on one cache, from prefill to prefill."""

    # None where a press handed keys and values on without saying whose they are.
    cache: ref[Cache] | None
    # Tokens that the cache stood for when it was first seen, before any eviction.
    context_length: int
    # Positions in the cache after the last forward pass that was seen.
    k_len: int
    # Tokens that are in the cache no more, since the layer has a sliding window.
    n_forgotten: int = 0
    # Tokens of the context that are padding, bool, shape (bsz, context_length); None if none is.
    is_padding: torch.Tensor | None = None
    # Positions that were ever masked, bool, shape (bsz, num_key_value_heads or 1, k_len at that time); None if none
    # was. Attention overwrites their keys, so they never take anything in. Padding is masked from the start.
    masked: torch.Tensor | None = None
    # What ``module.masked_key_indices`` says of an earlier cache. kvpress's attention functions forget it when they
    # prefill, but not the model's own eager one.
    stale_masks: Masks | None = None
    is_quantized: bool = False
    # The layer's values as they were left last; of several rows, one number for each row and position, by which a row
    # is known again, shape (bsz, k_len).
    values: ref[torch.Tensor] | None = None
    rows: torch.Tensor | None = None

    def masks_on(self, module: nn.Module) -> Masks | None:
        """What ``module.masked_key_indices`` says of this cache."""
        masks = masks_on(module)
        return None if is_same(masks, self.stale_masks) else masks

    def look_at(self, layer: Any) -> None:
        """Note how long the layer is, and that a sliding window has moved on."""
        self.k_len = layer_length(layer)
        n_forgotten = tokens_seen(layer) - self.k_len
        if self.masked is not None and n_forgotten > self.n_forgotten:
            self.masked = self.masked[..., n_forgotten - self.n_forgotten :]
        self.n_forgotten = n_forgotten

    def note_rows(self, layer: Any) -> None:
        """Note the layer as it is left, to see what becomes of its rows until it is seen again."""
        if not self.is_quantized:  # transformers moves no rows of what is quantized
            self.values = ref(layer.values)
            self.rows = layer.values[:, 0, :, 0].clone() if layer.values.shape[0] > 1 else None

    def find_rows(self, press: BasePress, module: nn.Module, layer: Any) -> list[int] | None:
        """
        Which of the earlier rows each row of the layer is, -1 if none; None if the rows are as they were.

        Reads from the device, but only where there are several rows and something put other values in the layer's place
        since :meth:`note_rows`. Raises a ValueError where padding is known of rows that are none of those, and where
        rows were moved under masks, which do not move with them.
        """
        if self.values is None or layer.values is self.values() or layer_length(layer) == 0:
            return None
        bsz = layer.values.shape[0]
        if self.rows is None:
            rows = [0] * bsz
        else:
            now = layer.values[:, 0, :, 0]
            then = self.rows[:, tokens_seen(layer) - layer_length(layer) - self.n_forgotten :]
            k_len = min(now.shape[1], then.shape[1])
            is_same = torch.stack([(then[:, :k_len] == row[:k_len]).all(dim=1) for row in now]).tolist()
            if self.masked is not None and not all(map(any, is_same)):
                raise ValueError(
                    f"rows of layer {layer_index(module)} of the cache are none of those that it held when "
                    f"{type(press).__name__} saw it last, so what is padding in them, or masked, is not known: use a "
                    "new cache for another batch"
                )
            # Of equal rows the one at its own place.
            rows = [
                i if i < len(same) and same[i] else same.index(True) if any(same) else -1
                for i, same in enumerate(is_same)
            ]
        if rows == list(range(1 if self.rows is None else len(self.rows))):
            return None
        masks = self.masks_on(module)
        if masks is not None and len(masks[-1]):
            raise ValueError(
                f"{type(press).__name__} masked positions of a batch whose rows were then repeated, dropped or moved "
                "in the cache, where masks do not follow: move rows before it evicts, or use a press that shrinks it"
            )
        return rows

    def rearrange(self, rows: torch.Tensor | None, n_cut: int) -> None:
        """Follow rows that were moved, and positions that were cut off the end."""
        if rows is not None:
            self.masked = None if self.masked is None else self.masked[rows]
            self.is_padding = None if self.is_padding is None else self.is_padding[rows]
        if n_cut:
            self.k_len -= n_cut
            self.masked = None if self.masked is None else self.masked[..., : self.k_len]

    def mark(self, layer_idx: int) -> None:
        """Tell the cache layer of an eviction, if the batch has padding: masks do not line up with it any more."""
        cache = None if self.cache is None else self.cache()
        if cache is not None and self.is_padding is not None:
            setattr(cache.layers[layer_idx], _IS_OUT_OF_LINE, True)

    def check_cut(self, press: BasePress, module: nn.Module, layer: Any, q_len: int) -> None:
        """Raise a ValueError for a cache that was cut back under masks that reach beyond it, and q_len tokens more."""
        masks = self.masks_on(module)
        if masks is None or not 0 < layer_length(layer) < self.k_len or len(masks[-1]) == 0:
            return
        k_len = layer_length(layer) + q_len
        last = int(masks[-1].max())
        if last >= k_len:
            raise ValueError(
                f"{type(press).__name__} masked positions up to {last}, and the cache was cut back since, by crop() or "
                f"prompt look-up, say, to {k_len} positions with those of this pass: ask one question per prefill"
            )

    def find_eviction(
        self,
        compressed: CompressedLayer,
        k_len: int,
        masks_before: Masks | None,
        masks_after: Masks | None,
        limit: int | None,
    ) -> Eviction:
        """
        What a press evicted now, and note what it masked.

        ``k_len`` positions were in the layer before; ``masks_before`` were masked then, ``masks_after`` are since.
        Positions from ``limit`` on are neither evicted nor survivors.
        """
        bsz, num_key_value_heads, n_slots, _ = compressed.values.shape
        positions, keys_rewritten = compressed.positions, compressed.keys_rewritten
        device = compressed.values.device
        shape = (bsz, num_key_value_heads, k_len)
        is_first = self.masked is None and masks_before is None
        if is_first and not compressed.has_foreign_rows and (limit is None or limit >= k_len):
            # What comes out below too; but an even eviction without from_masks' read of its counts from the device.
            if masks_after is None:
                assert positions is not None
                return replace(Eviction.from_kept(positions, k_len), keys_rewritten=keys_rewritten)
            if n_slots == k_len:
                self.masked = masked_positions(masks_after, shape, device)
                return replace(Eviction.from_masks(~self.masked, self.masked), keys_rewritten=keys_rewritten)

        masked_earlier = masked_positions(masks_before, shape, device)
        if self.masked is not None:
            n_known = min(self.masked.shape[-1], k_len)
            masked_earlier[..., :n_known] |= self.masked[..., :n_known]
        slots_masked = masked_positions(masks_after, (bsz, num_key_value_heads, n_slots), device)

        slot_of = None
        if n_slots < k_len:
            assert positions is not None
            # One column more for slots that hold no position of the cache.
            column = torch.where(positions >= 0, positions, k_len)
            slots = torch.arange(n_slots, device=device).expand_as(column)
            scratch = torch.zeros(bsz, num_key_value_heads, k_len + 1, dtype=torch.int64, device=device)
            slot_of = scratch.scatter(-1, column, slots)[..., :k_len]
            is_left = scratch.bool().scatter(-1, column, ~slots_masked)[..., :k_len]
            earlier = torch.cat([masked_earlier, scratch[..., :1].bool()], dim=-1).gather(-1, column)
            self.masked = earlier | slots_masked & (positions >= 0)
        else:
            is_left = ~slots_masked[..., :k_len]
            self.masked = masked_earlier | ~is_left

        is_context = torch.arange(k_len, device=device) < (k_len if limit is None else limit)
        was_seen = is_context & ~masked_earlier
        return replace(
            Eviction.from_masks(is_left & was_seen, ~is_left & was_seen, slot_of), keys_rewritten=keys_rewritten
        )


class Memory:
    """What one press remembers of the layers that it has seen, and of the padding of their batches."""

    def __init__(self) -> None:
        self.states: WeakKeyDictionary[nn.Module, LayerState] = WeakKeyDictionary()
        self.padding = Padding()
        self.has_warned = False

    def state_of(self, module: nn.Module, cache: Cache | None) -> LayerState | None:
        """What is remembered of the layer, if it is of this cache."""
        state = self.states.get(module)
        if state is None or (state.cache is None) != (cache is None):
            return None
        return state if state.cache is None or state.cache() is cache else None

    def start(
        self, module: nn.Module, kwargs: dict[str, Any], bsz: int, *, is_prefill: bool, k_len: int | None = None
    ) -> None:
        """
        Remember a layer anew, at a forward pass with these arguments: it works on another cache, or is prefilled.

        ``k_len`` is the number of positions in the layer, by default those that the cache has.
        """
        cache: Any = kwargs.get("past_key_values")
        state = LayerState(None if cache is None else ref(cache), k_len or 0, k_len or 0)
        layer = None if cache is None else cache.layers[layer_index(module)]
        state.is_quantized = isinstance(layer, QuantizedLayer)
        if k_len is None:
            state.context_length = tokens_seen(layer)  # type: ignore[arg-type]
            state.look_at(layer)
        config: Any = getattr(module, "config", None)
        window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
        state.is_padding = self.padding.find(kwargs.get("attention_mask"), bsz, state.context_length, window)
        if state.is_padding is not None:
            if not is_prefill and getattr(layer, _IS_OUT_OF_LINE, False):
                raise ValueError(
                    f"layer {layer_index(module)} of this cache, or of the one that it is a copy of, lost positions of "
                    "a batch with padding before this press saw it, so the attention mask does not line up with it any "
                    "more, and what is padding is not known: evict with one press and in one cache from the prefill "
                    "on, or prefill rows of one length"
                )
            state.masked = state.is_padding[:, None, -state.k_len :]
        if getattr(config, "_attn_implementation", "sdpa") not in ALL_ATTENTION_FUNCTIONS:
            state.stale_masks = masks_on(module)
        self.states[module] = state
