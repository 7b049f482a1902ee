# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
LongBench's English and code tasks, with the metric that each was published with.

LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding (arXiv 2308.14508), table 1.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable

import pandas as pd
from rouge import Rouge
from thefuzz import fuzz
from transformers import PreTrainedTokenizerBase

from evaluation.benchmarks.hub import load_hub_dataset

COLUMNS = ("context", "question", "answer_prefix", "answers", "all_classes", "max_new_tokens", "task")


def load_longbench(tokenizer: PreTrainedTokenizerBase, *, data_dir: str | None, quiet: bool = False) -> pd.DataFrame:
    """Read the samples of one task; see ``load_hub_dataset`` for errors."""
    return load_hub_dataset("longbench", data_dir, COLUMNS, quiet=quiet)


def word_f1(said: str, answer: str) -> float:
    """F1 of the words that both have in common, without case, punctuation and articles (SQuAD's metric)."""
    said_words, answer_words = _plain_words(said), _plain_words(answer)
    n_common = (Counter(said_words) & Counter(answer_words)).total()
    return 2 * n_common / (len(said_words) + len(answer_words)) if n_common else 0.0


def rouge_l(said: str, answer: str) -> float:
    """ROUGE-L's F1, of the ``rouge`` package; 0 for what it cannot score: no words, or a sentence of a thousand."""
    try:
        return Rouge(metrics=["rouge-l"]).get_scores(said, answer)[0]["rouge-l"]["f"]
    except (AssertionError, ValueError, RecursionError):
        return 0.0


def right_class(said: str, answer: str, classes: list[str]) -> float:
    """
    One over the number of classes that were named if the right one is among them, else 0.

    A class whose name is a part of the right one's does not count as named.
    """
    named = [name for name in classes if name in said and not (name in answer and name != answer)]
    return 1 / len(named) if answer in named else 0.0


def right_number(said: str, answer: str) -> float:
    """Of the numbers that were said, the share that is right. Of the answer, the (first) number is compared."""
    wanted = re.search(r"\d+", answer)
    numbers = re.findall(r"\d+", said)
    return numbers.count(wanted.group()) / len(numbers) if wanted and numbers else 0.0


def similar_code(said: str, answer: str) -> float:
    """Edit similarity of the first line that is code (no comment, no mark-up) to the right one, rounded to percent."""
    lines = (line for line in said.lstrip("\n").split("\n") if not any(mark in line for mark in ("`", "#", "//")))
    return fuzz.ratio(next(lines, ""), answer) / 100


METRICS: dict[str, tuple[str, Callable[[str, str], float]]] = {
    **dict.fromkeys(
        ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"), ("f1", word_f1)
    ),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), ("rouge_l", rouge_l)),
    **dict.fromkeys(("passage_count", "passage_retrieval_en"), ("accuracy", right_number)),
    **dict.fromkeys(("lcc", "repobench-p"), ("edit_similarity", similar_code)),
}
"""Task to the name of its metric and the metric itself. ``trec`` is scored by ``right_class``."""

# In these, models go on with made-up examples after their answer.
_FIRST_LINE_ONLY = {"trec", "triviaqa", "samsum"}


def score(predictions: pd.DataFrame) -> pd.DataFrame:
    """
    Score answers, each against the right answer that it comes nearest to.

    Of ``task``, ``answers`` (a list of strings), ``all_classes`` (a list of strings, or None) and ``predicted_answer``
    comes a percentage for each sample, in the column named after its task's metric; other columns hold NaN.
    A ValueError refuses a task whose metric is not known.
    """
    rows: list[dict[str, float]] = []
    for row in predictions.itertuples():
        said = row.predicted_answer.lstrip()
        if row.task in _FIRST_LINE_ONLY:
            said = said.split("\n")[0]
        if row.task == "trec":
            name, scores = "accuracy", [right_class(said, answer, row.all_classes) for answer in row.answers]
        elif row.task in METRICS:
            name, metric = METRICS[row.task]
            scores = [metric(said, answer) for answer in row.answers]
        else:
            known = ", ".join(["trec", *METRICS])
            raise ValueError(f"there is no metric for LongBench's task {row.task!r}; known are {known}")
        rows.append({name: 100 * max(scores)})
    return pd.DataFrame(rows, index=predictions.index)


def _plain_words(text: str) -> list[str]:
    text = text.lower().translate(dict.fromkeys(map(ord, string.punctuation)))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()
