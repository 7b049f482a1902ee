# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""The figures of ``python -m evaluation speed`` as tables and as a plot."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from evaluation.report.plots import COLOURS, MARKERS
from evaluation.speed.subjects import SUBJECTS


def show(figures: dict[str, Any], console: Console) -> None:
    """Print what ``evaluation.speed.measure`` found: a table for each dtype, number of heads and ratio."""
    arguments, machine = figures["arguments"], figures["machine"]
    exponents = {(_group(row), row["subject"]): row["exponent"] for row in figures["growth"]}
    rows = figures["layers"]
    for group in dict.fromkeys(map(_group, rows)):
        of_group = [row for row in rows if _group(row) == group]
        table = Table(title=f"{group}, head_dim {arguments['head_dim']}", box=box.HORIZONTALS, pad_edge=False)
        table.add_column("tokens", justify="right")
        table.add_column("subject")
        for heading in ("time", "extra memory", "time/kvpress", "memory/kvpress", "of product's rate", "exponent"):
            table.add_column(heading, justify="right")
        before = None
        for row in of_group:
            if before not in (None, row["k_len"]):
                table.add_section()
            before = row["k_len"]
            n_bytes = row["extra_bytes"]
            cells = [
                f"{row['median_seconds']:.3g} s",
                "not measured" if n_bytes is None else f"{n_bytes / 1e6:,.0f} MB",
                _or_nothing(row["time_to_kvpress"], ".3f"),
                _or_nothing(row["memory_to_kvpress"], ".3f"),
                _or_nothing(row["share_of_product_rate"], ".0%"),
                _or_nothing(exponents.get((group, row["subject"])), ".2f"),
            ]
            table.add_row(f"{row['k_len']:,}", row["subject"], *cells)
        console.print(table)
    console.print(
        f"Medians of {arguments['repeats']}; {machine['threads']} CPU threads; torch {machine['torch']}; "
        f"load average before: {machine['load_before']:.1f}."
    )
    operations = Table(title="Operations for each layer over the bare press, 1,024 tokens", box=box.HORIZONTALS)
    for heading in ("press", "eviction", "KV heads", "batch rows", "operations"):
        operations.add_column(heading, justify="right" if heading[0] in "Kbo" else "left")
    for row in figures["operations"]:
        operations.add_row(*(f"{value:.0f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(operations)
    if figures["prefills"]:
        prefills = Table(title=f"Whole prefills of {arguments['model']}: presses, bare and with ours around them")
        ours = ("merged", "over bare", "matched", "over bare")
        for heading in ("tokens", "press", "ratio", "device", "no press", "bare", *ours):
            prefills.add_column(heading, justify="right")
        for row in figures["prefills"]:
            cells = [f"{row['k_len']:,}", row["press"], str(row["compression_ratio"]), row["device"]]
            for name, seconds in row["median_seconds"].items():
                cells.append(f"{seconds:.2f} s")
                if name in row["overhead"]:
                    cells.append(f"{row['overhead'][name]:+.1%}")
            prefills.add_row(*cells)
        console.print(prefills)


def _group(row: dict[str, Any]) -> str:
    """What a row's layer is, but for its length."""
    return f"{row['dtype']}, {row['num_key_value_heads']} heads, ratio {row['compression_ratio']}"


def _or_nothing(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def plot(figures: dict[str, Any]) -> Figure:
    """Time and extra memory against the context, one column for each dtype, number of heads and ratio."""
    rows = figures["layers"]
    groups = list(dict.fromkeys(map(_group, rows)))
    names = [name for name in SUBJECTS if any(row["subject"] == name for row in rows)]
    figure = Figure(figsize=(4 * max(1, len(groups)) + 1, 6.5), layout="constrained")
    panels = figure.subplots(2, max(1, len(groups)), squeeze=False)
    for column, group in enumerate(groups):
        for panel, (name, scale, label) in zip(
            panels[:, column], (("median_seconds", 1, "seconds"), ("extra_bytes", 1e6, "extra memory, MB"))
        ):
            for subject in names:
                points = [
                    (row["k_len"], row[name] / scale)
                    for row in rows
                    if _group(row) == group and row["subject"] == subject and row[name]
                ]
                if points:
                    place = list(SUBJECTS).index(subject)
                    style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place]}
                    panel.plot(*zip(*points), label=subject, **style)
            panel.set(xscale="log", yscale="log", ylabel=label)
            lengths = sorted({row["k_len"] for row in rows if _group(row) == group})
            panel.set_xticks(lengths, [f"{length:,}" for length in lengths])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        panels[0, column].set_title(group, fontsize=10)
        panels[1, column].set_xlabel("tokens")
        panels[0, column].legend(fontsize=8)
    return figure
