# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Measure cells that differ in their presses alone over shared prefills."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
import psutil
import torch
from transformers import PreTrainedModel

from evaluation.evaluate import Evaluation, Reading, attention, contexts_of, reading_of, seed_draws
from evaluation.prefill import Prefilled
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
        input_ids = read.input_ids(context)
        waiting = deque(name for name in evaluations if not rows[name].keys() >= set(samples))
        # The full cache watches the first prefill, if all others are compared with it.
        watching: list[None] = [None] if first.config.answer_kl else []
        full = None
        while waiting:
            room = max(1, _room(first.model, input_ids) - len(watching))
            names = [waiting.popleft() for _ in range(min(room, len(waiting)))]
            seed_draws(first.config.seed, context)
            presses = [*watching, *(evaluations[name].press for name in names)]
            outcomes = deque(prefill_many(first.model, input_ids, presses))
            while watching:
                watching.pop()
                full = read.read_full_cache(context, _whole(outcomes.popleft()))
            for name in names:
                outcome = _answer(read, context, outcomes.popleft(), full)  # a cache goes when it has answered
                if isinstance(outcome, Finished):
                    rows[name].update(outcome.rows)
                else:
                    del evaluations[name]
                yield name, outcome
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    for name, evaluation in evaluations.items():
        try:
            yield name, Measured.of(evaluation, read, rows[name])
        except Exception as error:
            yield name, Failed.of(error)


def _whole(prefilled: Prefilled | PressFailed) -> Prefilled:
    """The full cache, or else nothing can be compared."""
    if isinstance(prefilled, PressFailed):
        raise prefilled.error
    return prefilled


def _answer(
    read: Reading, context: pd.DataFrame, prefilled: Prefilled | PressFailed, full: Any
) -> Finished | Alone | Failed:
    """What comes of one press's cache."""
    if isinstance(prefilled, PressFailed):
        if isinstance(prefilled.error, (CannotShareError, torch.OutOfMemoryError)):
            return Alone(describe(prefilled.error))
        return Failed(describe(prefilled.error), prefilled.traceback)
    try:
        return Finished(dict(zip(context["sample"].tolist(), read.measure(context, prefilled, full), strict=True)))
    except Exception as error:
        return Failed.of(error)


def _room(model: PreTrainedModel, input_ids: torch.Tensor) -> int:
    """How many caches of a context, uncompressed, half of the free memory holds; 1 at least."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    n_values = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * input_ids.numel()
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    free = sum(torch.cuda.mem_get_info(device)[0] for device in devices) or psutil.virtual_memory().available
    return max(1, free // 2 // (n_values * model.dtype.itemsize))
