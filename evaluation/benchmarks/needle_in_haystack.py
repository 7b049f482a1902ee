# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""A needle in Paul Graham's essays, at the depths and with the context length that are asked for."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from rouge import Rouge
from transformers import PreTrainedTokenizerBase

from evaluation.benchmarks.hub import load_hub_dataset
from evaluation.text import insert

COLUMNS = ("context", "needle", "question", "answer_prefix", "max_new_tokens")

_METRICS = ("rouge-1", "rouge-2", "rouge-l")

# Room for what stands around the essays: the sentences below, and what a chat template adds.
_ROOM = 150


def load_needle_in_haystack(
    tokenizer: PreTrainedTokenizerBase,
    *,
    data_dir: str | None,
    max_context_length: int,
    needle_depth: Sequence[int],
    quiet: bool = False,
) -> pd.DataFrame:
    """Read the essays and put the needle into them: see ``write_contexts`` and ``load_hub_dataset``."""
    essays = load_hub_dataset("needle_in_haystack", data_dir, COLUMNS, quiet=quiet)
    return write_contexts(essays, tokenizer, max_context_length, needle_depth)


def write_contexts(
    essays: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, max_context_length: int, depths: Sequence[int]
) -> pd.DataFrame:
    """
    Put the needle of the first row into its essays, once for each depth: so many percent of the way into them.

    They are cut to ``max_context_length`` tokens; a ValueError says if that leaves no room for them.
    """
    row = essays.iloc[0].to_dict()
    needle_ids = tokenizer.encode(row["needle"], add_special_tokens=False)
    n_essay_tokens = max_context_length - len(needle_ids) - _ROOM
    if n_essay_tokens <= 0:
        raise ValueError(
            f"--max_context_length must be greater than {len(needle_ids) + _ROOM}, which the needle and what stands "
            f"around the essays may take, got {max_context_length}"
        )
    essay_ids = tokenizer.encode(row["context"], add_special_tokens=False)[:n_essay_tokens]
    rows = []
    for depth in depths:
        token_ids = insert(essay_ids, [needle_ids], [len(essay_ids) * depth // 100])
        text = tokenizer.decode(token_ids, skip_special_tokens=True)
        context = (
            f"Essays by one author follow, from here to the line that says so.\n\n{text}\n\nThe essays end here.\n"
        )
        rows.append({**row, "context": context, "needle_depth": depth, "task": f"needle_depth_{depth}"})
    return pd.DataFrame(rows)


def score(predictions: pd.DataFrame) -> pd.DataFrame:
    """ROUGE-1, -2 and -L of answers and needles: F1 of the ``rouge`` package, in percent; 0 for an empty answer."""
    rouge = Rouge(metrics=list(_METRICS))
    rows = []
    for said, needle in zip(predictions["predicted_answer"], predictions["needle"]):
        try:
            scores = rouge.get_scores(said.strip(), needle.strip())[0]
            rows.append({name: 100 * scores[name]["f"] for name in _METRICS})
        except (AssertionError, ValueError, RecursionError):
            rows.append(dict.fromkeys(_METRICS, 0.0))
    return pd.DataFrame(rows, index=predictions.index)
