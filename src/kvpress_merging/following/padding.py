# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Which positions of a batch are padding: they hold nothing, so they are neither merged nor merged into."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary


class Padding:
    """
    Reads the padding off the attention masks that layers are given.

    Where no position is padding, transformers gives its layers no mask for scaled dot product and flash attention; then
    nothing is looked at. Otherwise a mask is read from the device once, for all layers that are given the same.
    """

    def __init__(self) -> None:
        # By mask: layers with a sliding window have another than those without.
        self._is_padding = WeakTensorKeyDictionary()

    def find(self, attention_mask: Any, bsz: int, k_len: int, window: int | None = None) -> torch.Tensor | None:
        """
        The positions that what comes after the context must not see, bool, shape ``(bsz, k_len)``; None if none is.

        The mask is as the layer is given it: of shape ``(bsz, k_len)``, where 0 is padding; or of shape ``(bsz or 1,
        num_heads or 1, q_len, k_len)``, bool (True is seen) or added to the logits, of which the last token's row
        tells. One of another kind does not tell: a ValueError for a batch. The layer's tokens see ``window`` tokens
        back; what lies further back than that is no padding for it.
        """
        if attention_mask is None:
            return None
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() not in (2, 4):
            if bsz == 1:
                return None
            raise ValueError(
                f"an attention mask of type {type(attention_mask).__name__} does not tell which positions of a batch "
                "are padding, which must not be merged: use sdpa, eager or flash attention, or prefill one by one"
            )
        if attention_mask not in self._is_padding:
            self._is_padding[attention_mask] = _find_unseen(attention_mask, bsz, k_len, window)
        return self._is_padding[attention_mask]


def _find_unseen(mask: torch.Tensor, bsz: int, k_len: int, window: int | None) -> torch.Tensor | None:
    if mask.dim() == 2:
        is_unseen = mask[:, :k_len] == 0
    else:
        # Every token sees itself; the last one sees all the others too, unless they are outside its window.
        is_square = mask.shape[2] == mask.shape[3]
        seen = mask.diagonal(dim1=2, dim2=3) if window is not None and is_square else mask[:, :, -1]
        is_seen = seen if mask.dtype == torch.bool else seen > torch.finfo(mask.dtype).min / 2
        is_unseen = ~is_seen[:, :, :k_len].any(dim=1)
        if window is not None and not is_square:
            is_unseen[:, :-window] = False
    if is_unseen.is_meta or not is_unseen.any():  # a meta tensor cannot be read
        return None
    return is_unseen.expand(bsz, -1)
