# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""One HTML page with all of a report, plots included: it needs no other file and no network."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from evaluation.report.compare import ALL_TASKS
from evaluation.report.equal_quality import equal_shown
from evaluation.report.kept import harmed_shown, kept_shown
from evaluation.report.plots import Plot, Styles, plot_heat_map, plot_kept_shares, plot_lines, save
from evaluation.report.runs import PREFIXES, Results, Run, direction_of
from evaluation.report.statistics import mean_of_tasks
from evaluation.report.summary import Benchmark, all_tables, summarize, verdict_on
from evaluation.report.tables import (
    ALPHA,
    WORSE_BY,
    Shown,
    arrow,
    as_markdown,
    escape_markdown,
    number,
    p_value,
    worse_by,
)
from kvpress_merging import __version__

TITLE = "What merging changes"


@dataclass(frozen=True)
class Drawn:
    """A plot in a page: its title, the SVG, the name of its PNG, and whether it takes the page's whole width."""

    title: str
    svg: str
    file: str
    wide: bool


@dataclass(frozen=True)
class Section:
    """
    What a page shows of one benchmark.

    Plots, the comparisons, where there are several tasks each of them, and the other tables.
    """

    label: str
    slug: str
    plots: list[Drawn]
    summary: pd.DataFrame
    tasks: pd.DataFrame
    others: list[Shown]


def draw_sections(folder: Path, results: Results, benchmarks: Sequence[Benchmark]) -> list[Section]:
    """The sections of a page. Their plots are written to ``folder``, as PNG and SVG."""
    presses = sorted({run.press for run in results.runs if run.kind != "full"})
    styles = Styles(presses, sorted({run.label for run in results.runs}))
    sections = []
    for benchmark in benchmarks:
        plots = [
            Drawn(plot.title, save(plot, folder), f"{plot.name}.png", bool(plot.figure.get_size_inches()[0] > 6))
            for plot in draw(benchmark, styles)
        ]
        tasks = benchmark.table if (benchmark.table["task"] == ALL_TASKS).any() else benchmark.table.head(0)
        equal = equal_shown(benchmark.equal, benchmark.quality_metric)
        others = [equal, kept_shown(benchmark.kept), harmed_shown(benchmark.harmed)]
        others = [shown for shown in others if len(shown.table)]
        sections.append(Section(benchmark.label, benchmark.slug, plots, summarize(benchmark.table), tasks, others))
    return sections


