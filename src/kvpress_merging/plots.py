# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of a report. Needs matplotlib, which the package does without otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

try:
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError("plots need matplotlib: pip install 'kvpress-merging[plot]'") from error

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

# Tokens that can still be read beside each other on a screen.
_MOST_TOKENS = 80
# Okabe and Ito's blue, orange and green, which people with any colour vision can tell apart.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
_GREY = "#999999"


def plot_merges(
    merges: pd.DataFrame,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    layer_idx: int,
    head: int,
    batch: int,
    start: int,
    stop: int | None,
) -> Figure:
    """What :meth:`kvpress_merging.MergeReport.plot` draws, of all pairs of the layer."""
    first = merges[merges["eviction"] == 0]
    of_head = first[(first["batch"] == batch) & (first["head"] == head)]
    if of_head.empty:
        lost = sorted(set(zip(first["batch"].tolist(), first["head"].tolist())))
        raise ValueError(
            f"batch row {batch} and head {head} of layer {layer_idx} lost nothing to be drawn; "
            f"these (row, head) did: {', '.join(map(str, lost)) or 'none'}"
        )
    token_ids = input_ids.reshape(-1, input_ids.shape[-1])
    if batch >= len(token_ids):
        raise ValueError(f"input_ids must have a row for batch row {batch}, got shape {tuple(input_ids.shape)}")
    token_ids = token_ids[batch]
    n_seen = int(max(of_head["evicted"].max(), of_head["survivor"].max())) + 1
    if len(token_ids) < n_seen:
        raise ValueError(f"input_ids must be all that was prefilled, at least {n_seen} tokens, got {len(token_ids)}")
    stop = min(start + _MOST_TOKENS, len(token_ids)) if stop is None else stop
    if not 0 <= start < stop <= len(token_ids):
        raise ValueError(f"start and stop must be within 0 and {len(token_ids)}, start first, got {start} and {stop}")

    figure = Figure(figsize=(max(6.0, 0.19 * (stop - start) + 1.2), 4.6), layout="constrained")
    arcs_axes, bars_axes = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    merged = of_head[of_head["weight"] > 0]
    _draw_arcs(arcs_axes, merged, start, stop)
    forgotten = of_head.loc[of_head["weight"] == 0, "evicted"]
    arcs_axes.plot(forgotten, np.zeros(len(forgotten)), "x", color=_GREY, markersize=5)
    arcs_axes.set_title(
        f"layer {layer_idx}, KV head {head}: {len(merged)} of {len(of_head)} evicted tokens merged", fontsize=11
    )

    taken = merged.groupby("survivor")["weight"].sum()
    bars_axes.bar(taken.index, taken, color=_BLUE, width=0.7)
    bars_axes.set_ylabel("weight\ntaken in")
    bars_axes.spines[["top", "right"]].set_visible(False)
    within = taken[(taken.index >= start) & (taken.index < stop)]
    bars_axes.set_ylim(0, 1.1 * float(within.max()) if len(within) else 1.0)
    bars_axes.set_xlim(start - 0.6, stop - 0.4)
    labels = [_word(tokenizer, int(token)) for token in token_ids[start:stop]]
    bars_axes.set_xticks(range(start, stop), labels, rotation=90, fontsize=8, family="monospace", parse_math=False)
    is_evicted = set(of_head["evicted"])
    for position, label in zip(range(start, stop), bars_axes.get_xticklabels()):
        if position in is_evicted:
            label.set_color("#777777")
        else:
            label.set_fontweight("bold")
    return figure


def _draw_arcs(axes: Axes, merged: pd.DataFrame, start: int, stop: int) -> None:
    """Half ellipses between the two positions of each pair that has one of them in ``start`` to ``stop``."""
    is_within = merged[["evicted", "survivor"]].isin(range(start, stop)).any(axis=1)
    # The most similar last, on top.
    drawn = merged[is_within].sort_values("similarity", kind="stable")
    ends = drawn[["evicted", "survivor"]].to_numpy(dtype=float)
    angle = np.linspace(0, np.pi, 100)
    middle, reach = ends.mean(axis=1, keepdims=True), (ends[:, :1] - ends[:, 1:]) / 2
    # By the square root, so that one merge from afar does not flatten all others.
    x, y = middle + reach * np.cos(angle), np.sqrt(np.abs(2 * reach)) * np.sin(angle)
    similarity, weight = drawn["similarity"].to_numpy(), drawn["weight"].to_numpy()
    paths = list(np.stack([x, y], axis=-1))
    arcs = LineCollection(paths, array=similarity, cmap="viridis", linewidths=0.4 + 3 * weight, gid="arcs")
    axes.add_collection(arcs)
    axes.figure.colorbar(arcs, ax=axes, label="cosine similarity", pad=0.01)
    seen = y[(x >= start - 1) & (x <= stop)]
    axes.set_ylim(-0.03 * (seen.max() if seen.size else 1.0), 1.05 * seen.max() if seen.size else 1.0)
    axes.set_yticks([])
    axes.xaxis.set_visible(False)
    axes.spines[:].set_visible(False)


def _word(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """A token as one can read it in a line: spaces and line breaks are shown."""
    word = str(tokenizer.decode([token_id]))
    return word.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") if not word.strip() else word.strip()


def plot_layers(frame: pd.DataFrame) -> Figure:
    """What :meth:`kvpress_merging.MergeReport.plot_layers` draws, of :meth:`kvpress_merging.MergeReport.to_frame`."""
    if frame.empty or not frame["evicted"].sum():
        raise ValueError("nothing was evicted yet, so there is nothing to plot: prefill inside the press first")
    is_fit = "heads" in frame
    figure = Figure(figsize=(7, 4.6 if is_fit else 6), layout="constrained")
    grid: Any = figure.subplots(2 if is_fit else 3, 1, sharex=True)
    for axes in grid:
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    grid[-1].set_xlabel("layer")
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    layers, figures = frame.index.to_numpy(), frame.astype(float)
    if is_fit:
        grid[0].bar(layers, figures["heads"], color="0.85", label="lost positions")
        grid[0].bar(layers, figures["heads_fitted"], color=_GREEN, label="took the fit")
        grid[0].set_ylabel("heads")
        grid[0].yaxis.set_major_locator(MaxNLocator(integer=True))
        grid[1].plot(layers, figures["error_before"], "o-", color=_ORANGE, label="as evicted")
        grid[1].plot(layers, figures["error_after"], "s-", color=_GREEN, label="as left in the end")
        grid[1].set(yscale="log", ylabel="squared error of the\nattention output (relative)")
    else:
        forgotten = figures["evicted"] - figures["merged"]
        grid[0].bar(layers, figures["merged"], color=_BLUE, label="merged")
        grid[0].bar(layers, forgotten, bottom=figures["merged"], color="0.85", label="forgotten")
        grid[0].set_ylabel("evicted positions\n(all heads)")
        grid[1].plot(layers, figures["similarity_q50"], "o-", color=_BLUE, label="median")
        grid[1].plot(layers, figures["similarity_q05"], "v:", color=_ORANGE, label="5 % quantile")
        grid[1].set_ylabel("cosine similarity\nof merges")
        grid[2].plot(layers, 100 * figures["bound_mean"], "o-", color=_GREEN, label="mean, 1 / (1 + w)")
        grid[2].set_ylabel("perturbation\nbound, %")
    for axes in grid:
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
