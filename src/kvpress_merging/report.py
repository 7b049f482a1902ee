# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What was merged, per layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from kvpress_merging.eviction import Eviction

if TYPE_CHECKING:
    import pandas as pd

# Evictions of one layer whose figures are kept apart before they are joined: while decoding there may be one per token.
_MOST_PARTS = 64


@dataclass
class LayerReport:
    """The figures of one layer since its last prefill, as they lie on the device."""

    n_survivors: int = 0
    n_evicted: int = 0
    similarities: list[torch.Tensor] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    most_merges: list[torch.Tensor] = field(default_factory=list)
    fits: list[torch.Tensor] = field(default_factory=list)
    has_lost: list[bool] = field(default_factory=list)

    def add(self, similarity: torch.Tensor, weight: torch.Tensor, most_merges: torch.Tensor) -> None:
        self.similarities.append(similarity.flatten())
        self.weights.append(weight.flatten())
        self.most_merges.append(most_merges.flatten())
        if len(self.weights) > _MOST_PARTS:
            self.similarities = [torch.cat(self.similarities)]
            self.weights = [torch.cat(self.weights)]
            self.most_merges = [torch.cat(self.most_merges).amax(dim=0, keepdim=True)]

    def summary(self) -> dict[str, Any]:
        """Read the figures from the device."""
        row: dict[str, Any] = {"kept": self.n_survivors, "evicted": self.n_evicted, "merged": 0}
        row |= dict.fromkeys(("similarity_mean", "similarity_q05", "similarity_q50", "bound_mean"))
        row["most_merges"] = 0
        if self.fits:
            fits = torch.cat(self.fits, dim=1).double().cpu()[:, torch.tensor(self.has_lost)]
            is_fitted, error_before, error_after = fits
            row["heads"], row["heads_fitted"] = len(is_fitted), int(is_fitted.sum())
            row["error_before"] = float(error_before.mean())
            # What a head is left with: the fit's error where it took the fit.
            row["error_after"] = float(torch.where(is_fitted > 0, error_after, error_before).mean())
        if not self.weights:
            return row
        weight = torch.cat(self.weights)
        is_merged = weight > 0
        similarity = torch.cat(self.similarities)[is_merged].double()
        bound = 1 / (1 + weight[is_merged].double())
        row["merged"] = int(is_merged.sum())
        if row["merged"]:
            # torch.quantile takes at most 2**24 elements
            ranked = similarity.sort().values
            row["similarity_mean"] = float(similarity.mean())
            row["similarity_q05"], row["similarity_q50"] = (_quantile(ranked, q) for q in (0.05, 0.5))
            row["bound_mean"] = float(bound.mean())
            row["most_merges"] = int(torch.cat(self.most_merges).max())
        return row


