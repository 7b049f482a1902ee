# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Report on a folder of runs: each merged press against the bare one, as tables, plots and one HTML page."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from evaluation.cli import Parser, fail
from evaluation.collect import Results, read_results
from evaluation.compare import ALL_TASKS
from evaluation.comparisons import Benchmark, compare_all, score_table, summarize, verdict_on
from evaluation.page import render_page
from evaluation.plots import Plot, Styles, plot_heat_map, plot_lines, save
from evaluation.runs import PREFIXES, Run, direction_of
from evaluation.tables import ALPHA, arrow, as_markdown, as_text, show
from kvpress_merging import __version__

MARKER = ".kvpress-merging-report.json"
"""The file that tells a report from other folders: the files that were written, with their SHA-256."""

_TITLE = "Merged against bare, on the same samples"


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
    table = summarize(pd.concat([benchmark.table for benchmark in benchmarks], ignore_index=True))
    if len(table):
        show(table, _TITLE)
    print(verdict_on(table))
    for note in notes:
        print(f"Note: {note}")
    for failed in collected.errors:
        print(f"Failed: {failed['cell']}: {failed['error']}")
    print(f"Written to {folder}")


def draw(benchmark: Benchmark, styles: Styles) -> list[Plot]:
    """The plots of one benchmark: scores and times against the ratio, and the differences."""
    runs, metric = benchmark.runs, benchmark.metric
    name = "KL from the full cache, nats" if metric == "kl" else metric
    name_and_arrow = f"{name} {arrow(direction_of(metric))}"
    is_fidelity = runs[0].config["dataset"] == "fidelity"
    time = "prefill_seconds" if is_fidelity else "seconds"
    scores = [_mean_of_tasks(run, metric) for run in runs]
    seconds = [run.predictions[time].median() if time in run.predictions else float("nan") for run in runs]
    references = [{**row, "press": _without_prefix(str(row["press_name"]))} for row in benchmark.references]
    time_label = f"seconds {'of a prefill' if is_fidelity else 'per sample'}, median"
    rows = benchmark.table[(benchmark.table["metric"] == metric) & (benchmark.table["task"] != ALL_TASKS)]
    plots = []
    if figure := _against_ratio(runs, scores, styles, name_and_arrow, references):
        plots.append(Plot(f"{benchmark.slug}-scores", "Scores against compression ratio", figure))
    if figure := _against_ratio(runs, seconds, styles, time_label):
        plots.append(Plot(f"{benchmark.slug}-times", "Times against compression ratio", figure))
    if len(rows):
        figure = plot_heat_map(rows, f"{name_and_arrow}, merged minus bare")
        plots.append(Plot(f"{benchmark.slug}-differences", "Difference that merging makes, task by ratio", figure))
    return plots


def _against_ratio(
    runs: Sequence[Run],
    values: Sequence[float],
    styles: Styles,
    label: str,
    references: Sequence[dict[str, Any]] = (),
) -> Figure | None:
    """A value of each run against its ratio; None where no run has one."""
    points = pd.DataFrame(
        {
            "press": [run.press for run in runs],
            "kind": [run.label for run in runs],
            "ratio": [run.ratio for run in runs],
            "value": values,
        }
    )
    if points["value"].isna().all():
        return None
    is_full = points["kind"] == "full"
    full = points[is_full]["value"].dropna()
    return plot_lines(
        points[~is_full], styles, label, full=float(full.iloc[0]) if len(full) else None, references=references
    )


