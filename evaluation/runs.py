# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""One run as its folder says: what was measured, the score of each sample, and which bare run goes with it."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

import kvpress_merging
from evaluation.config import PRESS_FIELDS
from evaluation.evaluate_registry import NO_PRESS, PRESS_REGISTRY
from evaluation.presses import EVICTION_SETTINGS

KINDS = {"MergingPress": "merged", "AttentionMatchingPress": "matching"}
"""Our presses, and what a run with one is called."""

PREFIXES = {"merged": "merging_", "matching": "matching_"}
"""How the registry names a press of each kind."""

LEVELS = ("compression_ratio", "threshold", "head_compression_ratio", "key_channel_compression_ratio", "target_size")
"""Settings that decide how much is evicted."""

IDENTITY = (
    "task",
    "start",
    "context",
    "question",
    "answer_prefix",
    "answer",
    "answers",
    "all_classes",
    "needle",
    "needle_depth",
)
"""Columns that say which sample a row is about."""

LOWER_IS_BETTER = {"kl", "nll_increase", "attention_error"}
"""Metrics of which less is better."""

# The fields of kvpress's own MergingPress, which has the same name as ours.
_KVPRESS_FIELDS = {"press", "similarity_threshold", "merge_fraction"}

# One of LEVELS among a press's arguments.
_LEVEL_ARGUMENT = re.compile(rf"\b({'|'.join(LEVELS)})=[^,()]*(, )?")

# Settings that say where and how a run was made, not what was measured, and those that only some presses have.
_NOT_SHARED = {
    "press_name",
    "press_init_command",
    "versions",
    "output_dir",
    "log_level",
    "quiet",
    "device",
    *PRESS_FIELDS,
}


