# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Plots of a report: lines against the compression ratio, the cache at equal quality, differences as a heat map."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from evaluation.report.tables import ALPHA, number

# Okabe and Ito's palette, which people with any colour vision can tell apart, without its yellow and black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vPX*<>"
_LINES = {"bare": (0, (4, 2)), "merged": "-", "matching": (0, (1, 1.2))}
_VARIANT_LINES = ((0, (6, 1.5, 1, 1.5)), (0, (6, 1, 1, 1, 1, 1)), (0, (9, 2)))

_HOLLOW: dict[str, Any] = {"markerfacecolor": "none"}

# What stands for the colour of text, which is black in a file and the page's own in a page.
_INK = "#010203"

_STYLE: dict[str, Any] = {
    "font.size": 11,
    "font.family": "sans-serif",
    # A short list: an SVG repeats it at each text.
    "font.sans-serif": ["DejaVu Sans"],
    "svg.fonttype": "none",
    # A name may hold dollar signs.
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#88888840",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"), _INK
    ),
}


@dataclass(frozen=True)
class Plot:
    """A figure, its title, and the name of its files: a number, words and the kind of plot, with hyphens between."""

    name: str
    title: str
    figure: Figure


class Styles:
    """One colour and marker for each press, one line for each kind, over all plots of a report."""

    def __init__(self, presses: Sequence[str], kinds: Sequence[str]):
        self._places = {press: i for i, press in enumerate(presses)}
        variants = [kind for kind in kinds if kind not in _LINES]
        self._lines = {**_LINES, **{kind: _VARIANT_LINES[i % 3] for i, kind in enumerate(variants)}}

    def of_press(self, press: str) -> dict[str, Any]:
        """Colour and marker; grey for a press that no run has."""
        if press not in self._places:
            return {"color": "#777777", "marker": "o"}
        place = self._places[press]
        return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}

    def of_kind(self, kind: str) -> Any:
        """Line style."""
        return self._lines[kind]


def plot_lines(
    points: pd.DataFrame,
    styles: Styles,
    ylabel: str,
    *,
    full: float | None = None,
    references: Sequence[dict[str, Any]] = (),
    panels: bool = False,
) -> Figure:
    """
    A value against the compression ratio, one line for each press and kind.

    Parameters
    ----------
    points : pd.DataFrame
        Columns ``press``, ``kind``, ``ratio`` and ``value``, and ``low`` and ``high``, the ends of its interval: drawn
        in panels alone.
    full : float, optional
        With the full cache, drawn as a line.
    references : sequence of dict
        Published values, drawn as hollow markers: ``press``, ``compression_ratio`` and ``score``.
    panels : bool
        Whether each press has a panel of its own.
    """
    with mpl.rc_context(_style()):
        points = points.dropna(subset=["ratio", "value"])
        presses = list(points["press"].unique())
        panels = panels and bool(presses)
        n_columns = min(3, len(presses)) if panels else 1
        n_rows = math.ceil(len(presses) / n_columns) if panels else 1
        size = (max(5, 3.2 * n_columns), 2.6 * n_rows + 1.1) if panels else (5, 4.4)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(presses) if panels else 1 :]:
            axes.set_visible(False)
        for axes in grid.flat[max(0, len(presses) - n_columns) : len(presses)]:
            axes.tick_params(labelbottom=True)  # also where the row below has no panel
        if full is not None:
            for axes in grid.flat:
                axes.axhline(full, color=_INK, linewidth=1.2, alpha=0.6, gid="full-cache")
        for (press, kind), line in points.groupby(["press", "kind"], sort=False):
            axes = grid.flat[presses.index(press) if panels else 0]
            line = line.sort_values("ratio", kind="stable")
            style = styles.of_press(press)
            axes.plot(
                line["ratio"], line["value"], **style, linestyle=styles.of_kind(kind), markersize=5, linewidth=1.8
            )
            if panels:
                axes.fill_between(
                    line["ratio"], line["low"], line["high"], color=style["color"], alpha=0.15, linewidth=0
                )
                axes.set_title(press, fontsize=10)
        for row in references:
            if panels and row["press"] not in presses:
                continue
            axes = grid.flat[presses.index(row["press"]) if panels else 0]
            style = styles.of_press(row["press"])
            place = [float(row["compression_ratio"])], [float(row["score"])], style["marker"]
            axes.plot(*place, color=style["color"], **_HOLLOW, markersize=13, markeredgewidth=2, zorder=4)
        figure.supxlabel("compression ratio", fontsize=11)
        figure.supylabel(ylabel, fontsize=11)
        grid.flat[0].margins(y=0.08)
        if points["ratio"].nunique() <= 6:
            grid.flat[0].set_xticks(sorted(points["ratio"].unique()))
        handles = [_handle(kind, linestyle=styles.of_kind(kind), linewidth=1.8) for kind in points["kind"].unique()]
        if full is not None:
            handles.append(_handle("full cache", linewidth=1.2, alpha=0.6))
        if references:
            handles.append(_handle("published", marker="o", linestyle="none", markersize=9, **_HOLLOW))
        figure.legend(handles=handles, loc="outside upper left", ncols=4 if n_columns > 1 else 2)
        if not panels:
            markers = [_handle(press, linestyle="none", **styles.of_press(press)) for press in presses]
            figure.legend(handles=markers, loc="outside lower left", ncols=3)
    return figure


