# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Compare two runs, or two folders of runs, on the samples that both measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation.cli import Parser
from evaluation.report.kept import answers_of, kept_shown, kept_table
from evaluation.report.runs import PREFIXES, Run, direction_of, is_twin, read_results, read_run
from evaluation.report.statistics import holm, paired_difference
from evaluation.report.tables import ALPHA, show, show_texts
from evaluation.results import FILES, IDENTITY

ALL_TASKS = "all tasks"
"""The task of a row that is about the mean over tasks."""

COLUMNS = (
    *("benchmark", "press", "kind", "level", "compression_ratio", "metric", "direction", "task", "n_samples"),
    *("bare", "merged", "difference", "low", "high", "p", "p_holm", "wins", "ties", "losses"),
    *("mean_loss", "worst_loss", "verdict"),
)
"""
Of a table of comparisons. ``difference`` is merged minus bare; a win is a sample on which merged is better. Of the
losses ``mean_loss`` is by how much they are worse, on average, and ``worst_loss`` the most; NaN where there is none.
"""

# How far the full cache's likelihood of one window may differ between two runs: other hardware, not another text.
_NLL_TOLERANCE = 0.02

# Two scores that differ by less are a tie: rounding.
_TIE = 1e-9


def main(argv: Sequence[str]) -> None:
    """Compare what the command-line arguments name, and print the table."""
    parser = Parser(prog="python -m evaluation compare", description=__doc__, allow_abbrev=False)
    parser.add_argument("bare", type=Path, help="a run's folder, or a folder of runs: what is compared with")
    parser.add_argument("merged", type=Path, help="the same: what is compared")
    parser.add_argument(
        "--full",
        type=Path,
        help="a run with the full cache, if neither folder has it: tells kept answers from lost ones",
    )
    arguments = parser.parse_args(list(argv))
    folders = [place and place.expanduser() for place in (arguments.bare, arguments.merged, arguments.full)]
    try:
        table, kept, notes = compare_folders(*folders)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    show(table, "Second minus first, on the same samples")
    if len(kept):
        show_texts(kept_shown(kept))
    for note in notes:
        print(f"Note: {note}")


def compare_folders(
    first: Path, second: Path, full: Path | None = None
) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """
    Compare two runs, or each run of one folder with that of another that has the same settings.

    The same settings means the same press too, or else the bare press of a merged one. Out come ``COLUMNS``; what
    ``kept_table`` says, of those whose run with the full cache is in a folder or is given; and what a reader should
    know. A ValueError says if a folder holds no run, or there is nothing to compare.
    """
    if is_run(first) and is_run(second):
        pairs, notes = [(read_run(first), read_run(second))], []
        runs = list(pairs[0])
    else:
        one, other = read_results(first), read_results(second)
        runs, notes = [*one.runs, *other.runs], [*one.notes, *other.notes]
        pairs = []
        for run in other.runs:
            same = [bare for bare in one.runs if bare.shared == run.shared and _press(bare) == _press(run)]
            pairs += [(bare, run) for bare in same or [bare for bare in one.runs if is_twin(run, bare)]]
    if not pairs:
        raise ValueError(f"no run in {second} has the settings of one in {first}, with the same press or the bare one")
    table = pd.concat([compare_runs(*pair, str(pair[1].config["dataset"])) for pair in pairs], ignore_index=True)
    notes += [note for pair in pairs for note in notes_on(*pair)]
    references = [run for run in (read_results(full).runs if full else runs) if run.kind == "full"]
    if full and not references:
        raise ValueError(f"{full} has no run with the full cache")
    answers = answers_of([pair for pair in pairs if pair[1].kind != "full"], references)
    return table, kept_table(answers), list(dict.fromkeys(notes))


def is_run(folder: Path) -> bool:
    """Whether a folder is one run's, without repeats inside."""
    has_files = all((folder / name).is_file() for name in FILES)
    return has_files and not any(place.is_dir() and place.name.isdecimal() for place in folder.iterdir())