@dataclass(frozen=True)
class Run:
    """
    One run, as its folder says.

    Parameters
    ----------
    folder : Path
        Where it is.
    config : dict
        ``config.yaml``.
    predictions : pd.DataFrame
        ``predictions.csv``, with the sample's number as index.
    scores : pd.DataFrame
        For each sample, one column a metric; float.
    kind : str
        ``"full"``, ``"bare"``, ``"merged"`` or ``"matching"``.
    inner : str, optional
        The bare press, as Python; None for the full cache and where it cannot be parsed.
    variant : dict
        Fields of our press that are not default.
    press : str
        How tables name the bare press; where a folder has a run of it alone, by that run's name in the registry.
    """

    folder: Path
    config: dict[str, Any]
    predictions: pd.DataFrame
    scores: pd.DataFrame
    kind: str
    inner: str | None
    variant: dict[str, Any] = field(default_factory=dict)
    press: str = ""

    @property
    def press_name(self) -> str:
        """Its name in the registry."""
        return str(self.config["press_name"])

    @property
    def bare_name(self) -> str:
        """The press's name in the registry without what says that it is merged."""
        return self.press_name.removeprefix(PREFIXES.get(self.kind, ""))

    @property
    def family(self) -> str:
        """The bare press, however much it evicts."""
        return self.bare_name if self.inner is None else _LEVEL_ARGUMENT.sub("", self.inner)

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
        given = [(name, self.config.get(name)) for name in LEVELS]
        if "compression_ratio" in self.config:
            return ", ".join(
                [f"{self.ratio:g}", *(f"{name}={value:g}" for name, value in given[1:] if value is not None)]
            )
        return ", ".join(f"{name}={value:g}" for name, value in given if value is not None)

    @property
    def shared(self) -> dict[str, Any]:
        """The settings that a run and its twin have in common, how much is evicted included."""
        return {name: value for name, value in self.config.items() if name not in _NOT_SHARED | set(self.variant)}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the measurement, whatever the press and however much it evicts."""
        return {name: value for name, value in self.shared.items() if name not in EVICTION_SETTINGS}


def direction_of(metric: str) -> str:
    """``"lower is better"`` or ``"higher is better"``."""
    return "lower is better" if metric in LOWER_IS_BETTER else "higher is better"


def read_run(folder: Path) -> Run:
    """
    Read one run.

    Raises
    ------
    ValueError
        If a file is missing or not what a run writes; the message names it.
    """
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not {"dataset", "press_name", "press_init_command"} <= set(config):
            raise ValueError("config.yaml lacks dataset, press_name or press_init_command")
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        predictions = pd.read_csv(folder / "predictions.csv", dtype=dict.fromkeys(IDENTITY, str))
        if not {"sample", "task"} <= set(predictions):
            raise ValueError("predictions.csv lacks the columns sample and task")
        if predictions["sample"].duplicated().any():
            raise ValueError("predictions.csv has a sample twice")
        predictions = predictions.set_index("sample").sort_index()
        scores = _scores(predictions, config["dataset"], [name for task in metrics.values() for name in task])
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{folder} is not a run that can be read: {error}") from error
    run = Run(folder, config, predictions, scores, *_kind_of(config))
    return dataclasses.replace(run, press=run.bare_name)


def _scores(predictions: pd.DataFrame, dataset: str, names: list[str]) -> pd.DataFrame:
    columns = [name for name in dict.fromkeys(names) if name in predictions]
    if not columns:
        raise ValueError("predictions.csv has none of the metrics of metrics.json")
    scores = predictions[columns].astype(float)
    if dataset == "fidelity":
        # The likelihood with the full cache is no result of the press.
        return scores.assign(nll_increase=scores["nll"] - scores["nll_full"]).drop(columns=["nll", "nll_full"])
    if len(columns) > 1 and (scores.notna().sum(axis=1) <= 1).all():
        # Each task has a metric of its own; what they share is that they are percentages.
        return pd.DataFrame({"score": scores.bfill(axis=1).iloc[:, 0]})
    return scores


def _kind_of(config: dict[str, Any]) -> tuple[str, str | None, dict[str, Any]]:
    """Kind, bare press and what is not default about ours."""
    if config["press_name"] == NO_PRESS:
        return "full", None, {}
    command, name = str(config["press_init_command"]), str(config["press_name"])
    try:
        call = ast.parse(command, mode="eval").body
    except (SyntaxError, ValueError):
        # The press holds something whose repr is no Python.
        kinds = [kind for kind, prefix in PREFIXES.items() if name.startswith(prefix)]
        given = {name: config[name] for name in PRESS_FIELDS if config.get(name) is not None}
        return (kinds[0], None, given) if kinds else ("bare", None, {})
    own = {}
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in KINDS:
        own = {str(keyword.arg): keyword.value for keyword in call.keywords}
    if not isinstance(call, ast.Call) or "press" not in own or set(own) == _KVPRESS_FIELDS:
        return "bare", ast.unparse(call), {}
    press_class = getattr(kvpress_merging, call.func.id, None)  # type: ignore[attr-defined]
    defaults = {field.name: repr(field.default) for field in dataclasses.fields(press_class)} if press_class else {}
    inner = ast.unparse(own.pop("press"))
    texts = {name: ast.unparse(value) for name, value in own.items()}
    variant = {name: text for name, text in texts.items() if not _same_value(text, defaults.get(name))}
    return KINDS[call.func.id], inner, variant  # type: ignore[attr-defined]


def _same_value(text: str, other: str | None) -> bool:
    try:
        return text == other or (other is not None and ast.literal_eval(text) == ast.literal_eval(other))
    except ValueError:
        return False


def is_twin(run: Run, bare: Run) -> bool:
    """Whether ``bare`` measured the press inside ``run``'s, alone and with everything else the same."""
    if bare.kind != "bare" or run.kind not in PREFIXES:
        return False
    drop = set(run.variant)
    if run.shared != {name: value for name, value in bare.shared.items() if name not in drop}:
        return False
    if run.inner is not None and bare.inner is not None:
        return run.inner == bare.inner
    return run.inner is bare.inner is None and bare.press_name == _registered_bare_name(run)


def _registered_bare_name(run: Run) -> str | None:
    """The name of the press inside, alone: not always what follows the prefix, see ``kvpress_merging.registry``."""
    if run.press_name not in PRESS_REGISTRY:
        return run.bare_name
    inner = getattr(PRESS_REGISTRY[run.press_name], "press", None)
    names = [name for name in PRESS_REGISTRY if not name.startswith(tuple(PREFIXES.values()))]
    same = [name for name in names if type(PRESS_REGISTRY[name]) is type(inner) and PRESS_REGISTRY[name] == inner]
    return run.bare_name if run.bare_name in same else next(iter(same), None)