def plot_kept_shares(table: pd.DataFrame, styles: Styles, metric: str) -> Figure:
    """
    The share of the cache that the bare press needs, against the one that the wrapper keeps: one panel for each kind.

    ``table`` has rows of one benchmark and one metric, see ``equal_quality.COLUMNS``. Above the diagonal the wrapper
    takes less. Where no share of those measured has the score, nothing is drawn.
    """
    table = table.dropna(subset=["needed_share"])
    kinds, presses = list(table["kind"].unique()), list(table["press"].unique())
    n_columns = min(3, len(kinds))
    n_rows = math.ceil(len(kinds) / n_columns)
    with mpl.rc_context(_style()):
        figure = Figure(figsize=(max(5, 3.8 * n_columns), 3.6 * n_rows + 1.1), layout="constrained")
        grid = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True)
        for axes in list(grid.flat)[len(kinds) :]:
            axes.set_visible(False)
        for axes, kind in zip(grid.flat, kinds):
            axes.plot([0, 100], [0, 100], color=_INK, linewidth=1.2, alpha=0.6)
            axes.set_title(kind, fontsize=10)
            for press, line in table[table["kind"] == kind].groupby("press", sort=False):
                line = line.sort_values("kept_share", kind="stable")
                style = styles.of_press(press)
                # What the interval's ends need.
                ends = [line["kept_share"] / (1 - line[end]) - line["needed_share"] for end in ("low", "high")]
                axes.errorbar(
                    100 * line["kept_share"],
                    100 * line["needed_share"],
                    100 * np.abs(ends),
                    **style,
                    markersize=5,
                    linewidth=1.5,
                    elinewidth=1,
                )
            axes.set(xlim=(0, 100), ylim=(0, 100), aspect="equal")
        figure.supxlabel("cache that the wrapper keeps, %", fontsize=11)
        figure.supylabel(f"cache that the bare press needs\nfor the same {metric}, %", fontsize=11)
        handles = [_handle(press, linestyle="none", **styles.of_press(press)) for press in presses]
        handles.append(_handle("no gain", linewidth=1.2, alpha=0.6))
        figure.legend(handles=handles, loc="outside upper left", ncols=4 if n_columns > 1 else 2)
    return figure