def twins_of(runs: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Each run of ours with the bare one that it is compared with, which comes first."""
    return [(bare, run) for run in runs if run.kind in PREFIXES for bare in runs if is_twin(run, bare)]


def compare_twins(runs: Sequence[Run], benchmark: str) -> tuple[pd.DataFrame, list[str]]:
    """Compare each run of ours with the bare one: ``COLUMNS``, and which have none, and what differs, as notes."""
    pairs = twins_of(runs)
    tables = [compare_runs(*pair, benchmark) for pair in pairs]
    compared = [id(run) for _, run in pairs]
    alone = [run for run in runs if run.kind in PREFIXES and id(run) not in compared]
    notes = [f"{run.folder.name} has no run of the bare press to compare with" for run in alone]
    notes += [note for pair in pairs for note in notes_on(*pair)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(COLUMNS)), notes


def compare_runs(bare: Run, merged: Run, benchmark: str) -> pd.DataFrame:
    """
    Compare two runs on the samples that both have, task by task and over all tasks.

    Where several questions are asked about one context, their mean is a sample. Out come ``COLUMNS``, with
    ``benchmark`` as the name of what they measured. Holm's correction is over the tasks of one metric; the row of all
    tasks is one test by itself, and left out where there is one task only. A ValueError says if they share no sample or
    no metric, or a sample is not the same in both.
    """
    shared = merged.scores.index.intersection(bare.scores.index)
    metrics = [name for name in merged.scores if name in bare.scores]
    if not metrics or shared.empty:
        raise ValueError(f"{bare.folder} and {merged.folder} share no {'samples' if metrics else 'metrics'}")
    _check_same_samples(bare, merged, shared)
    rows = []
    for metric in metrics:
        pairs = pd.DataFrame({"task": merged.predictions.loc[shared, "task"]})
        pairs = pairs.assign(bare=bare.scores.loc[shared, metric], merged=merged.scores.loc[shared, metric])
        pairs = pairs[np.isfinite(pairs[["bare", "merged"]]).all(axis=1)]
        if "context_number" in merged.predictions:
            # What is asked about one context is no sample of its own: the same press has compressed it.
            context_number = merged.predictions.loc[pairs.index, "context_number"]
            pairs = pairs.groupby(["task", context_number]).mean().reset_index("task")
        tasks = [(str(task), group) for task, group in pairs.groupby("task")]
        own = [_row(task, [group], str(metric)) for task, group in tasks]
        for row, corrected in zip(own, holm([row["p"] for row in own])):
            row["p_holm"] = corrected
        rows += own
        if len(tasks) > 1:
            rows.append(_row(ALL_TASKS, [group for _, group in tasks], str(metric)))
    about = {"benchmark": benchmark, "press": bare.press, **describe(merged)}
    return pd.DataFrame([{**about, **row, "verdict": _verdict(row)} for row in rows], columns=list(COLUMNS))


def describe(run: Run) -> dict[str, Any]:
    """How tables tell runs of one press apart."""
    return {"kind": run.label, "level": run.level, "compression_ratio": run.ratio}


def notes_on(bare: Run, merged: Run) -> list[str]:
    """What differs between two runs beside the press, and how many samples only one of them has."""
    notes = []
    name = merged.folder.name if not merged.folder.name.isdecimal() else merged.folder.parent.name
    n_shared = len(merged.scores.index.intersection(bare.scores.index))
    if n_shared < max(len(merged.scores), len(bare.scores)):
        notes.append(f"{name}: {n_shared} samples are in both runs, of {len(bare.scores)} and {len(merged.scores)}")
    for metric in merged.scores.columns.intersection(bare.scores.columns):
        both = np.isfinite(merged.scores[metric]) & np.isfinite(bare.scores[metric]).reindex(merged.scores.index)
        if n_left_out := n_shared - int(both.fillna(False).sum()):
            notes.append(f"{name}: {n_left_out} samples without a finite {metric} in both runs are left out")
    versions = [run.config.get("versions") or {} for run in (bare, merged)]
    for one, other in ((bare.settings, merged.settings), versions):
        for key in sorted({*one, *other}):
            if one.get(key) != other.get(key):
                notes.append(f"{name} and its bare run differ in {key}: {other.get(key)} and {one.get(key)}")
    return notes


def _press(run: Run) -> tuple[Any, ...]:
    return run.kind, run.press_name, run.variant


def _check_same_samples(bare: Run, merged: Run, shared: pd.Index) -> None:
    for name in (*IDENTITY, "nll_full"):
        if name not in bare.predictions or name not in merged.predictions:
            continue
        one, other = (run.predictions.loc[shared, name] for run in (bare, merged))
        if name == "nll_full":
            different, what = (one - other).abs() > _NLL_TOLERANCE * one.abs(), "likelihood with the full cache"
        else:
            different, what = one != other, name
        if different.any():
            places = f"{bare.folder} and {merged.folder}"
            raise ValueError(f"sample {shared[different][0]} is not the same in {places}: its {what} differs")


def _row(task: str, groups: list[pd.DataFrame], metric: str) -> dict[str, Any]:
    differences = [(group["merged"] - group["bare"]).to_numpy() for group in groups]
    differences = [np.where(np.abs(of_task) < _TIE, 0.0, of_task) for of_task in differences]
    gains = np.concatenate(differences) * (-1 if direction_of(metric).startswith("lower") else 1)
    losses = pd.Series(-gains[gains < 0], dtype=float)
    result = paired_difference(differences)
    return {
        **{"metric": metric, "direction": direction_of(metric), "task": task, "n_samples": len(gains)},
        **{side: float(np.mean([group[side].mean() for group in groups])) for side in ("bare", "merged")},
        **{"difference": result.mean, "low": result.low, "high": result.high, "p": result.p_value},
        # One test by itself, where it is the only one.
        "p_holm": result.p_value if task == ALL_TASKS else math.nan,
        **{"wins": int((gains > 0).sum()), "ties": int((gains == 0).sum()), "losses": len(losses)},
        **{"mean_loss": float(losses.mean()), "worst_loss": float(losses.max())},
    }


def _verdict(row: dict[str, Any]) -> str:
    if not row["p_holm"] < ALPHA or row["difference"] == 0:
        return "no difference shown"
    return "better" if (row["difference"] > 0) == row["direction"].startswith("higher") else "worse"
