# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""The figures of one layer, collected on its device, and those of all layers in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from kvpress_merging.eviction import Eviction
from kvpress_merging.pairs import Pairs

# Evictions of one layer whose figures are kept apart before they are joined: while decoding there may be one per token.
_MOST_PARTS = 64


@dataclass
class LayerReport:
    """The figures of one layer since its last prefill, as they lie on the device; see :class:`MergeReport`."""

    n_survivors: int = 0
    n_evicted: int = 0
    similarities: list[torch.Tensor] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    targets: list[tuple[torch.Tensor, torch.Tensor, int]] = field(default_factory=list)
    most_merges: list[torch.Tensor] = field(default_factory=list)
    new_fits: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    fits: list[torch.Tensor] = field(default_factory=list)
    has_lost: list[bool] = field(default_factory=list)
    pairs: list[Pairs] = field(default_factory=list)

    def add(self, similarity: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, n_survivors: int) -> None:
        """Note one eviction. How many merges a survivor took in is worked out when it is read."""
        self.similarities.append(similarity)
        self.weights.append(weight)
        self.targets.append((weight, target, n_survivors))
        if len(self.weights) > _MOST_PARTS:
            self.similarities, self.weights = [_joined(self.similarities)], [_joined(self.weights)]
            self._count_merges()

    def _count_merges(self) -> None:
        for weight, target, n_survivors in self.targets:
            merges = torch.zeros(*target.shape[:2], n_survivors, dtype=torch.int64, device=target.device)
            self.most_merges.append(merges.scatter_add_(-1, target, (weight > 0).long()).amax())
        self.targets.clear()
        if self.most_merges:
            self.most_merges = [torch.stack(self.most_merges).amax()]

    def add_fits(self, eviction: Eviction, fits: tuple[torch.Tensor, ...]) -> None:
        """Note one eviction. The relative errors are worked out when they are read."""
        self.new_fits.append(fits)
        if eviction.counts is None:
            self.has_lost += [True] * fits[0].numel()
        else:
            self.has_lost += [n_evicted > 0 for _, n_evicted in eviction.counts]
        if len(self.new_fits) > _MOST_PARTS:
            self._relate_errors()

    def _relate_errors(self) -> None:
        for is_fitted, eviction_error, matching_error, output_norm in self.new_fits:
            norm = output_norm.clamp(min=1e-19)
            relative = ((error / norm).square() for error in (eviction_error, matching_error))
            self.fits.append(torch.stack([is_fitted.float(), *relative]).flatten(1))
        self.new_fits.clear()
        if self.fits:
            self.fits = [torch.cat(self.fits, dim=1)]

    def summary(self) -> dict[str, Any]:
        """Read the figures from the device."""
        row: dict[str, Any] = {"kept": self.n_survivors, "evicted": self.n_evicted, "merged": 0}
        row |= dict.fromkeys(("similarity_mean", "similarity_q05", "similarity_q50", "bound_mean"))
        row["most_merges"] = 0
        self._relate_errors()
        if self.fits:
            fits = self.fits[0].double().cpu()[:, torch.tensor(self.has_lost)]
            is_fitted, error_before, error_after = fits
            row["heads"], row["heads_fitted"] = len(is_fitted), int(is_fitted.sum())
            row["error_before"] = float(error_before.mean())
            # What a head is left with: the fit's error where it took the fit.
            row["error_after"] = float(torch.where(is_fitted > 0, error_after, error_before).mean())
        if not self.weights:
            return row
        self._count_merges()
        weight = _joined(self.weights)
        is_merged = weight > 0
        similarity = _joined(self.similarities)[is_merged].double()
        bound = 1 / (1 + weight[is_merged].double())
        row["merged"] = int(is_merged.sum())
        if row["merged"]:
            # torch.quantile takes at most 2**24 elements
            ranked = similarity.sort().values
            row["similarity_mean"] = float(similarity.mean())
            row["similarity_q05"], row["similarity_q50"] = (_quantile(ranked, q) for q in (0.05, 0.5))
            row["bound_mean"] = float(bound.mean())
            row["most_merges"] = int(self.most_merges[0])
        return row


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


def _quantile(ranked: torch.Tensor, q: float) -> float:
    """The quantile of a sorted vector, interpolated linearly as ``torch.quantile`` does."""
    position = q * (len(ranked) - 1)
    low = int(position)
    high = min(low + 1, len(ranked) - 1)
    return float(ranked[low] + (ranked[high] - ranked[low]) * (position - low))


def in_words(rows: list[dict[str, Any]]) -> str:
    """What the summaries of all layers come to, in one line."""
    kept, evicted, merged = (sum(row[name] for row in rows) for name in ("kept", "evicted", "merged"))
    if not evicted:
        return f"{len(rows)} layers, nothing evicted"
    line = f"{len(rows)} layers: {evicted} positions evicted, "
    if fits := [row for row in rows if "heads" in row]:
        heads, heads_fitted = (sum(row[name] for row in fits) for name in ("heads", "heads_fitted"))
        before, after = (_mean(fits, name, "heads") for name in ("error_before", "error_after"))
        line += f"{kept} kept, {heads_fitted} of {heads} heads re-fitted; "
        return line + f"squared error of the attention output {before:.1%} before, {after:.1%} after"
    line += f"{merged} merged ({merged / evicted:.0%}) into {kept} kept"
    if not merged:
        return line
    with_merges = [row for row in rows if row["merged"]]
    similarity, bound = (_mean(with_merges, name, "merged") for name in ("similarity_mean", "bound_mean"))
    most = max(row["most_merges"] for row in with_merges)
    return f"{line}; mean similarity {similarity:.2f}, perturbation bound {bound:.0%}, at most {most} into one"


def _mean(rows: list[dict[str, Any]], name: str, weight: str) -> float:
    return float(sum(row[name] * row[weight] for row in rows) / sum(row[weight] for row in rows))
