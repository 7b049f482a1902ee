# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""The figures of one layer, kept on its device until they are read, and those of all layers in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvpress_merging.eviction import Eviction

if TYPE_CHECKING:
    import pandas as pd

# Evictions of one layer whose figures are kept apart before they are joined: while decoding there may be one per token.
MAX_PARTS = 64

COLUMNS = ("eviction", "batch", "head", "evicted", "survivor", "similarity", "weight")
"""Of the table that :meth:`MergeReport.merges` gives."""


@dataclass
class Merges:
    """Similarity, weight and target of what one eviction merged, as the kernels return them."""

    similarity: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    n_survivors: int

    def max_per_survivor(self) -> torch.Tensor:
        """The largest number of positions that one survivor took in."""
        # A head without survivors merges nothing, and its targets are all 0.
        shape = (*self.target.shape[:2], max(1, self.n_survivors))
        merges = torch.zeros(shape, dtype=torch.int64, device=self.target.device)
        return merges.scatter_add_(-1, self.target, (self.weight > 0).long()).amax()


@dataclass
class LayerFigures:
    """The figures of one layer, as they lie on the device; ``joined`` are those of earlier evictions, flat."""

    n_survivors: int = 0
    n_evicted: int = 0
    n_queries: int | None = None
    merges: list[Merges] = field(default_factory=list)
    joined: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    heads: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    pairs: list[tuple[Eviction, Merges]] = field(default_factory=list)

    def add_merges(self, merges: Merges) -> None:
        self.merges.append(merges)
        if len(self.merges) > MAX_PARTS:
            self.join()

    def add_heads(self, eviction: Eviction, heads: tuple[torch.Tensor, ...]) -> None:
        """Which heads took matching, the errors of eviction and of it, the output's norm; and which lost positions."""
        has_lost = [n > 0 for _, n in eviction.counts] if eviction.counts else [True] * heads[0].numel()
        self.heads.append((torch.tensor(has_lost, device="cpu"), *heads))
        if len(self.heads) > MAX_PARTS:
            self.heads = [joined(self.heads)]

    def join(self) -> None:
        """Work out the figures of all evictions so far, and keep those alone."""
        if self.merges:
            parts = [*self.joined, *((m.similarity, m.weight, m.max_per_survivor()) for m in self.merges)]
            self.joined, self.merges = [joined(parts)], []

    def read(self) -> dict[str, Any]:
        """Read the figures from the device."""
        row: dict[str, Any] = {"kept": self.n_survivors, "evicted": self.n_evicted, "merged": 0}
        row |= dict.fromkeys(("similarity_mean", "similarity_q05", "similarity_q50", "bound_mean"))
        row["most_merges"] = 0
        if self.heads:
            has_lost, *heads = (part.double().cpu().numpy() for part in joined(self.heads))
            is_matched, eviction_error, matching_error, norm = (part[has_lost > 0] for part in heads)
            error_before, error_after = ((e / norm.clip(min=1e-19)) ** 2 for e in (eviction_error, matching_error))
            row |= {"heads": len(is_matched), "heads_fitted": int(is_matched.sum()), "n_queries": self.n_queries}
            row["error_before"] = float(error_before.mean())
            # What a head is left with: matching's error where it took that.
            row["error_after"] = float(np.where(is_matched > 0, error_after, error_before).mean())
        self.join()
        if not self.joined:
            return row
        similarities, weights, most = (part.cpu().double().numpy() for part in self.joined[0])
        similarity, weight = similarities[weights > 0], weights[weights > 0]
        row["merged"] = len(weight)
        if row["merged"]:
            row["similarity_mean"] = float(similarity.mean())
            row["similarity_q05"], row["similarity_q50"] = np.quantile(similarity, (0.05, 0.5)).tolist()
            row["bound_mean"] = float((1 / (1 + weight)).mean())
            row["most_merges"] = int(most.max())
        return row


def joined(parts: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat([tensor.flatten() for tensor in tensors]) for tensors in zip(*parts))


def pairs_to_frame(number: int, eviction: Eviction, merges: Merges) -> pd.DataFrame:
    """The pairs of one eviction, read from the device: one row each, without padding."""
    import pandas as pd

    bsz, num_key_value_heads, n_evicted = eviction.evicted.shape
    counts = eviction.counts or ((0, n_evicted),) * (bsz * num_key_value_heads)
    is_real = np.arange(n_evicted) < np.array([n for _, n in counts])[:, None]
    row = np.nonzero(is_real)[0]
    # Without any survivor there is nothing for a target to point at.
    targets = eviction.survivors.gather(-1, merges.target) if eviction.survivors.shape[-1] else merges.target
    evicted, survivor, similarity, weight = (
        tensor.flatten(0, 1).cpu().numpy()[is_real]
        for tensor in (eviction.evicted, targets, merges.similarity, merges.weight)
    )
    survivor = np.where(np.isneginf(similarity), -1, survivor)
    columns = (number, row // num_key_value_heads, row % num_key_value_heads, evicted, survivor, similarity, weight)
    return pd.DataFrame(dict(zip(COLUMNS, columns)))


def in_words(rows: list[dict[str, Any]]) -> str:
    """What the figures of all layers come to, in one line."""
    kept, evicted, merged = (sum(row[name] for row in rows) for name in ("kept", "evicted", "merged"))
    if not evicted:
        return f"{len(rows)} layers, nothing evicted"
    line = f"{len(rows)} layers: {evicted} positions evicted, "
    if matched := [row for row in rows if "heads" in row]:
        heads, n_matched = (sum(row[name] for row in matched) for name in ("heads", "heads_fitted"))
        before, after = (_mean(matched, name, "heads") for name in ("error_before", "error_after"))
        line += f"{kept} kept, {n_matched} of {heads} heads matched; "
        return line + f"squared error of the attention output {before:.1%} before, {after:.1%} after"
    line += f"{merged} merged ({merged / evicted:.0%}) into {kept} kept"
    if rows := [row for row in rows if row["merged"]]:
        similarity, bound = (_mean(rows, name, "merged") for name in ("similarity_mean", "bound_mean"))
        most = max(row["most_merges"] for row in rows)
        line += f"; mean similarity {similarity:.2f}, perturbation bound {bound:.0%}, at most {most} into one"
    return line


def _mean(rows: list[dict[str, Any]], name: str, weight: str) -> float:
    return float(np.average([row[name] for row in rows], weights=[row[weight] for row in rows]))
