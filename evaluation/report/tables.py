# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Tables of comparisons and of scores, for a terminal and as Markdown."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

ALPHA = 0.05
"""Corrected p-values below are called a difference."""

_WIDE = 170
"""Letters in a line where there is no terminal to say."""

WORSE_BY = "worse by (worst)"
"""The heading of ``worse_by``."""

# Left out in a terminal that is narrower than _FULL letters.
_FULL = 125
_DISPENSABLE = {"n", "bare", "merged", "interval", "p", WORSE_BY}


@dataclass(frozen=True)
class Column:
    """
    A column as it is shown.

    Parameters
    ----------
    heading : str
        What stands above it.
    name : str
        The column of the table that it shows, and is sorted by.
    text : callable, optional
        A row's text, from the row; by default the value as it is.
    """

    heading: str
    name: str
    text: Callable[[dict[str, Any]], str] | None = None

    def of(self, row: dict[str, Any]) -> str:
        """A row's text."""
        return self.text(row) if self.text else str(row[self.name])


@dataclass(frozen=True)
class Shown:
    """A table as it is shown: in a terminal, as Markdown and in a page. The note says how to read it."""

    title: str
    note: str
    columns: Sequence[Column]
    table: pd.DataFrame

    @property
    def heads(self) -> list[tuple[str, bool]]:
        """Of each column its heading, and whether its values are numbers."""
        is_number = pd.api.types.is_numeric_dtype
        return [(column.heading, is_number(self.table[column.name])) for column in self.columns]

    @property
    def texts(self) -> pd.DataFrame:
        """What its cells say."""
        rows = [[column.of(row) for column in self.columns] for row in self.table.to_dict("records")]
        return pd.DataFrame(rows, columns=[column.heading for column in self.columns])


def show_texts(shown: Shown) -> None:
    """Print a table, folded where the terminal is narrow."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
    rendered = Table(title=shown.title, caption=shown.note, box=box.HORIZONTALS, pad_edge=False, padding=(0, 1, 0, 0))
    for heading, is_number in shown.heads:
        rendered.add_column(heading, overflow="fold", justify="right" if is_number else "left")
    for row in shown.texts.itertuples(index=False):
        rendered.add_row(*map(Text, row))
    console.print(rendered)


def show(table: pd.DataFrame, title: str) -> None:
    """Print the table: in a narrow terminal with fewer columns."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
    console.print(render(table, title, narrow=console.width < _FULL))


def render(table: pd.DataFrame, title: str, *, narrow: bool = False) -> Table:
    """The table for a terminal."""
    left_out = _DISPENSABLE if narrow else set()
    rendered = Table(
        title=title,
        caption="diff.: merged - bare, with a 95 % bootstrap interval. p: sign-flip test; Holm: corrected over tasks.\n"
        "W/T/L: samples on which merged is better, equal, worse; worse by: mean of the losses (and the worst). "
        f"+, -: better, worse at {ALPHA}. Arrow: better way.",
        box=box.HORIZONTALS,
        pad_edge=False,
    )
    names = (
        "press",
        "ratio",
        "metric",
        "task",
        "n",
        "bare",
        "merged",
        "diff.",
        "interval",
        "p",
        "Holm",
        "W/T/L",
        WORSE_BY,
        "",
    )
    for name in names[:4]:
        rendered.add_column(name, overflow="fold", min_width=5)
    for name in names[4:]:
        if name not in left_out:
            rendered.add_column(name, justify="right", no_wrap=True)
    before = None
    for row in table.to_dict("records"):
        key = tuple(row[name] for name in ("benchmark", "press", "kind", "level"))
        if before is not None and key[0] != before[0]:
            rendered.add_section()
        # Text, not strings: names may hold what rich takes for markup.
        cells = [
            *((f"{key[1]}, {key[2]}", str(key[3])) if key != before else ("", "")),
            *(f"{row['metric']} {arrow(row['direction'])}", row["task"], str(row["n_samples"])),
            *(number(row["bare"]), number(row["merged"]), number(row["difference"], signed=True)),
            f"{number(row['low'], signed=True)} .. {number(row['high'], signed=True)}",
            *(p_value(row["p"]), p_value(row["p_holm"])),
            *(f"{row['wins']}/{row['ties']}/{row['losses']}", worse_by(row)),
            {"better": "+", "worse": "-"}.get(row["verdict"], ""),
        ]
        rendered.add_row(*(Text(cell) for name, cell in zip(names, cells) if name not in left_out))
        before = key
    return rendered


def arrow(direction: str) -> str:
    """Which way is better."""
    return "↑" if direction.startswith("higher") else "↓"


def nats(value: float) -> str:
    """How much likelihoods differ, in nats, with a sign; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:+.3f}"


def number(value: float, *, signed: bool = False) -> str:
    """A number to three or four digits; a dash for NaN."""
    if math.isnan(value):
        return "-"
    # What is less is rounding.
    if abs(value) < 1e-9:
        return "0"
    size = abs(value)
    form = ".1f" if size >= 10 else ".2f" if size >= 1 else ".4f" if size >= 0.001 else ".1e"
    return format(value, f"{'+' if signed else ''}{form}")


def percent(share: float) -> str:
    """A share in per cent, to one decimal; a dash for NaN."""
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def with_interval(form: Callable[[float], str], name: str, low: str, high: str) -> Callable[[dict[str, Any]], str]:
    """Of a row: the number of that name, and its interval if it has one; a dash for NaN."""

    def text(row: dict[str, Any]) -> str:
        ends = [form(row[end]).removesuffix(" %") for end in (low, high)]
        return form(row[name]) if math.isnan(row[low]) else f"{form(row[name])} ({' .. '.join(ends)})"

    return text


def count(number_of: int, of: int) -> str:
    """How many of so many, and the share; a dash of none."""
    return f"{number_of} ({percent(number_of / of)})" if of else "-"


def worse_by(row: dict[str, Any]) -> str:
    """How much worse the samples of a comparison are that got worse: their mean, and in brackets the worst."""
    return f"{number(row['mean_loss'])} ({number(row['worst_loss'])})" if row["losses"] else "-"


def p_value(value: float) -> str:
    """A p-value to three digits; a dash for NaN."""
    return "-" if math.isnan(value) else "<0.001" if value < 0.001 else f"{value:.3f}"


def as_markdown(table: pd.DataFrame) -> str:
    """A Markdown table with numbers as in a terminal; what a name holds of Markdown or HTML is shown, not obeyed."""
    lines = [list(table.columns), ["---"] * len(table.columns)]
    for row in table.to_dict("records"):
        lines.append([escape_markdown(_cell(str(name), value)) for name, value in row.items()])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(name: str, value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    if name in ("p", "p_holm"):
        return p_value(value)
    return number(value, signed=name in ("difference", "low", "high"))


def escape_markdown(text: str) -> str:
    """The text on one line, so that nothing in it is obeyed as Markdown or HTML."""
    text = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{letter}" if letter in r"\`*_[]|~" else letter for letter in text)
