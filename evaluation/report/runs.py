# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Runs as their folders say: what was measured, the score of each sample, and which bare run goes with which."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from evaluation.config import EVICTION_SETTINGS, NO_PRESS, PRESS_FIELDS, default_of, settings_that
from evaluation.evaluate_registry import PRESS_REGISTRY, unused_presses
from evaluation.likelihood import METRICS as LIKELIHOOD_METRICS
from evaluation.results import FILES, read_predictions

PREFIXES = {
    "merged": "merging_",
    "matching": "matching_",
    "kvfold": "kvfold_",
    "GRKV": "grkv_",
    "kvpress merged": "kvpress_merging_",
}
"""What a run with a press around a bare one is called, ours first, and how the registry names such a press."""

LEVELS = settings_that(lambda about: about.eviction == "amount")
"""Settings that decide how much is evicted."""

LOWER_IS_BETTER = {"kl", "nll_increase", "attention_error", *LIKELIHOOD_METRICS}
"""Metrics of which less is better."""

_MOMENTS = settings_that(lambda about: about.eviction == "moment")
_NOT_SHARED = {"versions", *settings_that(lambda about: not about.is_shared)}


@dataclass(frozen=True)
class Run:
    """
    One run, as its folder says.

    Parameters
    ----------
    folder, config : Path, dict
        Where it is, and its ``config.yaml``.
    predictions, scores : pd.DataFrame
        ``predictions.csv``, with the sample's number as index, and of that, one column a metric; float.
    press : str
        How tables name the bare press.
    """

    folder: Path
    config: dict[str, Any]
    predictions: pd.DataFrame
    scores: pd.DataFrame
    press: str = ""

    @property
    def press_name(self) -> str:
        """Its name in the registry."""
        return str(self.config["press_name"])

    @property
    def kind(self) -> str:
        """``"full"``, ``"bare"``, or one of ``PREFIXES``."""
        if self.press_name == NO_PRESS:
            return "full"
        # kvpress's evaluation has merging presses too, of its own; ours notes our version.
        is_ours = "kvpress-merging" in (self.config.get("versions") or {})
        kinds = [kind for kind, prefix in PREFIXES.items() if is_ours and self.press_name.startswith(prefix)]
        return kinds[0] if kinds else "bare"

    @property
    def bare_name(self) -> str:
        """The name in the registry of the press inside, alone."""
        return bare_name(self.press_name) if self.kind in PREFIXES else self.press_name

    @property
    def moments(self) -> tuple[Any, ...]:
        """The settings that say when the press evicts."""
        return tuple((name, self.config[name]) for name in _MOMENTS if self.config.get(name) is not None)

    @property
    def variant(self) -> dict[str, Any]:
        """Fields of our press that are not default."""
        given = {name: self.config.get(name) for name in PRESS_FIELDS}
        return {name: value for name, value in given.items() if value not in (None, default_of(name))}

    @property
    def label(self) -> str:
        """Its kind, and what is not default about it."""
        return ", ".join([self.kind, *(f"{name}={value}" for name, value in self.variant.items())])

    @property
    def ratio(self) -> float:
        """Share of the cache that is evicted: what was asked for, or else what was reached; NaN if none is known."""
        if "compression_ratio" in self.config:
            return float(self.config["compression_ratio"])
        return round(float(self.predictions.get("compression_ratio", pd.Series(dtype=float)).mean()), 4)

    @property
    def level(self) -> str:
        """The settings behind the ratio, as text."""
        given = [f"{name}={self.config[name]:g}" for name in LEVELS[1:] if self.config.get(name) is not None]
        return ", ".join([f"{self.ratio:g}", *given] if "compression_ratio" in self.config else given)

    @property
    def shared(self) -> dict[str, Any]:
        """The settings that a run and its twin have in common, how much is evicted included."""
        return {name: value for name, value in self.config.items() if name not in _NOT_SHARED}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the measurement, whatever the press and however much it evicts."""
        return {name: value for name, value in self.shared.items() if name not in EVICTION_SETTINGS}

    def samples(self, metric: str) -> pd.Series:
        """Its finite scores, by task and sample; what is asked about one context is one sample, their mean."""
        scores = self.scores[metric][np.isfinite(self.scores[metric])]
        table = self.predictions.loc[scores.index]
        by = [table["task"], table.get("context_number", table.index)]
        return scores.groupby(by).mean().rename_axis(["task", "sample"])


@dataclass(frozen=True)
class Results:
    """
    All that a folder of results holds.

    The newest of each run, in the order of their paths; published scores, from ``sweep.yaml``; ``cell``, ``config``,
    ``error`` and ``traceback`` of runs that failed; and what a reader should know: runs that were passed over.
    """

    runs: list[Run]
    references: list[dict[str, Any]]
    errors: list[dict[str, Any]]
    notes: list[str]


def direction_of(metric: str) -> str:
    """``"lower is better"`` or ``"higher is better"``."""
    return "lower is better" if metric in LOWER_IS_BETTER else "higher is better"


def is_twin(run: Run, bare: Run) -> bool:
    """Whether ``bare`` measured the press inside ``run``'s, alone and with everything else the same."""
    is_pair = bare.kind == "bare" and run.kind in PREFIXES
    return is_pair and run.bare_name == bare.press_name and run.shared == bare.shared


