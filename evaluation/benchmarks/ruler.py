# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""RULER: its published dataset, and its score, for that and for the samples that are made here."""

from __future__ import annotations

import pandas as pd
from transformers import PreTrainedTokenizerBase

from evaluation.benchmarks.hub import load_hub_dataset

COLUMNS = ("context", "question", "answer_prefix", "answer", "max_new_tokens", "task")

# kvpress takes control characters out of an answer before it looks for the right one in it.
_CONTROL_CHARACTERS = dict.fromkeys(range(32))


def load_ruler(
    tokenizer: PreTrainedTokenizerBase, *, data_dir: str | None, tasks: list[str] | None = None, quiet: bool = False
) -> pd.DataFrame:
    """Read the samples of one length, or those of some tasks; a ValueError if the dataset lacks a task."""
    samples = load_hub_dataset("ruler", data_dir, COLUMNS, quiet=quiet)
    if tasks is None:
        return samples
    if missing := set(tasks) - set(samples["task"]):
        known = ", ".join(sorted(set(samples["task"])))
        raise ValueError(f"--tasks: the dataset has no {', '.join(sorted(missing))}, only {known}")
    return samples[samples["task"].isin(tasks)].reset_index(drop=True)


def string_match(predictions: pd.DataFrame) -> pd.DataFrame:
    """
    RULER's ``string_match``: the right answers that are found in what the model said, letter case aside.

    For the question-answering tasks (``qa_*``) 100 if any of the strings in ``answer`` is found in
    ``predicted_answer``, else 0; for the others, the percentage of them that are found.
    """
    scores = []
    for task, answers, said in zip(predictions["task"], predictions["answer"], predictions["predicted_answer"]):
        said = said.translate(_CONTROL_CHARACTERS).lower()
        found = [answer.lower() in said for answer in answers]
        scores.append(100.0 * (any(found) if task.startswith("qa") else sum(found) / len(found)))
    return pd.DataFrame({"string_match": scores}, index=predictions.index)
