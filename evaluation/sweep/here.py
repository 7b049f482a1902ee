# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Measure many configurations one after the other in this process, with a model as long as they share it."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from evaluation.config import EvaluationConfig
from evaluation.evaluate import contexts_of, load, load_samples, measure_alone, prepare, reading
from evaluation.sweep.grid import model_settings
from evaluation.sweep.outcomes import Alone, Failed, Finished, Measured, Outcomes, Rows, describe
from evaluation.sweep.together import measure_together


class Worker:
    """
    Measures cells, and keeps the model as long as they load it alike.

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

    def measure(self, cells: Sequence[EvaluationConfig], finished: Mapping[str, Rows]) -> Outcomes:
        """
        Measure cells; whatever goes wrong with one is told, not raised.

        Parameters
        ----------
        cells : sequence of EvaluationConfig
            One, or several that differ in the press alone: these share prefills if they can.
        finished : mapping of str to Rows
            What an earlier sweep has measured of cells, by the names of their folders.
        """
        rows = {config.folder_name(): dict(finished.get(config.folder_name(), {})) for config in cells}
        if len(cells) == 1:
            yield from self._measure_alone(cells[0], rows[cells[0].folder_name()])
            return
        try:
            _, tokenizer = self._load(cells[0])
            set_seed(cells[0].seed)
            samples = load_samples(cells[0], tokenizer)
        except Exception as error:
            yield from ((config, Failed.of(error)) for config in cells)
            return
        alone = []
        for config, outcome in self._measure_together(cells, samples, rows):
            if isinstance(outcome, Alone):
                alone.append(config)
            yield config, outcome
        for config in alone:
            yield from self._measure_alone(config, rows[config.folder_name()], samples)

    def _measure_together(
        self, cells: Sequence[EvaluationConfig], samples: pd.DataFrame, rows: Mapping[str, Rows]
    ) -> Outcomes:
        evaluations = {}
        for config in cells:
            try:
                evaluations[config.folder_name()] = prepare(config, *self._load(config), samples)
            except Exception as error:
                yield config, Failed.of(error)
        pending = {name: evaluation.config for name, evaluation in evaluations.items()}
        try:
            for name, outcome in measure_together(evaluations, rows):
                yield pending[name] if isinstance(outcome, Finished) else pending.pop(name), outcome
        except Exception as error:
            yield from ((config, Alone(f"sharing failed: {describe(error)}")) for config in pending.values())

    def _measure_alone(self, config: EvaluationConfig, rows: Rows, samples: pd.DataFrame | None = None) -> Outcomes:
        try:
            evaluation = prepare(config, *self._load(config), samples)
            with reading(evaluation) as read:
                for context in contexts_of(read, config):
                    if not rows.keys() >= set(context["sample"]):
                        measured = measure_alone(evaluation, read, context)
                        rows |= measured
                        yield config, Finished(measured)
                outcome: Measured | Failed = Measured.of(evaluation, read, rows)
        except Exception as error:
            # A press that broke off may have left the model in any state.
            self._drop_model()
            outcome = Failed.of(error)
        yield config, outcome

    def _load(self, config: EvaluationConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self._loaded is not None and self._loaded[0] != model_settings(config):
            self._drop_model()
        if self._loaded is None:
            self._loaded = (model_settings(config), *load(config))
        return self._loaded[1:]

    def _drop_model(self) -> None:
        self._loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run_here(units: Sequence[Sequence[EvaluationConfig]], threads: int, finished: Mapping[str, Rows]) -> Outcomes:
    """Measure units of cells, see ``Worker.measure``, one after the other."""
    worker = Worker(threads)
    for cells in units:
        yield from worker.measure(cells, finished)


def split(units: Sequence[Sequence[EvaluationConfig]], count: int) -> list[Sequence[EvaluationConfig]]:
    """Halve the largest units of cells until there are ``count``, as far as they can be halved."""
    parts = list(units)
    while len(parts) < count:
        largest = max(parts, key=len)
        if len(largest) == 1:
            break
        place = parts.index(largest)
        parts[place : place + 1] = [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    return parts
