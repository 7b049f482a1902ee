# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""How much less cache a wrapper takes than the bare press for the same mean score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from evaluation.report.runs import PREFIXES, Run, direction_of
from evaluation.report.statistics import interval
from evaluation.report.tables import Column, Shown, percent, with_interval

COLUMNS = (
    *("benchmark", "press", "kind", "level", "compression_ratio", "metric", "direction", "n_samples"),
    *("kept_share", "needed_share", "saved", "low", "high", "says"),
)
"""
Of a table of equal quality. ``kept_share`` is the share of the cache that the wrapper leaves, ``needed_share`` the one
that the bare press needs for the same score, ``saved`` how much less the first is, as a share of the second, with its
95 % interval. Where no share of those measured has that score they are NaN, and ``says`` has the words.
"""


def equal_quality(runs: Sequence[Run], benchmark: str) -> pd.DataFrame:
    """
    Compare each run of ours with the bare press at other ratios, in each metric: see ``COLUMNS``.

    A press whose bare runs have one ratio alone is left out: a line from there to the full cache would say more than
    was measured. The runs are one benchmark's.
    """
    rows = []
    full = [run for run in runs if run.kind == "full"][:1]
    for ours in runs:
        if ours.kind not in PREFIXES:
            continue
        for metric in map(str, ours.scores):
            bare = [run for run in runs if run.kind == "bare" and run.press == ours.press and metric in run.scores]
            bare = [run for run in bare if math.isfinite(run.ratio)]
            if len({run.ratio for run in bare}) < 2 or not math.isfinite(ours.ratio):
                continue
            curve = [*bare, *(run for run in full if metric in run.scores)]
            if compared := _compare(ours, curve, metric):
                about = {"press": ours.press, "kind": ours.label, "level": ours.level, "compression_ratio": ours.ratio}
                about |= {"benchmark": benchmark, "metric": metric, "direction": direction_of(metric)}
                rows.append({**about, **compared})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def equal_shown(table: pd.DataFrame, metric: str) -> Shown:
    """A table of equal quality, in one metric, as it is shown."""
    saved = with_interval(percent, "saved", "low", "high")
    columns = [
        *(Column(heading, name) for heading, name in zip(("press", "kind", "ratio"), ("press", "kind", "level"))),
        Column("keeps", "kept_share", lambda row: percent(row["kept_share"])),
        Column("bare press needs", "needed_share", lambda row: percent(row["needed_share"])),
        Column("less cache", "saved", lambda row: row["says"] or saved(row)),
    ]
    note = (
        f"The share of the cache that the bare press needs for the wrapper's mean {metric}, by lines between the "
        "ratios that were measured and the full cache, and how much less than that the wrapper keeps. 95 % bootstrap "
        "intervals, samples resampled within their tasks."
    )
    return Shown("Cache at equal quality", note, columns, table[table["metric"] == metric])


def needed_share(shares: Sequence[float], scores: Sequence[float], target: float) -> float:
    """
    The smallest kept share at which a press is as good as a target, with lines between the shares that were measured.

    A curve that rises and falls is so taken at its best: where it reaches the target more than once, the smallest cache
    counts.

    Parameters
    ----------
    shares : sequence of float
        Kept shares, ascending.
    scores : sequence of float
        The press's score at each; higher is better.
    target : float
        The score to reach.

    Returns
    -------
    float
        Minus infinity if the press is better than the target at the smallest share already, infinity if it is worse at
        each.
    """
    for i, score in enumerate(scores):
        if score >= target:
            if i == 0:
                return shares[0] if score == target else -math.inf
            part = (target - scores[i - 1]) / (score - scores[i - 1])
            return shares[i - 1] + part * (shares[i] - shares[i - 1])
    return math.inf


def _compare(ours: Run, curve: Sequence[Run], metric: str) -> dict[str, Any] | None:
    """The rest of a row, or None where the runs share no sample."""
    curve = sorted(curve, key=_kept_share)
    shares = [_kept_share(run) for run in curve]
    table = pd.concat([run.samples(metric) for run in [*curve, ours]], axis=1, join="inner")
    if table.empty:
        return None
    sign = -1 if direction_of(metric).startswith("lower") else 1
    # Of each task, shape (n_runs, n_samples).
    tasks = [sign * task.to_numpy().T for _, task in table.groupby(level="task")]

    def needed(*drawn: np.ndarray, axis: int) -> np.ndarray:
        """Of resamples, which are the samples' places in their tasks; what was not measured is the last that was."""
        means = np.mean([scores[:, places].mean(axis=axis) for scores, places in zip(tasks, drawn)], axis=0)
        ends = [needed_share(shares, scores, target) for *scores, target in means.T.tolist()]
        return np.clip(ends, shares[0], shares[-1])

    kept = _kept_share(ours)
    *scores, target = np.mean([task.mean(axis=1) for task in tasks], axis=0)
    share = needed_share(shares, scores, target)
    row = {"n_samples": len(table), "kept_share": kept}
    if math.isinf(share):
        where = (
            "the full cache" if curve[-1].kind == "full" else f"the bare press with {percent(shares[-1])} of the cache"
        )
        says = (
            f"better than {where}" if share > 0 else f"worse than the bare press with {percent(shares[0])} of the cache"
        )
        return {**row, **dict.fromkeys(("needed_share", "saved", "low", "high"), math.nan), "says": says}
    low = high = math.nan
    if all(scores.shape[1] > 1 for scores in tasks):
        low, high = interval([np.arange(scores.shape[1]) for scores in tasks], needed)
    saved, low, high = (1 - kept / end for end in (share, low, high))
    return {**row, "needed_share": share, "saved": saved, "low": low, "high": high, "says": ""}


def _kept_share(run: Run) -> float:
    return 1.0 if run.kind == "full" else 1 - run.ratio
