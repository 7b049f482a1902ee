# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Which positions of one cache layer a press kept and which it evicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Eviction:
    """
    Kept and evicted positions of one cache layer, per batch row and KV head.

    A *position* is an index into the layer as it was before the eviction, a *slot* an index into what the press left.
    A press that shrinks the cache leaves fewer slots than there were positions; a press that masks leaves them all, and
    a survivor's slot is then its position. Positions that are neither survivors nor evicted are left alone: those that
    were masked earlier, and tokens that a press appended for its own use.

    The two lists of a head are padded where heads differ (a *ragged* eviction): then ``counts`` says how many entries
    of each are real.

    Parameters
    ----------
    survivors : torch.Tensor
        Positions that may take something in, ascending, int64, shape ``(bsz, num_key_value_heads, n_survivors)``.
    slots : torch.Tensor
        Where each survivor stands in what the press left, int64, same shape as ``survivors``.
    evicted : torch.Tensor
        Positions evicted now, ascending, int64, shape ``(bsz, num_key_value_heads, n_evicted)``.
    k_len : int
        Number of positions of the layer before the eviction.
    counts : tuple of (int, int), optional
        One pair ``(n_survivors, n_evicted)`` per batch row and head, row-major, where they differ between heads; None
        where every entry is real.
    keys_rewritten : bool
        Whether the press wrote new keys for the survivors (rotated anew, or with channels set to zero), so that what it
        left differs from the keys of the cache before the eviction.

    Examples
    --------
    >>> import torch
    >>> from kvpress_merging import Eviction
    >>> eviction = Eviction.from_kept(torch.tensor([[[3, 0]]]), k_len=5)
    >>> eviction.survivors, eviction.slots, eviction.evicted
    (tensor([[[0, 3]]]), tensor([[[1, 0]]]), tensor([[[1, 2, 4]]]))
    """

    survivors: torch.Tensor
    slots: torch.Tensor
    evicted: torch.Tensor
    k_len: int
    counts: tuple[tuple[int, int], ...] | None = None
    keys_rewritten: bool = False

    @property
    def is_ragged(self) -> bool:
        """Whether heads differ in how many positions they kept or lost."""
        return self.counts is not None

    @property
    def counts_of_heads(self) -> tuple[tuple[int, int], ...]:
        """``counts``, or where that is None what all heads have: a pair for each, in the same order."""
        widths = self.survivors.shape[-1], self.evicted.shape[-1]
        return self.counts or (widths,) * self.survivors.shape[:2].numel()

    @property
    def n_evicted(self) -> int:
        """Evicted positions, summed over batch rows and heads."""
        if self.counts is None:
            return self.evicted.numel()
        return sum(n_evicted for _, n_evicted in self.counts)

    @property
    def n_survivors(self) -> int:
        """Surviving positions, summed over batch rows and heads."""
        if self.counts is None:
            return self.survivors.numel()
        return sum(n_survivors for n_survivors, _ in self.counts)

    def heads(self) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """
        Walk the heads, each without padding.

        Yields
        ------
        tuple of (int, int, torch.Tensor, torch.Tensor, torch.Tensor)
            Batch row, head, and of that head the survivors, their slots and the evicted positions, int64, shape
            ``(n,)``.
        """
        for head, (n, m) in enumerate(self.counts_of_heads):
            b, h = divmod(head, self.survivors.shape[1])
            yield b, h, self.survivors[b, h, :n], self.slots[b, h, :n], self.evicted[b, h, :m]

    @classmethod
    def from_kept(cls, positions: torch.Tensor, k_len: int) -> Eviction:
        """
        The eviction of a press that kept the same number of positions in every head.

        Reads nothing back from the device.

        Parameters
        ----------
        positions : torch.Tensor
            The position that each slot holds, int64, shape ``(bsz, num_key_value_heads, n_kept)``, in any order,
            without repeats within a head.
        k_len : int
            Number of positions before the eviction.
        """
        n_kept = positions.shape[-1]
        is_evicted = positions.new_ones(*positions.shape[:2], k_len, dtype=torch.uint8).scatter_(-1, positions, 0)
        order = is_evicted.sort(dim=-1, stable=True).indices
        return cls(order[..., :n_kept], positions.argsort(dim=-1), order[..., n_kept:], k_len)

    @classmethod
    def from_masks(
        cls, is_survivor: torch.Tensor, is_evicted: torch.Tensor, slot_of: torch.Tensor | None = None
    ) -> Eviction:
        """
        The eviction of a press that may treat every head differently.

        Reads the counts of all heads back from the device, once.

        Parameters
        ----------
        is_survivor, is_evicted : torch.Tensor
            Which positions survive and which are evicted now, bool, shape ``(bsz, num_key_value_heads, k_len)``.
        slot_of : torch.Tensor, optional
            The slot that each surviving position has in what the press left, int64, same shape. By default the
            position itself, as a press that masks leaves it.
        """
        k_len = is_survivor.shape[-1]
        is_listed = torch.stack([is_survivor, is_evicted]).view(torch.uint8)
        per_head = is_listed.sum(dim=-1).flatten(1).tolist()
        counts = tuple(zip(*per_head))
        max_survivors, max_evicted = (max(column, default=0) for column in per_head)

        order = is_listed.sort(dim=-1, descending=True, stable=True).indices
        survivors, evicted = order[0, ..., :max_survivors], order[1, ..., :max_evicted]
        slots = survivors if slot_of is None else slot_of.gather(-1, survivors)
        is_even = all(count == (max_survivors, max_evicted) for count in counts)
        return cls(survivors, slots, evicted, k_len, None if is_even else counts)


def masked_positions(
    masked_key_indices: Sequence[torch.Tensor] | None, shape: tuple[int, int, int], device: torch.device
) -> torch.Tensor:
    """
    The positions that ``module.masked_key_indices`` names.

    Parameters
    ----------
    masked_key_indices : sequence of three torch.Tensor, or None
        Batch rows, heads and positions, as kvpress's presses write them, on any device.
    shape : (int, int, int)
        ``(bsz, num_key_value_heads, k_len)``. Indices of positions beyond ``k_len`` are passed over: they stay behind
        when a cache is cut back.

    Returns
    -------
    torch.Tensor
        bool, of this shape.
    """
    bsz, num_key_value_heads, k_len = shape
    masked = torch.zeros(bsz, num_key_value_heads, k_len + 1, dtype=torch.bool, device=device)
    if masked_key_indices is not None:
        batch_indices, head_indices, seq_indices = (index.to(device) for index in masked_key_indices)
        masked[batch_indices, head_indices, seq_indices.clamp(max=k_len)] = True
    return masked[..., :k_len]
