# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What is remembered of an attention layer between forward passes, and the eviction that follows from it."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import nn

from kvpress_merging.cache import Left
from kvpress_merging.eviction import Eviction, masked_positions

Masks: TypeAlias = tuple[torch.Tensor, ...]
"""Batch rows, heads and positions of what is masked."""


@dataclass
class LayerState:
    """
    What is remembered of one attention layer from its prefill until its next one.

    Parameters
    ----------
    context_length : int
        Positions that the prefill left in the cache before any eviction.
    k_len : int
        Positions in the cache after the last forward pass that was seen.
    is_padding : torch.Tensor, optional
        Positions of the context that are padding, bool, shape ``(bsz, context_length)``; None if none is.
    masked : torch.Tensor, optional
        Positions that were ever masked, bool, shape ``(bsz, num_key_value_heads or 1, k_len at that time)``; None if
        none was. Attention overwrites their keys, so they never take anything in. Padding is masked from the start.
    stale_masks : object, optional
        ``module.masked_key_indices`` of an earlier prefill. kvpress's attention functions forget it when they prefill,
        but not the model's own eager one.
    """

    context_length: int
    k_len: int
    is_padding: torch.Tensor | None = None
    masked: torch.Tensor | None = None
    stale_masks: Any = None

    def __post_init__(self) -> None:
        if self.is_padding is not None:
            self.masked = self.is_padding[:, None]

    def masks_of(self, module: nn.Module) -> Masks | None:
        """What ``module.masked_key_indices`` says of the present cache."""
        masks = getattr(module, "masked_key_indices", None)
        return None if masks is self.stale_masks else masks

    def find_eviction(
        self, left: Left, k_len: int, masked_before: Masks | None, masked_after: Masks | None, limit: int | None
    ) -> Eviction:
        """
        What a press evicted now, and note what it masked.

        Parameters
        ----------
        left : Left
            What it left of the layer.
        k_len : int
            Positions before it.
        masked_before, masked_after : tuple of three torch.Tensor, or None
            What was masked before, and what is masked since.
        limit : int or None
            Positions from here on are neither evicted nor survivors.
        """
        bsz, num_key_value_heads, n_slots, _ = left.values.shape
        has_masks = masked_after is not None or self.masked is not None
        if not has_masks and not left.has_foreign_rows and (limit is None or limit >= k_len):
            assert left.positions is not None
            eviction = Eviction.from_kept(left.positions, k_len)
            return replace(eviction, keys_rewritten=left.keys_rewritten)

        device = left.values.device
        shape = (bsz, num_key_value_heads, k_len)
        masked_earlier = masked_positions(masked_before, shape, device)
        if self.masked is not None:
            n_known = min(self.masked.shape[-1], k_len)
            masked_earlier[..., :n_known] |= self.masked[..., :n_known]
        slots_masked = masked_positions(masked_after, (bsz, num_key_value_heads, n_slots), device)

        slot_of = None
        if n_slots < k_len:
            assert left.positions is not None
            # One column more for slots that hold no position of the cache.
            column = torch.where(left.positions >= 0, left.positions, k_len)
            slots = torch.arange(n_slots, device=device).expand_as(column)
            scratch = torch.zeros(bsz, num_key_value_heads, k_len + 1, dtype=torch.int64, device=device)
            slot_of = scratch.scatter(-1, column, slots)[..., :k_len]
            is_kept = scratch.bool().scatter(-1, column, True)[..., :k_len]
            masked_now = scratch.bool().scatter(-1, column, slots_masked)[..., :k_len]
            self.masked = torch.cat([masked_earlier | masked_now, scratch[..., :1].bool()], dim=-1).gather(-1, column)
        else:
            is_kept = torch.ones(shape, dtype=torch.bool, device=device)
            masked_now = slots_masked[..., :k_len]
            self.masked = masked_earlier | masked_now

        is_context = torch.arange(k_len, device=device) < (k_len if limit is None else limit)
        is_survivor = is_kept & ~masked_now & ~masked_earlier & is_context
        is_evicted = ~(is_kept & ~masked_now) & ~masked_earlier & is_context
        return replace(Eviction.from_masks(is_survivor, is_evicted, slot_of), keys_rewritten=left.keys_rewritten)


def masks_of(module: nn.Module) -> Masks | None:
    """What ``module.masked_key_indices`` says now: a press may write into the list."""
    masks = getattr(module, "masked_key_indices", None)
    return None if masks is None else tuple(masks)


def is_same(masks: Any, others: Any) -> bool:
    """Whether these are the very same tensors, so that nothing was masked in between."""
    if masks is None or others is None:
        return masks is others
    return len(masks) == len(others) and all(map(operator.is_, masks, others))
