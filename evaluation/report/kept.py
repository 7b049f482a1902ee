# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
What a wrapper does to the answers that eviction kept, and to those that it lost.

A mean over both hides harm: what is won back of lost answers outweighs the kept ones that are spoiled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from evaluation.report.runs import Run
from evaluation.report.statistics import ratio_of_sums
from evaluation.report.tables import Column, Shown, count, nats, number, percent, with_interval

METRIC = "answer_nll"
"""What tells a kept answer from a lost one: nats a token."""

KEPT_BELOW = 0.1
"""Nats a token that eviction adds to the full cache's, below which it kept the answer."""

HARMED_ABOVE = 0.3
"""Nats a token that the wrapper adds to eviction's, above which it harmed the answer."""

FOUND_BELOW = 3.0
"""Nats a token below which the full cache has the answer: another is nobody's to keep."""

N_WORST = 5
"""Of the harmed answers, how many of each kind a page shows."""

ALL = "all"
"""In a table, the press, ratio or task of a row that is about several."""

_ABOUT = ["benchmark", "kind", "press", "level", "task"]

COLUMNS = (
    *(*_ABOUT, "n_kept", "kept_harmed", "kept_change", "kept_low", "kept_high", "kept_worst"),
    *("n_lost", "lost_harmed", "won_back", "won_low", "won_high", "lost_worst", "n_left_out"),
)
"""Of a table of kept and lost answers, see ``kept_and_lost``."""


def kept_and_lost(
    full: Any,
    bare: Any,
    merged: Any,
    texts: Any = None,
    *,
    kept_below: float = KEPT_BELOW,
    harmed_above: float = HARMED_ABOVE,
    found_below: float = FOUND_BELOW,
) -> dict[str, Any]:
    """
    Tell apart what a wrapper does to the answers that eviction kept and to those that it lost.

    Parameters
    ----------
    full, bare, merged : array-like
        Negative log-likelihood of each answer with the full cache, the bare press and the wrapper, nats a token: finite
        (or else a ValueError), shape ``(n_answers,)``.
    texts : array-like, optional
        The text that each answer is about, shape ``(n_answers,)``: what is asked about one text, over however many
        caches, is resampled together. By default each answer has its own.
    kept_below : float
        An answer is kept if ``bare - full`` is less, else lost.
    harmed_above : float
        It is harmed if ``merged - bare`` is more.
    found_below : float
        It is left out, neither kept nor lost, if ``full`` is this or more.

    Returns
    -------
    dict
        Of the kept: ``n_kept``; ``kept_harmed``, how many are harmed; ``kept_change``, the mean of ``merged - bare``,
        with ``kept_low`` and ``kept_high``, its 95 % bootstrap interval; ``kept_worst``, the largest of these. Of the
        lost: ``n_lost``, ``lost_harmed``, ``lost_worst``; ``won_back``, the share
        ``sum(bare - merged) / sum(bare - full)``, with ``won_low`` and ``won_high``. ``n_left_out`` answers are in
        neither. NaN where there is none to say it of.
    """
    table = _sorted_out(_table(full, bare, merged, texts), kept_below, harmed_above, found_below)
    kept, lost = table[table["kept"]], table[table["lost"]]
    change = _ratio(kept["rise"], pd.Series(1.0, kept.index), kept["text"])
    won_back = _ratio(-lost["rise"], lost["bare"] - lost["full"], lost["text"])
    return {
        **{"n_kept": len(kept), "kept_harmed": int(kept["harmed"].sum())},
        **dict(zip(("kept_change", "kept_low", "kept_high"), change)),
        **{"kept_worst": float(kept["rise"].max()), "n_lost": len(lost), "lost_harmed": int(lost["harmed"].sum())},
        **dict(zip(("won_back", "won_low", "won_high"), won_back)),
        **{"lost_worst": float(lost["rise"].max()), "n_left_out": len(table) - len(kept) - len(lost)},
    }


