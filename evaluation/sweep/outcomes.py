# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What comes of a cell, bit by bit."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
from typing_extensions import Self

from evaluation.config import EvaluationConfig
from evaluation.evaluate import Evaluation, Reading, score
from evaluation.results import describe_versions

Rows = dict[int, dict[str, Any]]
"""Numbers of samples to what was measured of each."""


class RunnerError(RuntimeError):
    """Nothing can be run. The message says why."""


@dataclass(frozen=True)
class Finished:
    """Samples of a cell that are measured."""

    rows: Rows


@dataclass(frozen=True)
class Alone:
    """A cell is to be measured with prefills of its own: why, or nothing if there is nobody to share with."""

    reason: str


@dataclass(frozen=True)
class Measured:
    """What is written of a cell, the last that comes of it: see ``evaluation.results.write_files``."""

    config: EvaluationConfig
    versions: dict[str, str]
    predictions: pd.DataFrame
    metrics: dict[str, Any]

    @classmethod
    def of(cls, evaluation: Evaluation, read: Reading, rows: Rows) -> Self:
        """Score a cell of which all samples are measured."""
        config, press = evaluation.config, evaluation.press
        predictions, metrics = score(config, read, rows)
        config.press_init_command = str(press)
        return cls(config, describe_versions(config, press, evaluation.model), predictions, metrics)


@dataclass(frozen=True)
class Failed:
    """Why there is nothing of a cell to write: the error in a few words, and where it was raised."""

    error: str
    traceback: str

    @classmethod
    def of(cls, error: Exception) -> Self:
        """An error that has just been caught."""
        return cls(describe(error), traceback.format_exc())


Outcomes = Iterator[tuple[EvaluationConfig, "Finished | Alone | Measured | Failed"]]
"""Cells, each with what came of it now."""


def describe(error: Exception) -> str:
    """An error in a few words."""
    return f"{type(error).__name__}: {error}"
