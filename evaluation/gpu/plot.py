# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""The figures of ``python -m evaluation gpu`` as a plot, for which matplotlib is needed."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any colour vision can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vP"


def plot(figures: dict[str, Any]) -> Figure:
    """How much longer prefills take than with the bare press, and the parts of one layer, against the context."""
    cost = [row for row in figures["rows"] if row["part"] == "cost" and "over_bare" in row]
    layer = [row for row in figures["rows"] if row["part"] == "layer" and "median_seconds" in row]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    kinds = list(dict.fromkeys(row["kind"] for row in cost))
    presses = list(dict.fromkeys(row["press"] for row in cost))
    for kind in kinds:
        for press in presses:
            rows = [row for row in cost if (row["kind"], row["press"]) == (kind, press)]
            style = {"color": COLOURS[kinds.index(kind)], "marker": MARKERS[presses.index(press)]}
            if rows:
                points = [(row["k_len"], 100 * row["over_bare"]) for row in rows]
                left.plot(*zip(*points), label=f"{kind}, {press}", **style)
    left.axhline(0, color="grey", linewidth=0.8)
    _finish(left, cost, "whole prefills", "% longer than with the bare press")
    subjects = list(dict.fromkeys(row["subject"] for row in layer))
    for subject, colour, marker in zip(subjects, COLOURS, MARKERS):
        points = [(row["k_len"], row["median_seconds"]) for row in layer if row["subject"] == subject]
        right.plot(*zip(*points), label=subject, color=colour, marker=marker)
    right.set_yscale("log")
    _finish(right, layer, "one layer", "seconds")
    figure.suptitle(figures["machine"]["name"] + (", a rehearsal" if figures["arguments"]["quick"] else ""))
    return figure


def _finish(axes: Axes, rows: list[dict[str, Any]], title: str, label: str) -> None:
    axes.set(xscale="log", xlabel="tokens", ylabel=label, title=title)
    lengths = sorted({row["k_len"] for row in rows})
    if lengths:
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
