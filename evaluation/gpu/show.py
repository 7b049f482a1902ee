# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""The figures of ``python -m evaluation gpu`` as one table: on the screen, and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

PREFILL_BARS = {
    (4096, "merging"): 0.05,
    (4096, "matching"): 0.09,
    (32_768, "merging"): 0.02,
    (32_768, "matching"): 0.04,
}
"""How much longer a prefill of an 8B model may take than with the bare press, by its tokens and the rule."""

MIN_DECODING = 0.98
"""How many times as fast as eviction decoding has to be, at least: it must not differ, but for the noise of pairs."""

DECIDING_K_LEN = 32_768
"""The context at which Triton's search has to be faster than torch's before it can be the default."""

HEADINGS = ("what", "measured", "bar", "met")


class Line(NamedTuple):
    """One line of the table: what was measured, the figures, what they should be, and whether they are ("" if open)."""

    what: str
    measured: str
    bar: str = ""
    met: str = ""


def lines(figures: dict[str, Any]) -> list[Line]:
    """The table of a run, from its figures as gpu.json has them."""
    rows = figures["rows"]
    of_part = {part: [row for row in rows if row["part"] == part] for part in ("right", "cost", "layer", "decode")}
    has_bars = not figures["arguments"]["quick"]
    launches = "operations" if figures["machine"]["device"] == "cpu" else "kernels"
    return [
        *_kernels([row for row in of_part["right"] if "kernel" in row]),
        *(_waits(row) for row in of_part["right"] if row.get("check") == "waits" and row["kind"] != "bare"),
        *_cost([row for row in of_part["cost"] if "kind" in row], has_bars, launches),
        *_layer([row for row in of_part["layer"] if "subject" in row], has_bars),
        *(_decode(row, has_bars) for row in of_part["decode"] if "kind" in row),
        *(Line(row["step"], _missing(row)) for row in rows if "step" in row),
        *(Line(file, f"left out: {why}") for file, why in figures["files_left_out"].items()),
    ]


def has_failed(figures: dict[str, Any]) -> bool:
    """Whether something was wrong, or failed in another way than for want of memory or time."""
    return any("failed" in row or row.get("right") is False for row in figures["rows"])


def _kernels(rows: list[dict[str, Any]]) -> Iterator[Line]:
    """A line for each check and kernel: how many cells are right, and the worst deviation of each dtype."""
    for check, kernel in dict.fromkeys((row["check"], row["kernel"]) for row in rows):
        of_both = [row for row in rows if (row["check"], row["kernel"]) == (check, kernel)]
        what = f"{check} is right" if kernel == "match" else f"{check} is right, {kernel}"
        measured = [row for row in of_both if "left_out" not in row]
        if not measured:
            yield Line(what, _missing(of_both[0]))
            continue
        worst: dict[str, float] = {}
        for row in measured:
            worst[row["dtype"]] = max(worst.get(row["dtype"], 0.0), row.get("worst", 0.0))
        n_right = sum(row.get("right", False) for row in measured)
        text = (
            f"{n_right} of {len(measured)}; worst {', '.join(f'{value:.1e} ({name})' for name, value in worst.items())}"
        )
        failures = {row["failed"] for row in measured if "failed" in row}
        text += "".join(f"; {failure}" for failure in sorted(failures))
        if len(measured) < len(of_both):
            text += f"; {len(of_both) - len(measured)} left out"
        yield Line(what, text, "all", _yes(n_right == len(measured)))


def _waits(row: dict[str, Any]) -> Line:
    what = f"nothing waits, {row['press']}: {row['kind']}"
    if "readings" not in row:
        return Line(what, _missing(row))
    where = "".join(f"; {line} {n}" for line, n in row["by_line"].items() if n > 0) if not row["right"] else ""
    failure = f"; {row['failed']}" if "failed" in row else ""
    bar = f"at most {row['allowed']}"
    return Line(what, f"{row['readings']:g} readings a layer{where}{failure}", bar, _yes(row["right"]))


def _cost(rows: list[dict[str, Any]], has_bars: bool, launches: str) -> Iterator[Line]:
    for row in rows:
        if row["kind"] == "bare" and "left_out" not in row and "failed" not in row:
            continue
        what = f"prefill of {row['k_len']:,}, {row['press']}: {row['kind']}"
        if "over_bare" not in row:
            yield Line(what, _missing(row))
            continue
        low, high = row["over_bare_range"]
        text = f"{row['over_bare']:+.1%} ({low:+.1%} to {high:+.1%}), {_time(row['median_seconds'])}"
        if "bytes_over_bare" in row:
            text += f", {row['bytes_over_bare'] / 1e6:+,.0f} MB"
        if row.get("launches") is not None:
            text += f", {row['launches']:.0f} {launches} a layer"
        text += f", {row['n_layers']} layers, {len(row['seconds'])} rounds"
        bar = PREFILL_BARS.get((row["k_len"], row["kind"])) if has_bars else None
        if bar is None:
            yield Line(what, text)
        else:
            yield Line(what, text, f"at most {bar:+.0%}", _yes(row["over_bare"] <= bar))