class MergeReport:
    """
    What a press merged, layer by layer, since each layer's last prefill.

    Collecting costs no device synchronisation: the figures stay on the device (8 bytes per evicted position and head)
    until one of the methods reads them.

    Each layer's row has

    - ``kept``: positions left after the last eviction, summed over batch rows and heads;
    - ``evicted``, ``merged``: positions, summed over batch rows, heads and evictions;
    - ``similarity_mean``, ``similarity_q05``, ``similarity_q50``: cosine similarity of the merged positions to the
      survivor that took them in: mean, 5 % and 50 % quantile;
    - ``bound_mean``: mean of ``1 / (1 + w)``, to which a merge of weight ``w`` shrinks the distance between an evicted
      value and the one that stands for it, where the survivor takes in no other;
    - ``most_merges``: the largest number of positions that one survivor took in at one eviction.

    Figures that are not defined, since nothing was merged, are None. A press that re-fits instead of merging adds

    - ``heads``, ``heads_fitted``: heads (times batch rows and evictions) that lost positions, and those of them that
      took the fit;
    - ``error_before``, ``error_after``: their mean squared error of the attention output over reference queries,
      relative to the output's, as eviction leaves it and as it is left in the end.
    """

    def __init__(self) -> None:
        self._layers: dict[int, LayerReport] = {}

    def start(self, layer_idx: int) -> None:
        """Forget a layer: it is prefilled anew."""
        self._layers[layer_idx] = LayerReport()

    def record(self, layer_idx: int, eviction: Eviction) -> None:
        """Note an eviction."""
        layer = self._layers.setdefault(layer_idx, LayerReport())
        layer.n_survivors = eviction.n_survivors
        layer.n_evicted += eviction.n_evicted

    def record_merges(
        self, layer_idx: int, similarity: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, n_survivors: int
    ) -> None:
        """
        Note what one eviction merged.

        Parameters
        ----------
        layer_idx : int
            The layer.
        similarity, weight : torch.Tensor
            Per evicted position, float32, shape ``(bsz, num_key_value_heads, n_evicted)``; weight 0 where not merged.
        target : torch.Tensor
            The survivor's index, int64, same shape.
        n_survivors : int
            Number of survivors that a head has at most.
        """
        # A head without survivors merges nothing, and its targets are all 0.
        merges = torch.zeros(*target.shape[:2], max(1, n_survivors), dtype=torch.int64, device=target.device)
        merges.scatter_add_(-1, target, (weight > 0).long())
        layer = self._layers.setdefault(layer_idx, LayerReport())
        layer.add(similarity, weight, merges.amax())

    def record_fit(
        self,
        layer_idx: int,
        eviction: Eviction,
        is_fitted: torch.Tensor,
        error_before: torch.Tensor,
        error_after: torch.Tensor,
    ) -> None:
        """
        Note what one eviction's re-fit did.

        Parameters
        ----------
        layer_idx : int
            The layer.
        eviction : Eviction
            What was evicted.
        is_fitted : torch.Tensor
            Which heads took the fit, bool, shape ``(bsz, num_key_value_heads)``.
        error_before, error_after : torch.Tensor
            Relative squared errors of eviction and of the fit, float32, same shape.
        """
        layer = self._layers.setdefault(layer_idx, LayerReport())
        layer.fits.append(torch.stack([is_fitted.float(), error_before, error_after]).flatten(1))
        if eviction.counts is None:
            layer.has_lost += [True] * is_fitted.numel()
        else:
            layer.has_lost += [n_evicted > 0 for _, n_evicted in eviction.counts]
        if len(layer.fits) > _MOST_PARTS:
            layer.fits = [torch.cat(layer.fits, dim=1)]

    def to_dict(self) -> dict[int, dict[str, Any]]:
        """One dict of figures per layer, by layer index."""
        return {layer_idx: self._layers[layer_idx].summary() for layer_idx in sorted(self._layers)}

    def to_frame(self) -> pd.DataFrame:
        """One row per layer, indexed by ``layer``."""
        import pandas as pd

        frame = pd.DataFrame.from_dict(self.to_dict(), orient="index")
        return frame.rename_axis(index="layer")

    def __str__(self) -> str:
        rows = list(self.to_dict().values())
        total = {name: sum(int(row[name] or 0) for row in rows) for name in ("kept", "evicted", "merged")}
        if not total["evicted"]:
            return f"{len(rows)} layers, nothing evicted"
        if any("heads" in row for row in rows):
            return self._fits_in_words(rows, total)
        line = f"{len(rows)} layers: {total['evicted']} positions evicted, {total['merged']} merged"
        line += f" ({total['merged'] / total['evicted']:.0%}) into {total['kept']} kept"
        if total["merged"]:
            means = {name: _weighted_mean(rows, name) for name in ("similarity_mean", "bound_mean")}
            most = max(int(row["most_merges"] or 0) for row in rows)
            line += f"; mean similarity {means['similarity_mean']:.2f}, perturbation bound {means['bound_mean']:.0%}"
            line += f", at most {most} into one"
        return line

    @staticmethod
    def _fits_in_words(rows: list[dict[str, Any]], total: dict[str, int]) -> str:
        fits = [row for row in rows if "heads" in row]
        heads, fitted = (sum(row[name] for row in fits) for name in ("heads", "heads_fitted"))
        before, after = (
            sum(row[name] * row["heads"] for row in fits) / heads for name in ("error_before", "error_after")
        )
        line = (
            f"{len(rows)} layers: {total['evicted']} positions evicted, {total['kept']} kept, {fitted} of {heads} heads"
        )
        return f"{line} re-fitted; squared error of the attention output {before:.1%} before, {after:.1%} after"

    __repr__ = __str__


def _weighted_mean(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row[name] * row["merged"] for row in rows if row["merged"]) / sum(row["merged"] for row in rows)


def _quantile(ranked: torch.Tensor, q: float) -> float:
    """The quantile of a sorted vector, interpolated linearly as ``torch.quantile`` does."""
    position = q * (len(ranked) - 1)
    low = int(position)
    high = min(low + 1, len(ranked) - 1)
    return float(ranked[low] + (ranked[high] - ranked[low]) * (position - low))
