# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""A table of samples of RULER's tasks."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerBase

from evaluation.benchmarks.ruler_synthetic.documents import read_hotpotqa, read_squad, write_questions
from evaluation.benchmarks.ruler_synthetic.lists import (
    write_common_words,
    write_frequent_words,
    write_variable_tracking,
)
from evaluation.benchmarks.ruler_synthetic.needles import NEEDLE_TASKS
from evaluation.benchmarks.ruler_synthetic.sample import Essay, Measure, Sample, even_depth
from evaluation.cli import closest
from evaluation.text import read_text

_LIST_TASKS = {"vt": write_variable_tracking, "cwe": write_common_words, "fwe": write_frequent_words}

TASKS = (*NEEDLE_TASKS, *_LIST_TASKS)
"""The tasks that need no file."""

MANY_QUESTION_TASKS = ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "niah_multivalue")
"""The tasks that can ask several questions about one context."""

QUESTION_TASKS = {"qa_1": ("squad_file", read_squad), "qa_2": ("hotpotqa_file", read_hotpotqa)}
"""The tasks that need one: under which setting it is given, and how it is read."""

# Characters of a paragraph of prose that are letters, spaces, commas and full stops, at least.
_PLAIN_SHARE = 0.94

_MAX_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


def prose_of(text: str) -> str:
    """The paragraphs of a text that are whole sentences in plain words: no headings, code, tables or lists."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    return " ".join(paragraph for paragraph in paragraphs if _is_prose(paragraph))


def _is_prose(paragraph: str) -> bool:
    n_plain = len(re.sub(r"[^\w ,.]|[\d_]", "", paragraph))
    return paragraph[:1].isupper() and paragraph[-1] in ".:" and n_plain > _PLAIN_SHARE * len(paragraph)


@functools.cache
def _built_in_essay() -> Essay:
    return Essay(prose_of(read_text()))


def check_tasks(tasks: Sequence[str], files: Mapping[str, str | Path | None], n_questions: int = 1) -> None:
    """
    Raise a ``ValueError`` if a task cannot be made.

    That is one that is unknown, lacks its file among ``squad_file`` and ``hotpotqa_file``, or cannot ask so often.
    """
    for task in tasks:
        if task not in TASKS and task not in QUESTION_TASKS:
            raise ValueError(f"there is no task {task!r}{closest(task, [*TASKS, *QUESTION_TASKS])}")
        if task in QUESTION_TASKS and files[QUESTION_TASKS[task][0]] is None:
            raise ValueError(f"the task {task} needs --{QUESTION_TASKS[task][0]}")
        if n_questions > 1 and task not in MANY_QUESTION_TASKS:
            raise ValueError(
                f"the task {task} has one question a context, --n_questions is for {', '.join(MANY_QUESTION_TASKS)}"
            )


def generate(
    tokenizer: PreTrainedTokenizerBase,
    data_dir: str | int,
    *,
    n_samples: int = 25,
    n_questions: int = 1,
    tasks: Sequence[str] | None = None,
    seed: int = 42,
    text_file: str | Path | None = None,
    squad_file: str | Path | None = None,
    hotpotqa_file: str | Path | None = None,
) -> pd.DataFrame:
    """
    Make samples. The same arguments give the same samples, and fewer of them the first of more.

    Parameters
    ----------
    data_dir : str or int
        Tokens of each context, without what a chat template adds; at most 2 % fewer.
    n_questions : int
        Questions about each context; each is a row.
    tasks : sequence of str, optional
        Names of tasks, each of ``n_samples`` contexts; by default all for which there is a file or which need none, and
        with several questions ``MANY_QUESTION_TASKS``.
    text_file : path, optional
        Prose for the tasks that hide needles in an essay; by default the built-in text.
    squad_file, hotpotqa_file : path, optional
        Questions and documents for qa_1 and qa_2.

    Returns
    -------
    pd.DataFrame
        Columns ``context question answer_prefix answer max_new_tokens task`` as in kvpress's RULER dataset, ``depths``
        (see ``Sample``) and ``context_tokens``. With several questions also ``context_number``, which tells a task's
        contexts apart, and ``turn``, from 1, the order in which they are asked.

    Raises
    ------
    ValueError
        If a task is unknown, lacks its file or cannot ask so often, a length does not suit a task, or a file is not of
        its format.
    """
    length = int(data_dir)
    files = {"squad_file": squad_file, "hotpotqa_file": hotpotqa_file}
    if tasks is None and n_questions > 1:
        tasks = MANY_QUESTION_TASKS
    elif tasks is None:
        tasks = [*TASKS, *(task for task, (setting, _) in QUESTION_TASKS.items() if files[setting] is not None)]
    check_tasks(tasks, files, n_questions)
    measure = Measure(length, lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids))
    essay = _built_in_essay() if text_file is None else Essay(read_text(text_file))

    def generators(task: str) -> Iterator[random.Random]:
        return (random.Random(f"{seed}/{task}/{index}") for index in range(n_samples))

    rows = []
    for task in tasks:
        shared = random.Random(f"{seed}/{task}")
        # The questions about each context.
        contexts: Iterable[list[Sample]]
        if task in NEEDLE_TASKS:
            start = shared.random()
            contexts = (
                NEEDLE_TASKS[task].write(even_depth(index, start), generator, measure, essay, n_questions)
                for index, generator in enumerate(generators(task))
            )
        elif task in _LIST_TASKS:
            contexts = ([_LIST_TASKS[task](generator, measure)] for generator in generators(task))
        else:
            setting, read = QUESTION_TASKS[task]
            file = files[setting]
            assert file is not None  # check_tasks has seen to it
            contexts = ([sample] for sample in write_questions(read(file), generators(task), shared, measure))
        try:
            for number, samples in enumerate(contexts):
                fixed: dict[str, Any] = {"task": task, "max_new_tokens": _MAX_NEW_TOKENS[task.split("_")[0]]}
                fixed["context_tokens"] = measure.count_tokens(samples[0].context)
                for turn, sample in enumerate(samples, start=1):
                    order = {"context_number": number, "turn": turn} if n_questions > 1 else {}
                    rows.append({**asdict(sample), **fixed, **order})
        except ValueError as error:
            raise ValueError(f"{task}: {error}") from error
    return pd.DataFrame(rows)
