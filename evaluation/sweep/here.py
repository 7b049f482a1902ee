# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Measure many configurations one after the other in this process, with a model as long as they share it."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.config import EvaluationConfig
from evaluation.evaluate import load, measure, prepare
from evaluation.results import describe_versions
from evaluation.sweep.grid import model_settings


class RunnerError(RuntimeError):
    """Nothing can be run. The message says why."""


@dataclass(frozen=True)
class Measured:
    """What is written of a cell: see ``evaluation.results.write_files``."""

    config: EvaluationConfig
    versions: dict[str, str]
    predictions: pd.DataFrame
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """Why there is nothing of a cell to write: the error in a few words, and where it was raised."""

    error: str
    traceback: str


class Worker:
    """
    Measures one cell after the other, and keeps the model as long as they load it alike.

    Sums are split among torch's threads, so that results depend on how many there are. Relative paths start from
    ``folder``, if it is there.
    """

    def __init__(self, threads: int, folder: str | None = None):
        torch.set_num_threads(threads)
        if folder is not None and os.path.isdir(folder):
            os.chdir(folder)
        self._loaded: tuple[str, PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def start(self) -> None:
        """Return once there is a worker."""

    def measure(self, config: EvaluationConfig) -> Measured | Failed:
        """Measure a cell; whatever goes wrong with it is told, not raised."""
        try:
            if self._loaded is not None and self._loaded[0] != model_settings(config):
                self._drop_model()
            if self._loaded is None:
                self._loaded = (model_settings(config), *load(config))
            _, model, tokenizer = self._loaded
            evaluation = prepare(config, model, tokenizer)
            predictions, metrics = measure(evaluation)
            config.press_init_command = str(evaluation.press)
            return Measured(config, describe_versions(config, evaluation.press, model), predictions, metrics)
        except Exception as error:
            # A press that broke off may have left the model in any state.
            self._drop_model()
            return Failed(f"{type(error).__name__}: {error}", traceback.format_exc())

    def _drop_model(self) -> None:
        self._loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


Outcomes = Iterator[tuple[EvaluationConfig, "Measured | Failed"]]
"""Cells as they are ready, each with what came of it."""


def run_here(cells: Sequence[EvaluationConfig], threads: int) -> Outcomes:
    """Measure cells one after the other. Each is given out with what came of it."""
    worker = Worker(threads)
    for config in cells:
        yield config, worker.measure(config)