@functools.cache
def bare_name(press_name: str) -> str:
    """
    The registry's name of the press inside another, alone.

    Not always what follows the prefix, see ``kvpress_merging.registry``: there ``merging_expected_attention`` has
    another press inside than the one that is called ``expected_attention``.
    """
    without_prefix = next(
        press_name.removeprefix(prefix) for prefix in PREFIXES.values() if press_name.startswith(prefix)
    )
    names = [name for name in PRESS_REGISTRY if not name.startswith(tuple(PREFIXES.values()))]
    with unused_presses():
        inner = getattr(PRESS_REGISTRY.get(press_name), "press", None)
        # Most often it is what follows the prefix: no other is made then.
        for name in sorted(names, key=lambda name: name != without_prefix) if inner is not None else []:
            if type(bare := PRESS_REGISTRY[name]) is type(inner) and bare == inner:
                return name
    return without_prefix


def read_run(folder: Path) -> Run:
    """Read one run; a ValueError says if a file is missing or not what a run writes."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not {"dataset", "press_name", "press_init_command"} <= set(config):
            raise ValueError("config.yaml lacks dataset, press_name or press_init_command")
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        predictions = read_predictions(folder)
        if not {"sample", "task"} <= set(predictions):
            raise ValueError("predictions.csv lacks the columns sample and task")
        if predictions["sample"].duplicated().any():
            raise ValueError("predictions.csv has a sample twice")
        predictions = predictions.set_index("sample").sort_index()
        scores = _scores(predictions, config["dataset"], [name for task in metrics.values() for name in task])
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{folder} is not a run that can be read: {error}") from error
    run = Run(folder, config, predictions, scores)
    return dataclasses.replace(run, press=run.bare_name)


def read_results(folder: Path) -> Results:
    """Read a folder, and all inside; a ValueError says if there is no run, or a file is not what it should be."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}")
    found: dict[Path, list[Path]] = {}
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if set(FILES) <= set(files):
            place = Path(path)
            # A repeat stands in a numbered folder inside the first run's.
            first = place.parent if place.name.isdecimal() and place.parent in found else place
            found.setdefault(first, []).append(place)
    if not found:
        raise ValueError(f"there are no results in {str(folder)!r}: no folder with {', '.join(FILES)}")
    notes: list[str] = []
    runs: dict[str, Run] = {}
    for first, repeats in found.items():
        newest = max(repeats, key=lambda place: 0 if place in found else int(place.name))
        if len(repeats) > 1:
            name = first.name if first == folder else first.relative_to(folder).as_posix()
            notes.append(f"{name} was run {len(repeats)} times: the newest, {newest.name}, is shown")
        run = read_run(newest)
        key = repr((run.shared, run.press_name, run.kind, run.variant))
        if key in runs:
            notes.append(f"{runs[key].folder.name} is there more than once: the last by path, {run.folder}, is shown")
        runs[key] = run
    references, errors = read_references(folder / "sweep.yaml"), _read_errors(folder / "errors")
    return Results(_named(list(runs.values())), references, errors, notes)


def read_references(file: Path) -> list[dict[str, Any]]:
    """The published scores that a sweep's file has under ``reference``; a ValueError if they are not that."""
    if not file.is_file():
        return []
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        rows = (content or {}).get("reference") or []
        for row in rows:
            if not all(math.isfinite(float(row[name])) for name in ("compression_ratio", "score")):
                raise ValueError("compression_ratio and score of a reference must be finite")
            if missing := {"press_name", "dataset", "source"} - set(row):
                raise ValueError(f"a reference lacks {', '.join(sorted(missing))}")
    except (KeyError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: cannot read its references: {type(error).__name__}: {error}") from error
    return rows


def _read_errors(folder: Path) -> list[dict[str, Any]]:
    errors = []
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            errors.append({name: record.get(name) for name in ("cell", "config", "error", "traceback")})
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file} is not the record of a failed run: {error}") from error
    return errors


def _named(runs: Sequence[Run]) -> list[Run]:
    """The same runs; where a press evicts at different moments, its name says at which."""
    moments: dict[str, set[tuple]] = {}
    for run in runs:
        moments.setdefault(run.bare_name, set()).add(run.moments)
    named = []
    for run in runs:
        told = ", ".join(f"{name}={value}" for name, value in run.moments)
        is_told = told and len(moments[run.bare_name]) > 1
        named.append(dataclasses.replace(run, press=f"{run.bare_name} ({told})" if is_told else run.bare_name))
    return named


def _scores(predictions: pd.DataFrame, dataset: str, names: list[str]) -> pd.DataFrame:
    columns = [name for name in dict.fromkeys(names) if name in predictions]
    if not columns:
        raise ValueError("predictions.csv has none of the metrics of metrics.json")
    scores = predictions[columns].astype(float)
    if dataset == "fidelity":
        # The likelihood with the full cache is no result of the press.
        return scores.assign(nll_increase=scores["nll"] - scores["nll_full"]).drop(columns=["nll", "nll_full"])
    likelihood = scores[[name for name in LIKELIHOOD_METRICS if name in scores]]
    scores = scores.drop(columns=likelihood.columns)
    if len(scores.columns) > 1 and (scores.notna().sum(axis=1) <= 1).all():
        # Each task has a metric of its own; what they share is that they are percentages.
        scores = pd.DataFrame({"score": scores.bfill(axis=1).iloc[:, 0]})
    return scores.join(likelihood)