def write_report(folder: Path, results: Results, benchmarks: Sequence[Benchmark], notes: Sequence[str]) -> None:
    """
    Write tables, plots and page. The folder appears whole or not at all, and replaces no other than an earlier report.

    Raises
    ------
    ValueError
        If the folder is there and is not a report.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        table = pd.concat([benchmark.table for benchmark in benchmarks], ignore_index=True)
        scores = score_table(benchmarks)
        table.to_csv(temporary / "comparisons.csv", index=False)
        scores.to_csv(temporary / "scores.csv", index=False)
        (temporary / "comparisons.md").write_text(as_markdown(table), encoding="utf-8")
        (temporary / "comparisons.txt").write_text(as_text(table, _TITLE), encoding="utf-8")
        page = _page(temporary, results, benchmarks, notes, scores)
        (temporary / "index.html").write_text(page, encoding="utf-8")
        written = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
        (temporary / MARKER).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        check_replaceable(folder)
        if folder.exists():
            before = temporary.with_name(f"{temporary.name}.before")
            os.rename(folder, before)
            temporary.rename(folder)
            shutil.rmtree(before)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """
    Make sure that nothing is lost where a report goes.

    Raises
    ------
    ValueError
        If it is not a folder, or holds anything but an earlier report as it was written.
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


def _page(
    folder: Path, results: Results, benchmarks: Sequence[Benchmark], notes: Sequence[str], scores: pd.DataFrame
) -> str:
    runs = results.runs
    presses = sorted({run.press for run in runs if run.kind != "full"})
    kinds = sorted({run.label for run in runs})
    styles = Styles(presses, kinds)
    sections = []
    for benchmark in benchmarks:
        plots = [
            {
                "title": plot.title,
                "svg": save(plot, folder)[0],
                "wide": plot.figure.get_size_inches()[0] > 6,
            }
            for plot in draw(benchmark, styles)
        ]
        tasks = benchmark.table if (benchmark.table["task"] == ALL_TASKS).any() else benchmark.table.head(0)
        summary = summarize(benchmark.table)
        sections.append(
            {"label": benchmark.label, "slug": benchmark.slug, "plots": plots, "summary": summary, "tasks": tasks}
        )
    summary = summarize(pd.concat([benchmark.table for benchmark in benchmarks], ignore_index=True))
    drawn = [row for benchmark in benchmarks for row in benchmark.references]
    models = ", ".join(dict.fromkeys(str(run.config.get("model")) for run in runs))
    verdicts = summary["verdict"].value_counts()
    return render_page(
        title="What merging changes",
        subtitle=f"kvpress presses with and without kvpress-merging, on {models}",
        tiles=[
            ("runs", len(runs)),
            ("comparisons", len(summary)),
            ("better than bare", int(verdicts.get("better", 0))),
            ("worse than bare", int(verdicts.get("worse", 0))),
            ("failed runs", len(results.errors)),
        ],
        verdict=verdict_on(summary),
        notes=list(notes),
        benchmarks=sections,
        scores=scores,
        references=[
            {
                **{name: "" if row.get(name) is None else row[name] for name in ("data_dir", "model")},
                **{name: row[name] for name in ("press_name", "dataset", "compression_ratio", "score")},
                "source": str(row["source"]),
                "drawn": row in drawn,
            }
            for row in results.references
        ],
        errors=results.errors,
        versions=_versions(runs),
        settings=_settings(runs),
        alpha=ALPHA,
    )


def _versions(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Of what made the report, and of what made the runs."""
    own = {"python": platform.python_version(), "kvpress-merging": __version__}
    own |= {name: version(name) for name in ("matplotlib", "pandas", "scipy")}
    return [
        *((f"report: {name}", value) for name, value in own.items()),
        *((f"runs: {name}", value) for name, value in _values([run.config.get("versions") or {} for run in runs])),
    ]


def _settings(runs: Sequence[Run]) -> list[tuple[str, str]]:
    return _values([{name: value for name, value in run.config.items() if name != "versions"} for run in runs])


def _values(records: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Each name with all of its values."""
    names = dict.fromkeys(name for record in records for name in record)
    return [(name, ", ".join(dict.fromkeys(str(record.get(name)) for record in records))) for name in names]


def _mean_of_tasks(run: Run, metric: str) -> float:
    if metric not in run.scores:
        return float("nan")
    return float(run.scores[metric].groupby(run.predictions["task"]).mean().mean())


def _without_prefix(name: str) -> str:
    for prefix in PREFIXES.values():
        name = name.removeprefix(prefix)
    return name
