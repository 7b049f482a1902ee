# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Which positions of a batch are padding: they hold nothing, so they are neither merged nor merged into."""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch


class Padding:
    """
    Reads the padding off the attention masks that layers are given.

    Where no position is padding, transformers gives its layers no mask for scaled dot product and flash attention; then
    nothing is looked at. Otherwise a mask is read from the device once, for all layers that are given the same, and so
    are the positions of its tokens.
    """

    def __init__(self) -> None:
        self._mask: ref[torch.Tensor] | None = None
        self._is_padding: torch.Tensor | None = None
        self._tokens: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def find(self, attention_mask: Any, bsz: int, k_len: int) -> torch.Tensor | None:
        """
        The positions that what comes after the context must not see.

        Parameters
        ----------
        attention_mask : torch.Tensor or None
            As the layer is given it: of shape ``(bsz, k_len)``, where 0 is padding; or of shape ``(bsz or 1,
            num_heads or 1, q_len, k_len)``, bool (True is seen) or added to the logits, of which the last token's row
            tells.
        bsz, k_len : int
            Batch rows and positions.

        Returns
        -------
        torch.Tensor or None
            bool, shape ``(bsz, k_len)``; None if there is no padding.

        Raises
        ------
        ValueError
            For a batch with a mask of another kind, which does not tell.
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
        if self._mask is None or self._mask() is not attention_mask:
            self._is_padding = _unseen(attention_mask, bsz, k_len)
            self._mask = ref(attention_mask)
        return self._is_padding

    def tokens(self, is_padding: torch.Tensor) -> list[torch.Tensor]:
        """
        The positions that are no padding.

        Parameters
        ----------
        is_padding : torch.Tensor
            What :meth:`find` gave.

        Returns
        -------
        list of torch.Tensor
            Of each row, int64, ascending; all positions of a row that has nothing but padding.
        """
        if self._tokens is None or self._tokens[0] is not is_padding:
            # A row with nothing to fit: any position will do.
            is_token = ~is_padding | is_padding.all(dim=1, keepdim=True)
            self._tokens = is_padding, [row.nonzero().squeeze(1) for row in is_token]
        return self._tokens[1]


def _unseen(mask: torch.Tensor, bsz: int, k_len: int) -> torch.Tensor | None:
    if mask.dim() == 2:
        is_unseen = mask[:, :k_len] == 0
    elif mask.dtype == torch.bool:
        is_unseen = ~mask[:, :, -1, :k_len].any(dim=1)
    else:
        is_unseen = (mask[:, :, -1, :k_len] <= torch.finfo(mask.dtype).min / 2).all(dim=1)
    if is_unseen.is_meta or not is_unseen.any():  # a meta tensor cannot be read
        return None
    return is_unseen.expand(bsz, -1)
