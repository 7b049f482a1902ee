# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""All comparisons of a folder of runs, sorted into benchmarks, and what they come to."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from evaluation.report.compare import ALL_TASKS, compare_twins, describe, twins_of
from evaluation.report.equal_quality import equal_quality
from evaluation.report.kept import METRIC, answers_of, harmed_answers, kept_table
from evaluation.report.runs import PREFIXES, Results, Run, direction_of
from evaluation.report.statistics import means_with_intervals
from evaluation.report.tables import ALPHA

KIND_ORDER = ("full", "bare", *PREFIXES)
"""How tables and legends sort."""

# Fidelity's other metrics are in the tables.
_PRIMARY = {"fidelity": "kl", "needle_in_haystack": "rouge-l"}


@dataclass(frozen=True)
class Benchmark:
    """
    Runs that differ in the press and in how much it evicts, and in nothing else.

    Tables name it by its label, files by its slug. With its runs go their comparisons, the metric that is drawn, and
    published scores of the same dataset with the same model; and the tables of kept and lost answers, of harmed ones,
    and of the cache at equal quality.
    """

    label: str
    slug: str
    runs: list[Run]
    table: pd.DataFrame
    metric: str
    references: list[dict[str, Any]]
    kept: pd.DataFrame
    harmed: pd.DataFrame
    equal: pd.DataFrame

    @property
    def quality_metric(self) -> str:
        """The metric in which the cache at equal quality is shown."""
        return METRIC if METRIC in set(self.equal["metric"]) else self.metric


def compare_all(results: Results) -> tuple[list[Benchmark], list[str]]:
    """
    Sort runs into benchmarks, and compare those of each. Beside the benchmarks, what a reader should know.

    A ValueError says if two runs that belong together measured different samples.
    """
    groups: dict[str, list[Run]] = {}
    for run in results.runs:
        groups.setdefault(json.dumps(run.settings, sort_keys=True, default=str), []).append(run)
    all_settings = [runs[0].settings for runs in groups.values()]
    names = list(dict.fromkeys(name for settings in all_settings for name in settings))
    # A benchmark is named by what it is, and by whatever else tells it from the others of the same dataset.
    basic = ("dataset", "data_dir", "model")
    benchmarks: list[Benchmark] = []
    notes = list(results.notes)
    for runs in groups.values():
        runs.sort(key=lambda run: (run.press, KIND_ORDER.index(run.kind), run.label, run.ratio))
        settings = runs[0].settings
        alike = [other for other in all_settings if other["dataset"] == settings["dataset"]]
        different = [name for name in names if len({repr(other.get(name)) for other in alike}) > 1]
        parts = [settings["dataset"], settings.get("data_dir"), Path(str(settings.get("model"))).name]
        parts += [f"{name}={settings.get(name)}" for name in different if name not in basic]
        label = ", ".join(str(part) for part in parts if part is not None)
        table, more = compare_twins(runs, label)
        metrics = list(dict.fromkeys(name for run in runs for name in run.scores))
        primary = _PRIMARY.get(str(settings["dataset"]))
        references = [
            row for row in results.references if all(str(row.get(key)) == str(settings.get(key)) for key in basic)
        ]
        slug = f"{len(benchmarks) + 1}-{re.sub(r'[^a-z0-9]+', '-', label.lower()).strip('-')[:60]}"
        metric = primary if primary in metrics else metrics[0]
        answers = answers_of(twins_of(runs), [run for run in runs if run.kind == "full"], label)
        tables = kept_table(answers), harmed_answers(answers), equal_quality(runs, label)
        benchmarks.append(Benchmark(label, slug, runs, table, str(metric), references, *tables))
        notes += [f"{label}: {note}" for note in more]
    return benchmarks, list(dict.fromkeys(notes))


def all_tables(benchmarks: Sequence[Benchmark], name: str = "table") -> pd.DataFrame:
    """The comparisons of all benchmarks, or another table that they have."""
    tables = [getattr(benchmark, name) for benchmark in benchmarks]
    return pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each comparison and metric: that of all tasks, or of the only one."""
    keys = ["benchmark", "press", "kind", "level", "metric"]
    n_rows = table.groupby(keys)["task"].transform("size")
    return table[(table["task"] == ALL_TASKS) | (n_rows == 1)].reset_index(drop=True)


def score_table(benchmarks: Sequence[Benchmark]) -> pd.DataFrame:
    """Mean score of each run, metric and task."""
    rows = []
    for benchmark in benchmarks:
        for run in benchmark.runs:
            about = {"benchmark": benchmark.label, "press": run.press, **describe(run)}
            for metric, column in run.scores.items():
                for task, values in column.groupby(run.predictions["task"]):
                    mean = {"n_samples": int(values.count()), "mean": float(values.mean())}
                    direction = direction_of(str(metric))
                    rows.append({**about, "metric": metric, "direction": direction, "task": task, **mean})
    return pd.DataFrame(rows)


def turn_table(benchmarks: Sequence[Benchmark]) -> pd.DataFrame:
    """Of runs with several questions about a context: mean score of each run, metric and turn, with its interval."""
    columns = ["benchmark", "press", "kind", "level", "compression_ratio", "metric", "direction", "turn"]
    rows = []
    for benchmark in benchmarks:
        for run in benchmark.runs:
            if "turn" not in run.predictions:
                continue
            about = {"benchmark": benchmark.label, "press": run.press, **describe(run)}
            for turn, scores in run.scores.groupby(run.predictions["turn"]):
                for metric, values in scores.items():
                    means = means_with_intervals(values.dropna().to_frame("mean"), seed=0)
                    low, high = means.get("mean_interval", (math.nan, math.nan))
                    about_metric = {"metric": metric, "direction": direction_of(str(metric)), "turn": int(str(turn))}
                    row = {"n_samples": int(values.count()), "mean": means["mean"], "low": low, "high": high}
                    rows.append({**about, **about_metric, **row})
    table = pd.DataFrame(rows, columns=[*columns, "n_samples", "mean", "low", "high"])
    return table.sort_values(
        ["benchmark", "press", "kind", "level", "metric", "turn"], kind="stable", ignore_index=True
    )


def verdict_on(summary: pd.DataFrame) -> str:
    """What a summary comes to, in a sentence: the kinds of our presses apart."""
    if not len(summary):
        return "There is no merged run with a bare run to compare with."
    parts = []
    # A kind, without what is not default about it.
    for kind, rows in summary.groupby(summary["kind"].str.split(",").str[0], sort=False):
        better, worse = (int((rows["verdict"] == verdict).sum()) for verdict in ("better", "worse"))
        parts.append(f"{kind} is better in {better} and worse in {worse} of {len(rows)}")
    return (
        f"Against the bare press, {', '.join(parts)} comparisons (one for each press, ratio and metric) "
        f"at p < {ALPHA}; in the others no difference is shown."
    )
