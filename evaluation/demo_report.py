# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What the demo found, in a terminal and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from rich import box
from rich.console import Console
from rich.table import Table

from evaluation.fidelity import Fidelity

if TYPE_CHECKING:
    from evaluation.demo import Comparison, NeedleAnswer

# Okabe and Ito's palette, which people with any colour vision can tell apart.
STYLES = {"evicted": ("#555555", "o"), "merged": ("#0072B2", "D"), "matched": ("#009E73", "s")}
"""Colour and marker of each method in the plot."""


def show(comparisons: Sequence[Comparison], answers: Sequence[NeedleAnswer], question: str, number: str) -> None:
    """Print the comparison as a table, what it comes to in words, and what the model answered."""
    full = comparisons[0].results["evicted"]
    table = Table(
        title=f"Distance from the full cache (windows: {len(full)})",
        caption="merged: MergingPress, matched: AttentionMatchingPress (a re-fit).\n"
        "KL and NLL: nats per token, mean. seconds: of the prefill, median.\n"
        "change: of KL against eviction, below 0 is nearer to the full cache.",
        box=box.HORIZONTALS,
        pad_edge=False,
    )
    table.add_column("press", no_wrap=True)
    table.add_column("cache")
    for name in ("MB", "KL", "change", "NLL", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    nll, seconds = comparisons[0].mean("evicted", "nll_full"), _median(full, "prefill_seconds_full")
    table.add_row("none", "full", _megabytes(full[0].cache_bytes_full), "0", "", f"{nll:.3f}", f"{seconds:.2f}")
    for comparison in comparisons:
        table.add_section()
        for method, results in comparison.results.items():
            change = comparison.kl_change(method)
            table.add_row(
                comparison.label if method == "evicted" else "",
                method,
                _megabytes(results[0].cache_bytes),
                f"{comparison.mean(method, 'kl'):.4f}",
                "" if method == "evicted" else f"[{'green' if change < 0 else 'red'}]{change:+.1f} %[/]",
                f"{comparison.mean(method, 'nll'):.3f}",
                f"{_median(results, 'prefill_seconds'):.2f}",
            )
    Console().print(table)
    for method, what in (("merged", "Merging"), ("matched", "Re-fitting")):
        print(verdict(comparisons, method, what))

    print(f"\nNeedle: the context says {number}. Asked: {question.strip()}")
    width = max(len(answer.cache) for answer in answers)
    for answer in answers:
        print(f"  {answer.cache:{width}}  {'found ' if answer.found else 'missed'}  {' '.join(answer.answer.split())}")


def verdict(comparisons: Sequence[Comparison], method: str, what: str) -> str:
    """One line: where a method brought the model nearer to the full cache, and where it did not."""
    nearer = [comparison.label for comparison in comparisons if comparison.kl_change(method) < 0]
    not_nearer = [comparison.label for comparison in comparisons if comparison.kl_change(method) >= 0]
    return (
        f"{what} lowered KL in {len(nearer)} of {len(comparisons)} comparisons"
        + (f" ({', '.join(nearer)})" if nearer else "")
        + (f", and did not for {', '.join(not_nearer)}." if not_nearer else ".")
    )


def plot(comparisons: Sequence[Comparison], subtitle: str, file: Path) -> None:
    """
    Draw what the table says, with every window as a dot.

    Parameters
    ----------
    comparisons : Sequence[Comparison]
        What was measured.
    subtitle : str
        Names the model and the text.
    file : Path
        Where the PNG goes.
    """
    # A figure of its own rather than pyplot's: no global backend to choose, and it works where there is no display.
    figure = Figure(figsize=(12, len(comparisons) + 1.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for row, comparison in enumerate(comparisons):
        for offset, (method, results) in zip((-0.27, 0.0, 0.27), comparison.results.items()):
            place, (colour, marker) = row + offset, STYLES[method]
            values = [fidelity.kl for fidelity in results]
            left.plot(values, [place] * len(values), marker, color=colour, alpha=0.45, markersize=6, mew=0)
            mean = comparison.mean(method, "kl")
            left.plot([mean, mean], [place - 0.12, place + 0.12], color=colour, linewidth=3)
            left.annotate(
                f"{mean:.3f}", (max(values), place), (8, 0), textcoords="offset points", va="center", color=colour
            )
            if method == "evicted":
                continue
            change = comparison.kl_change(method)
            hatch = "" if change < 0 else "//"
            right.barh(place, change, height=0.25, color=colour, alpha=0.55, hatch=hatch, zorder=1)
            windows = comparison.kl_change_per_window(method)
            right.plot(windows, [place] * len(windows), marker, color="black", markersize=4, mew=0, zorder=2)
            outermost = max([*windows, change, 0.0])
            right.annotate(f"{change:+.1f} %", (outermost, place), (8, 0), textcoords="offset points", va="center")
    left.set_xscale("log")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    left.xaxis.set_minor_locator(NullLocator())
    left.xaxis.set_major_formatter("{x:g}")
    left.set_yticks(range(len(comparisons)), [comparison.label for comparison in comparisons])
    left.invert_yaxis()
    left.set_xlabel("KL divergence from the full cache, nats per token (left is better)")
    left.set_title("Eviction alone, with merging, with a re-fit")
    for method, (colour, marker) in STYLES.items():
        left.plot([], [], marker, color=colour, label=method)
    left.plot([], [], color="black", linewidth=3, label="mean of the windows")
    left.legend(loc="upper left", bbox_to_anchor=(0, -0.1), ncols=2, frameon=False)
    right.axvline(0, color="black", linewidth=1)
    right.set_xlabel("change of KL against eviction, % (left is better)")
    right.set_title("What merging and re-fitting change")
    right.plot([], [], "o", color="black", label="one window")
    for method in ("merged", "matched"):
        right.bar(0, 0, color=STYLES[method][0], alpha=0.55, label=method)
    right.bar(0, 0, color="white", edgecolor="black", hatch="//", label="farther than eviction")
    right.legend(loc="upper left", bbox_to_anchor=(0, -0.1), ncols=2, frameon=False)
    for axes in (left, right):
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.16)
    figure.suptitle(subtitle)
    figure.savefig(file, dpi=150)


def _median(results: Sequence[Fidelity], name: str) -> float:
    return statistics.median(getattr(fidelity, name) for fidelity in results)


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f}"