def _layer(rows: list[dict[str, Any]], has_bars: bool) -> Iterator[Line]:
    for row in rows:
        what = f"layer of {row['k_len']:,}: {row['subject']}"
        if "median_seconds" not in row:
            yield Line(what, _missing(row))
            continue
        text = _time(row["median_seconds"])
        if row.get("to_attention") is not None and row["subject"] != "attention":
            text += f", {row['to_attention']:.1%} of attention's"
        if "share_of_peak" in row:
            text += f", {row['operations_per_second'] / 1e12:.3g} TFLOP/s, {row['share_of_peak']:.0%} of the peak"
        if "without_search" in row:
            text += f", {_time(row['without_search'])} without the search"
        if row.get("extra_bytes") is not None:
            text += f", {row['extra_bytes'] / 1e6:,.0f} MB"
        if row.get("to_torch") is None:
            yield Line(what, text)
        else:
            text += f", {row['to_torch']:.2f} of torch's"
            has_bar = has_bars and row["k_len"] == DECIDING_K_LEN
            yield Line(what, text, *(("below 1, to be the default", _yes(row["to_torch"] < 1)) if has_bar else ()))


def _decode(row: dict[str, Any], has_bars: bool) -> Line:
    what = f"decoding after {row['k_len']:,}, {row['press']}: {row['kind']}"
    if "tokens_per_second" not in row:
        return Line(what, _missing(row))
    text = f"{row['tokens_per_second']:.1f} tokens a second"
    if "to_bare" not in row:
        return Line(what, text)
    low, high = row["to_bare_range"]
    text += f", {row['to_bare']:.3f} of the bare press's ({low:.3f} to {high:.3f})"
    if not has_bars:
        return Line(what, text)
    return Line(what, text, f"at least {MIN_DECODING}", _yes(row["to_bare"] >= MIN_DECODING))


def _missing(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"failed: {row['failed']}"
    return f"left out: {row.get('left_out', 'nobody knows why')}"


def _yes(is_met: bool) -> str:
    return "yes" if is_met else "NO"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def markdown(figures: dict[str, Any], *, bars_alone: bool = False) -> str:
    """Machine and table in Markdown; with ``bars_alone`` no more than the table's lines that have a bar."""
    table = [line for line in lines(figures) if line.bar or not bars_alone]
    rows = "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in table)
    text = f"| {' | '.join(HEADINGS)} |\n| --- | --- | --- | --- |\n{rows}"
    return text if bars_alone else f"{describe(figures)}\n\n{text}"


def describe(figures: dict[str, Any]) -> str:
    """Where and with what it ran, in one paragraph."""
    machine, arguments = figures["machine"], figures["arguments"]
    memory = f", {machine['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in machine else ""
    cuda = f"CUDA {machine['cuda']}" if machine["cuda"] else "no CUDA"
    versions = [f"{name} {machine[name] or 'not installed'}" for name in ("triton", "transformers", "kvpress")]
    ours = f"kvpress-merging {machine['kvpress_merging']} ({machine['commit'] or 'commit unknown'})"
    how = "a rehearsal on a tiny model: its times say nothing" if arguments["quick"] else "measured"
    return (
        f"{machine['name']}{memory}; torch {machine['torch']}, {cuda}, {', '.join(versions)}, {ours}. "
        f"`python -m evaluation gpu`, {how}, in {figures['seconds']:.0f} s: {figures['status']}."
    )


def show(figures: dict[str, Any]) -> None:
    """Print where it ran, and the table: with rich where it is there."""
    table = lines(figures)
    print(f"\n{describe(figures)}")
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        widths = [max(len(line[column]) for line in (HEADINGS, *table)) for column in range(len(HEADINGS))]
        for line in (HEADINGS, *table):
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
        return
    rich_table = Table(box=box.HORIZONTALS, pad_edge=False)
    for heading in HEADINGS:
        rich_table.add_column(heading)
    for line in table:
        rich_table.add_row(*(cell.replace("[", r"\[") for cell in line))
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(rich_table)
