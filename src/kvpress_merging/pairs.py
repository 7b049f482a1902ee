# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Who went to whom: the evicted positions of one eviction and the survivors most like them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvpress_merging.eviction import Eviction

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("eviction", "batch", "head", "evicted", "survivor", "similarity", "weight")
"""Of the table that pairs make; see :meth:`kvpress_merging.MergeReport.merges`."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """
    The pairs of one eviction, as they lie on the device: 16 bytes per evicted position and head.

    All tensors have the shape ``(bsz, num_key_value_heads, n_evicted)``.

    Parameters
    ----------
    evicted, survivor : torch.Tensor
        Positions in the layer as it was before the eviction, int32. Of no meaning where the similarity is -inf.
    similarity, weight : torch.Tensor
        Cosine of the two keys and weight of the evicted position in the blend, float32.
    counts : tuple of (int, int), optional
        As in the eviction: how many survivors and evicted positions of each head are real.
    """

    evicted: torch.Tensor
    survivor: torch.Tensor
    similarity: torch.Tensor
    weight: torch.Tensor
    counts: tuple[tuple[int, int], ...] | None

    @classmethod
    def of(cls, eviction: Eviction, similarity: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> Pairs:
        """Pairs from what the blend says; reads nothing back from the device."""
        evicted = eviction.evicted.int()
        # Without any survivor there is nothing for a target to point at.
        survivor = eviction.survivors.gather(-1, target).int() if eviction.survivors.shape[-1] else evicted
        return cls(evicted, survivor, similarity, weight, eviction.counts)

    def to_frame(self, number: int) -> pd.DataFrame:
        """
        Read the pairs from the device: one row each, without padding, see ``COLUMNS``.

        Parameters
        ----------
        number : int
            Of the eviction.
        """
        import pandas as pd

        bsz, num_key_value_heads, n_evicted = self.evicted.shape
        is_real = torch.ones(bsz * num_key_value_heads, n_evicted, dtype=torch.bool)
        if self.counts is not None:
            is_real = torch.arange(n_evicted) < torch.tensor([n for _, n in self.counts])[:, None]
        row = torch.arange(bsz * num_key_value_heads)[:, None].expand_as(is_real)[is_real]
        evicted, survivor, similarity, weight = (
            tensor.cpu().flatten(0, 1)[is_real]
            for tensor in (self.evicted, self.survivor, self.similarity, self.weight)
        )
        columns = (
            torch.full_like(row, number),
            row // num_key_value_heads,
            row % num_key_value_heads,
            evicted,
            survivor.masked_fill(similarity == -torch.inf, -1),
            similarity,
            weight,
        )
        return pd.DataFrame({name: column.numpy() for name, column in zip(COLUMNS, columns)})
