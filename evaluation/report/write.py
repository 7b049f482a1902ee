# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Report on a folder of runs: each merged press against the bare one, as tables, plots and one HTML page."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from evaluation.cli import Parser, fail
from evaluation.files import replace_folder
from evaluation.report.page import draw_sections, render_markdown, render_page
from evaluation.report.runs import Results, read_results
from evaluation.report.summary import (
    Benchmark,
    all_tables,
    compare_all,
    score_table,
    summarize,
    turn_table,
    verdict_on,
)
from evaluation.report.tables import show

MARKER = ".kvpress-merging-report.json"
"""The file that tells a report from other folders: the files that were written, with their SHA-256."""

TITLE = "Merged against bare, on the same samples"


def main(argv: Sequence[str]) -> None:
    """Write the report that the command-line arguments ask for, and print its table."""
    parser = Parser(prog="python -m evaluation report", description=__doc__, allow_abbrev=False)
    parser.add_argument("results", type=Path, help="a folder of runs, at whatever depth")
    parser.add_argument(
        "--output_dir", "--output-dir", type=Path, help="where the report goes; by default RESULTS/report"
    )
    arguments = parser.parse_args(list(argv))
    results = arguments.results.expanduser()
    folder = (arguments.output_dir or results / "report").expanduser()
    try:
        check_replaceable(folder)
        collected = read_results(results)
        benchmarks, notes = compare_all(collected)
        write_report(folder, collected, benchmarks, notes)
    except (ValueError, OSError) as error:
        fail(f"{parser.prog}: {error}")
    table = summarize(all_tables(benchmarks))
    if len(table):
        show(table, TITLE)
    print(verdict_on(table))
    for note in notes:
        print(f"Note: {note}")
    for failed in collected.errors:
        print(f"Failed: {failed['cell']}: {failed['error']}")
    print(f"Written to {folder}")


def write_report(folder: Path, results: Results, benchmarks: Sequence[Benchmark], notes: Sequence[str]) -> None:
    """
    Write tables, plots and page. The folder appears whole or not at all, and replaces no other than an earlier report.

    A ValueError says if the folder is there and is not one.
    """

    def write(place: Path) -> None:
        table = all_tables(benchmarks)
        table.to_csv(place / "comparisons.csv", index=False)
        score_table(benchmarks).to_csv(place / "scores.csv", index=False)
        turns = turn_table(benchmarks)
        others = {"kept": all_tables(benchmarks, "kept"), "harmed": all_tables(benchmarks, "harmed")}
        others |= {"equal_quality": all_tables(benchmarks, "equal"), "turns": turns}
        for name, other in others.items():
            if len(other):
                other.to_csv(place / f"{name}.csv", index=False)
        sections = draw_sections(place, results, benchmarks)
        page = render_page(sections, results, benchmarks, notes, turns)
        (place / "index.html").write_text(page, encoding="utf-8")
        markdown = render_markdown(sections, notes, verdict_on(summarize(table)))
        (place / "README.md").write_text(markdown, encoding="utf-8")
        written = {file.name: _sha256(file) for file in sorted(place.iterdir())}
        (place / MARKER).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        check_replaceable(folder)

    replace_folder(folder, write)


def check_replaceable(folder: Path) -> None:
    """
    Make sure that nothing is lost where a report goes.

    A ValueError says if it is not a folder, or holds anything but an earlier report as it was written.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir() or folder.is_symlink():
        raise ValueError(f"{folder} is not a folder; give another --output_dir")
    try:
        written = dict(json.loads((folder / MARKER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        written = {}
    for place in sorted(folder.iterdir()):
        if written and place.name == MARKER:
            continue
        if not place.is_file() or place.name not in written:
            raise ValueError(
                f"{folder} holds what is no report ({place.name}), and a report overwrites nothing else; "
                "give another --output_dir"
            )
        if _sha256(place) != written[place.name]:
            raise ValueError(
                f"{place} has been changed since it was written, and a report overwrites nothing but another as it was "
                "written; give another --output_dir"
            )


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