def render_page(
    sections: Sequence[Section],
    results: Results,
    benchmarks: Sequence[Benchmark],
    notes: Sequence[str],
    turns: pd.DataFrame,
) -> str:
    """The page as HTML. All text but the plots' SVG is escaped."""
    runs = results.runs
    summary = summarize(all_tables(benchmarks))
    drawn = [row for benchmark in benchmarks for row in benchmark.references]
    models = ", ".join(dict.fromkeys(str(run.config.get("model")) for run in runs))
    verdicts = summary["verdict"].value_counts()
    environment = Environment(
        loader=PackageLoader("evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        arrow=arrow, number=number, p_value=p_value, sort_key=_sort_key, sorts_as=_sorts_as, records=_records
    )
    return environment.get_template("report.html.j2").render(
        title=TITLE,
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
        turns=turns,
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
        settings=_values([{name: value for name, value in run.config.items() if name != "versions"} for run in runs]),
        alpha=ALPHA,
    )


def render_markdown(sections: Sequence[Section], notes: Sequence[str], verdict: str) -> str:
    """The page's plots and comparisons as Markdown, which a repository shows where it shows HTML as source."""
    parts = [f"# {TITLE}", verdict, "`index.html` beside this page has each task too; download and open it."]
    parts += ["\n".join(f"- {escape_markdown(note)}" for note in notes)] if notes else []
    for section in sections:
        parts.append(f"## {escape_markdown(section.label)}")
        parts += [f"![{plot.title}]({plot.file})" for plot in section.plots]
        table = section.summary
        if len(table):
            shown = {
                "press": table["press"],
                "kind": table["kind"],
                "ratio": table["level"],
                "metric": [f"{row.metric} {arrow(row.direction)}" for row in table.itertuples()],
                **{name: table[name] for name in ("n_samples", "bare", "merged", "difference", "low", "high")},
                "p_holm": table["p_holm"],
                "win/tie/loss": [f"{row.wins}/{row.ties}/{row.losses}" for row in table.itertuples()],
                WORSE_BY: [worse_by(row) for row in _records(table)],
                "verdict": table["verdict"],
            }
            parts.append(as_markdown(pd.DataFrame(shown)).rstrip())
        for other in section.others:
            parts += [f"### {other.title}", escape_markdown(other.note), as_markdown(other.texts).rstrip()]
    return "\n\n".join(parts) + "\n"


def draw(benchmark: Benchmark, styles: Styles) -> list[Plot]:
    """The plots of one benchmark: scores and times against the ratio, the cache that is saved, and the differences."""
    runs, metric = benchmark.runs, benchmark.metric
    name = "KL from the full cache, nats" if metric == "kl" else metric
    name_and_arrow = f"{name} {arrow(direction_of(metric))}"
    is_fidelity = runs[0].config["dataset"] == "fidelity"
    time = "prefill_seconds" if is_fidelity else "seconds"
    scores = [_mean_of_tasks(run, metric) for run in runs]
    nan = float("nan")
    seconds = [(run.predictions[time].median() if time in run.predictions else nan, nan, nan) for run in runs]
    references = [{**row, "press": _without_prefix(str(row["press_name"]))} for row in benchmark.references]
    time_label = f"seconds {'of a prefill' if is_fidelity else 'per sample'}, median"
    rows = benchmark.table[(benchmark.table["metric"] == metric) & (benchmark.table["task"] != ALL_TASKS)]
    plots = []
    if figure := _against_ratio(runs, scores, styles, name_and_arrow, references, panels=True):
        title = "Mean of the tasks against compression ratio, with 95 % intervals"
        plots.append(Plot(f"{benchmark.slug}-scores", title, figure))
    if figure := _against_ratio(runs, seconds, styles, time_label):
        plots.append(Plot(f"{benchmark.slug}-times", "Times against compression ratio", figure))
    equal = benchmark.equal[benchmark.equal["metric"] == benchmark.quality_metric]
    if equal["needed_share"].notna().any():
        figure = plot_kept_shares(equal, styles, benchmark.quality_metric)
        plots.append(Plot(f"{benchmark.slug}-cache", "Cache that the bare press needs for the same score", figure))
    if len(rows):
        figure = plot_heat_map(rows, f"{name_and_arrow}, merged minus bare")
        plots.append(Plot(f"{benchmark.slug}-differences", "Difference that merging makes, task by ratio", figure))
    return plots


def _against_ratio(
    runs: Sequence[Run],
    values: Sequence[tuple[float, float, float]],
    styles: Styles,
    label: str,
    references: Sequence[dict[str, Any]] = (),
    *,
    panels: bool = False,
) -> Figure | None:
    """A value of each run, with the ends of its interval, against its ratio; None where no run has one."""
    rows = [(run.press, run.label, run.ratio, *value) for run, value in zip(runs, values)]
    points = pd.DataFrame(rows, columns=["press", "kind", "ratio", "value", "low", "high"])
    if points["value"].isna().all():
        return None
    is_full = points["kind"] == "full"
    full = points[is_full]["value"].dropna()
    return plot_lines(
        points[~is_full],
        styles,
        label,
        full=float(full.iloc[0]) if len(full) else None,
        references=references,
        panels=panels,
    )


def _versions(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Of what made the report, and of what made the runs."""
    own = {"python": platform.python_version(), "kvpress-merging": __version__}
    own |= {name: version(name) for name in ("matplotlib", "pandas", "scipy")}
    return [
        *((f"report: {name}", value) for name, value in own.items()),
        *((f"runs: {name}", value) for name, value in _values([run.config.get("versions") or {} for run in runs])),
    ]


def _values(records: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Each name with all of its values."""
    names = dict.fromkeys(name for record in records for name in record)
    return [(name, ", ".join(dict.fromkeys(str(record.get(name)) for record in records))) for name in names]


def _mean_of_tasks(run: Run, metric: str) -> tuple[float, float, float]:
    """With its interval."""
    if metric not in run.scores:
        return (float("nan"),) * 3
    return mean_of_tasks([task.to_numpy() for _, task in run.samples(metric).groupby(level="task")])


def _without_prefix(name: str) -> str:
    for prefix in PREFIXES.values():
        name = name.removeprefix(prefix)
    return name


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return table.to_dict("records")


def _sorts_as(text: Any, value: Any) -> bool:
    """Whether a cell's text is sorted as its value would be, so that the page need not say the value too."""
    try:
        return float(text) == float(_sort_key(value))
    except ValueError:
        return str(text) == _sort_key(value)


def _sort_key(value: Any) -> str:
    """What a cell is sorted by; nothing for NaN, which comes last."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.8g}"
    return str(value)
