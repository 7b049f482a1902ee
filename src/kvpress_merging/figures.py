# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What is kept of one layer, on its device until it is read, and how it reads: as figures, as pairs and in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels.match import relative_square

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("eviction", "batch", "head", "evicted", "survivor", "similarity", "weight")
"""Of the table that :meth:`MergeReport.merges` gives."""

Merges: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]
"""Similarity, weight and target of what was evicted, as the kernels return them, and the survivors that a head has."""


@dataclass
class Layer:
    """What is kept of one layer."""

    n_survivors: int = 0
    n_evicted: int = 0
    n_queries: int | None = None
    merges: list[Merges] = field(default_factory=list)
    # Of each head: whether it lost positions, whether it took the fit, how many took a place, both errors and the norm.
    heads: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    pairs: list[tuple[Eviction, Merges]] = field(default_factory=list)

    def join(self) -> None:
        """Keep one part in place of many."""
        if self.merges:
            self.merges = [as_one_head(self.merges)]
        if self.heads:
            self.heads = [tuple(torch.cat([part.flatten() for part in parts]) for parts in zip(*self.heads))]

    def read(self) -> dict[str, Any]:
        """Read the figures from the device."""
        self.join()
        row: dict[str, Any] = {"kept": self.n_survivors, "evicted": self.n_evicted, "merged": 0}
        row |= dict.fromkeys(("similarity_mean", "similarity_q05", "similarity_q50", "bound_mean"))
        row["most_merges"] = 0
        if self.heads:
            has_lost, *heads = (column.cpu() for column in self.heads[0])
            is_fitted, exchanged, of_eviction, of_matching, norm = (column[has_lost] for column in heads)
            error_before, error_after = (relative_square(e.double(), norm.double()) for e in (of_eviction, of_matching))
            # What a head is left with: matching's error where it took that.
            error_after = torch.where(is_fitted, error_after, error_before)
            row |= {"heads": len(is_fitted), "heads_fitted": int(is_fitted.sum()), "n_queries": self.n_queries}
            row["exchanged"] = int(exchanged[is_fitted].sum())
            row |= {"error_before": float(error_before.mean()), "error_after": float(error_after.mean())}
        if self.merges:
            columns = [column.flatten().cpu().double().numpy() for column in self.merges[0][:3]]
            similarity, weight, survivor = (column[columns[1] > 0] for column in columns)
            row["merged"] = len(weight)
        if row["merged"]:
            row["similarity_mean"] = float(similarity.mean())
            row["similarity_q05"], row["similarity_q50"] = np.quantile(similarity, (0.05, 0.5)).tolist()
            row["bound_mean"] = float((1 / (1 + weight)).mean())
            row["most_merges"] = int(np.unique(survivor, return_counts=True)[1].max())
        return row


def as_one_head(parts: list[Merges]) -> Merges:
    """Several evictions as if they were one of a single head, which has the survivors of all of theirs."""
    columns, n_before = [], 0
    for similarity, weight, target, n_survivors in parts:
        n_heads = target.shape[:2].numel()
        first = n_before + n_survivors * torch.arange(n_heads, device=target.device).view(*target.shape[:2], 1)
        columns.append([similarity.flatten(), weight.flatten(), (first + target).flatten()])
        n_before += n_heads * n_survivors
    similarity, weight, target = (torch.cat(column)[None, None] for column in zip(*columns))
    return similarity, weight, target, n_before


def pairs_to_frame(number: int, eviction: Eviction, merges: Merges) -> pd.DataFrame:
    """The pairs of one eviction, read from the device: one row each, without padding."""
    import pandas as pd

    target, n_survivors = merges[2:]
    num_key_value_heads, n_evicted = eviction.evicted.shape[1:]
    is_real = np.arange(n_evicted) < np.array([n for _, n in eviction.counts_of_heads])[:, None]
    row = np.nonzero(is_real)[0]
    # Without any survivor there is nothing for a target to point at.
    survivors = eviction.survivors.gather(-1, target) if n_survivors else target
    evicted, survivor, similarity, weight = (
        tensor.flatten(0, 1).cpu().numpy()[is_real] for tensor in (eviction.evicted, survivors, *merges[:2])
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
        exchanged = sum(row["exchanged"] for row in matched)
        line += f"{kept} kept, {n_matched} of {heads} heads matched, {exchanged} places exchanged; "
        return line + f"squared error of the attention output {before:.1%} before, {after:.1%} after"
    line += f"{merged} merged ({merged / evicted:.0%}) into {kept} kept"
    if rows := [row for row in rows if row["merged"]]:
        similarity, bound = (_mean(rows, name, "merged") for name in ("similarity_mean", "bound_mean"))
        most = max(row["most_merges"] for row in rows)
        line += f"; mean similarity {similarity:.2f}, perturbation bound {bound:.0%}, at most {most} into one"
    return line


def _mean(rows: list[dict[str, Any]], name: str, weight: str) -> float:
    return float(np.average([row[name] for row in rows], weights=[row[weight] for row in rows]))
