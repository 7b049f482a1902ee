# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Measure cells that differ in their presses alone over shared prefills."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch

from evaluation.evaluate import Evaluation, attention, contexts_of, reading_of, seed_draws
from evaluation.presses import choose_attention
from evaluation.sweep.outcomes import Alone, Failed, Finished, Measured, Rows, describe
from evaluation.sweep.shared_prefill import PressFailed, prefill_many, why_alone
from evaluation.sweep.stand_in import CannotShareError


def measure_together(
    evaluations: Mapping[str, Evaluation], rows: Mapping[str, Rows]
) -> Iterator[tuple[str, Finished | Alone | Measured | Failed]]:
    """
    Measure what can share prefills.

    Parameters
    ----------
    evaluations : mapping of str to Evaluation
        Cells by name, of one model and the same samples; their configurations differ in the press alone.
    rows : mapping of str to Rows
        What is measured of each already. What is measured now is added.

    Yields
    ------
    tuple
        Name of a cell, and what came of it. ``Alone``: it cannot share, or there is nobody to share with.
    """
    by_attention: dict[str, dict[str, Evaluation]] = defaultdict(dict)
    for name, evaluation in evaluations.items():
        implementation = choose_attention(evaluation.config, evaluation.press, evaluation.model)
        by_attention[implementation][name] = evaluation
    for implementation, cells in by_attention.items():
        with attention(implementation, next(iter(cells.values())).model):
            sharing = {}
            for name, evaluation in cells.items():
                if reason := why_alone(evaluation.model, evaluation.press):
                    yield name, Alone(reason)
                else:
                    sharing[name] = evaluation
            if len(sharing) > 1:
                yield from _share(sharing, rows)
            else:
                yield from ((name, Alone("")) for name in sharing)


def _share(
    evaluations: dict[str, Evaluation], rows: Mapping[str, Rows]
) -> Iterator[tuple[str, Finished | Alone | Measured | Failed]]:
    first = next(iter(evaluations.values()))
    read = reading_of(first)
    for context in contexts_of(read, first.config):
        samples = context["sample"].tolist()
        waiting = [name for name in evaluations if not rows[name].keys() >= set(samples)]
        if not waiting:
            continue
        seed_draws(first.config.seed, context)
        try:
            outcomes = prefill_many(first.model, read.input_ids(context), [evaluations[name].press for name in waiting])
        except Exception as error:
            yield from ((name, Alone(f"the shared prefill failed: {describe(error)}")) for name in evaluations)
            return
        for name in waiting:
            outcome = outcomes.pop(0)  # a cache goes when it has answered
            if isinstance(outcome, PressFailed):
                del evaluations[name]
                if isinstance(outcome.error, (CannotShareError, torch.OutOfMemoryError)):
                    yield name, Alone(describe(outcome.error))
                else:
                    yield name, Failed(describe(outcome.error), outcome.traceback)
                continue
            try:
                measured = dict(zip(samples, read.measure(context, outcome), strict=True))
            except Exception as error:
                del evaluations[name]
                yield name, Failed.of(error)
                continue
            rows[name].update(measured)
            yield name, Finished(measured)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    for name, evaluation in evaluations.items():
        try:
            yield name, Measured.of(evaluation, read, rows[name])
        except Exception as error:
            yield name, Failed.of(error)