def answers_of(pairs: Iterable[tuple[Run, Run]], full: Iterable[Run], benchmark: str | None = None) -> pd.DataFrame:
    """
    Each answer with the full cache, the bare press and the wrapper.

    ``pairs`` are bare runs and those to compare with them, and ``full`` those of the full cache, of which the one with
    the same settings is taken; a pair without one, or without likelihoods, has no answers here. Out comes a row an
    answer: ``benchmark``, or by default the dataset; ``kind``, ``press``, ``level``, ``task``, ``sample``, ``text``,
    and its likelihoods ``full``, ``bare`` and ``merged``.
    """
    tables = []
    candidates = list(full)
    for bare, merged in pairs:
        reference = next((run for run in candidates if run.settings == merged.settings), None)
        if reference is None or not all(METRIC in run.scores for run in (reference, bare, merged)):
            continue
        runs = {"full": reference, "bare": bare, "merged": merged}
        answers = pd.concat({name: run.scores[METRIC] for name, run in runs.items()}, axis=1, join="inner")
        answers = answers[np.isfinite(answers).all(axis=1)]
        about = merged.predictions.loc[answers.index]
        # What is asked about one context is about one text.
        text = about["task"] + "/" + about["context_number"].astype(str) if "context_number" in about else about.index
        where = {"kind": merged.label, "press": merged.press, "level": merged.level, "task": about["task"]}
        where = {"benchmark": benchmark or str(merged.config["dataset"]), **where}
        tables.append(answers.assign(**where, sample=answers.index, text=text))
    columns = [*_ABOUT, "sample", "text", "full", "bare", "merged"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def kept_table(answers: pd.DataFrame) -> pd.DataFrame:
    """
    What a wrapper does to kept and lost answers: over all, by press, by ratio and by task.

    ``answers`` are as ``answers_of`` gives them; out come ``COLUMNS``.
    """
    rows = []
    for _, of_kind in answers.groupby(["benchmark", "kind"], sort=False):
        groups = [of_kind]
        for name in ("press", "level", "task"):
            groups += [group for _, group in of_kind.groupby(name, sort=False)]
        for group in groups:
            about = {name: values[0] if len(values := group[name].unique()) == 1 else ALL for name in _ABOUT}
            numbers = kept_and_lost(*(group[name] for name in ("full", "bare", "merged", "text")))
            rows.append({**about, **numbers})
    # Of one press alone, say, the row over all says the same.
    return pd.DataFrame(rows, columns=list(COLUMNS)).drop_duplicates(_ABOUT, ignore_index=True)


def harmed_answers(answers: pd.DataFrame) -> pd.DataFrame:
    """The answers that eviction kept and the wrapper harmed, those that ``rise`` most first."""
    table = _sorted_out(answers, KEPT_BELOW, HARMED_ABOVE, FOUND_BELOW)
    table = table[table["kept"] & table["harmed"]].sort_values("rise", ascending=False, kind="stable")
    return table[[*_ABOUT, "sample", "full", "bare", "merged", "rise"]].reset_index(drop=True)


def kept_shown(table: pd.DataFrame) -> Shown:
    """A table of kept and lost answers, as it is shown."""
    columns = [
        *(Column(heading, name) for heading, name in zip(("kind", "press", "ratio", "task"), _ABOUT[1:])),
        Column("kept", "n_kept"),
        Column("kept: harmed", "kept_harmed", lambda row: count(row["kept_harmed"], row["n_kept"])),
        Column("kept: change", "kept_change", with_interval(nats, "kept_change", "kept_low", "kept_high")),
        Column("kept: worst", "kept_worst", lambda row: nats(row["kept_worst"])),
        Column("lost", "n_lost"),
        Column("lost: won back", "won_back", with_interval(percent, "won_back", "won_low", "won_high")),
        Column("lost: harmed", "lost_harmed", lambda row: count(row["lost_harmed"], row["n_lost"])),
        Column("lost: worst", "lost_worst", lambda row: nats(row["lost_worst"])),
        Column("left out", "n_left_out"),
    ]
    note = (
        f"An answer is kept if eviction adds less than {KEPT_BELOW} nats a token to the full cache's, else lost, and "
        f"harmed if the wrapper adds more than {HARMED_ABOVE} to eviction's; answers of which the full cache has "
        f"{FOUND_BELOW:g} or more are left out. The change is the mean of what the wrapper adds, the worst is the "
        "largest; won back is the share that it takes away of what eviction added. 95 % bootstrap intervals, a text's "
        "answers resampled together."
    )
    return Shown("Kept and lost answers", note, columns, table)


def harmed_shown(table: pd.DataFrame) -> Shown:
    """The first of the answers that were harmed, as they are shown."""
    columns = [Column(heading, name) for heading, name in zip(("kind", "press", "ratio", "task"), _ABOUT[1:])]
    columns.append(Column("sample", "sample"))
    for name in ("full", "bare", "merged"):
        columns.append(Column(name, name, lambda row, name=name: number(row[name])))  # type: ignore[misc]
    note = f"Nats a token; the {N_WORST} of each kind that rise most, of {len(table)} in harmed.csv."
    return Shown("Kept answers that were harmed", note, columns, table.groupby("kind", sort=False).head(N_WORST))


def _table(full: Any, bare: Any, merged: Any, texts: Any) -> pd.DataFrame:
    sides = {"full": full, "bare": bare, "merged": merged}
    arrays: dict[str, np.ndarray] = {name: np.asarray(side, dtype=np.float64) for name, side in sides.items()}
    arrays["text"] = np.arange(arrays["full"].size) if texts is None else np.asarray(texts)
    if len({array.shape for array in arrays.values()}) > 1 or arrays["full"].ndim != 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"full, bare, merged and texts must have one number an answer each, got {shapes}")
    if not all(np.isfinite(arrays[name]).all() for name in sides):
        raise ValueError("full, bare and merged must be finite")
    return pd.DataFrame(arrays)


def _ratio(top: pd.Series, bottom: pd.Series, texts: pd.Series) -> tuple[float, float, float]:
    of_texts = pd.DataFrame({"top": top, "bottom": bottom}).groupby(texts, sort=False).sum()
    return ratio_of_sums(of_texts["top"], of_texts["bottom"])


def _sorted_out(answers: pd.DataFrame, kept_below: float, harmed_above: float, found_below: float) -> pd.DataFrame:
    found = answers["full"] < found_below
    kept = answers["bare"] - answers["full"] < kept_below
    rise = answers["merged"] - answers["bare"]
    return answers.assign(kept=found & kept, lost=found & ~kept, rise=rise, harmed=rise > harmed_above)