def plot_heat_map(table: pd.DataFrame, title: str) -> Figure:
    """
    Differences, task by ratio: one panel for each press and kind, or one row each where there is one task only.

    ``table`` has rows of one benchmark and one metric, see ``compare.COLUMNS``; the title is that of the colour bar.
    """
    table = table.assign(label=[f"{press}, {kind}" for press, kind in zip(table["press"], table["kind"])])
    levels = list(table.sort_values("compression_ratio", kind="stable")["level"].unique())
    if table["task"].nunique() == 1:
        panels, row_column = [("", table)], "label"
    else:
        panels, row_column = [(str(label), panel) for label, panel in table.groupby("label", sort=False)], "task"
    rows = list(table[row_column].unique())
    n_columns = min(3 if len(levels) <= 4 else 2, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    lower = table["direction"].iloc[0].startswith("lower")
    limit = float(table["difference"].abs().max()) or 1.0
    with mpl.rc_context(_style(**{"axes.grid": False})):
        panel_width = 0.75 * len(levels) + 0.3
        margin = 0.085 * max(map(len, rows)) + 0.5
        panel_height = 0.34 * len(rows) + 0.75
        size = (max(panel_width * n_columns + margin, 5), panel_height * n_rows + 1.1)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True)
        image: Any = None
        for axes, (label, panel) in zip(grid.flat, panels):
            index = {"index": row_column, "columns": "level", "sort": False}
            tables = (panel.pivot_table(values=name, **index) for name in ("difference", "p_holm"))
            values, shown = (each.reindex(index=rows, columns=levels) for each in tables)
            # Not an image, which an SVG would hold as pixels.
            colours = {"cmap": "RdBu_r" if lower else "RdBu", "norm": TwoSlopeNorm(0, -limit, limit)}
            image = axes.pcolormesh(values.to_numpy(), **colours)
            for i, j in np.ndindex(values.shape):
                value = float(values.iloc[i, j])
                if math.isfinite(value):
                    text = number(value, signed=True)
                    colour = "white" if abs(value) > 0.6 * limit else "black"
                    star = "*" if shown.iloc[i, j] < ALPHA else ""
                    axes.text(j + 0.5, i + 0.5, text + star, ha="center", va="center", fontsize=9, color=colour)
            axes.set_xticks(np.arange(len(levels)) + 0.5, levels, rotation=0 if max(map(len, levels)) < 6 else 30)
            axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set_title(label.replace(", ", "\n", 1) if len(label) > 8 * panel_width else label, fontsize=10)
        grid.flat[0].invert_yaxis()
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        bar = figure.colorbar(image, ax=grid, location="bottom", fraction=0.06, aspect=40, shrink=0.8)
        # Leftwards from its right end, under the names of the rows: centred, a long one runs off the figure.
        bar.set_label(f"{title}\nblue is better, * is p < {ALPHA} after Holm", fontsize=9.5, loc="right")
        bar.outline.set_visible(False)
    return figure


def save(plot: Plot, folder: Path) -> str:
    """
    Write a plot as PNG and SVG: the same bytes for the same figure.

    Out comes the SVG to be put into a page: without background, its text in the page's colour.
    """
    # Salted with the name, so that no two plots of one page share an id.
    with mpl.rc_context(_style(**{"svg.hashsalt": plot.name})):
        plot.figure.savefig(folder / f"{plot.name}.png", dpi=100, metadata={"Software": None})
        plot.figure.savefig(folder / f"{plot.name}.svg", metadata={"Date": None})
        file = io.StringIO()
        plot.figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\n\s*", "\n", re.sub(r'<g id="[^"]*"', "<g", svg))
    number, *_, kind = plot.name.split("-")
    for before in ('id="', "url(#", 'href="#'):
        svg = svg.replace(before, f"{before}{kind}{number}-")
    return svg


def _style(**more: Any) -> Any:
    return {**_STYLE, **more}


def _handle(label: str, **style: Any) -> Line2D:
    return Line2D([], [], label=label, **{"color": _INK, **style})
