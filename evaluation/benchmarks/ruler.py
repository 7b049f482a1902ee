# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""RULER's score, for its published dataset and for the samples that are made here."""

from __future__ import annotations

import pandas as pd

COLUMNS = ("context", "question", "answer_prefix", "answer", "max_new_tokens", "task")

# kvpress takes control characters out of an answer before it looks for the right one in it.
_CONTROL_CHARACTERS = dict.fromkeys(range(32))


def string_match(predictions: pd.DataFrame) -> pd.DataFrame:
    """
    RULER's ``string_match``: the right answers that are found in what the model said, letter case aside.

    Parameters
    ----------
    predictions : pd.DataFrame
        Columns ``task``, ``answer`` (a list of strings) and ``predicted_answer``.

    Returns
    -------
    pd.DataFrame
        Column ``string_match``, for each sample: for the question-answering tasks (``qa_*``) 100 if any of the answers
        is found, else 0; for the others, the percentage of the answers that are found.
    """
    scores = []
    for task, answers, said in zip(predictions["task"], predictions["answer"], predictions["predicted_answer"]):
        said = said.translate(_CONTROL_CHARACTERS).lower()
        found = [answer.lower() in said for answer in answers]
        scores.append(100.0 * (any(found) if task.startswith("qa") else sum(found) / len(found)))
    return pd.DataFrame({"string_match": scores}, index=predictions.index)
