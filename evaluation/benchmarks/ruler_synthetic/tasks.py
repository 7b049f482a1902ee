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


def check_tasks(tasks: Sequence[str], files: Mapping[str, str | Path | None]) -> None:
    """Raise a ``ValueError`` if a task is unknown or lacks its file among ``squad_file`` and ``hotpotqa_file``."""
    for task in tasks:
        if task not in TASKS and task not in QUESTION_TASKS:
            raise ValueError(f"there is no task {task!r}{closest(task, [*TASKS, *QUESTION_TASKS])}")
        if task in QUESTION_TASKS and files[QUESTION_TASKS[task][0]] is None:
            raise ValueError(f"the task {task} needs --{QUESTION_TASKS[task][0]}")


def generate(
    tokenizer: PreTrainedTokenizerBase,
    data_dir: str | int,
    *,
    n_samples: int = 25,
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
    tasks : sequence of str, optional
        Names of tasks, each of ``n_samples``; by default all for which there is a file or which need none.
    text_file : path, optional
        Prose for the tasks that hide needles in an essay; by default the built-in text.
    squad_file, hotpotqa_file : path, optional
        Questions and documents for qa_1 and qa_2.

    Returns
    -------
    pd.DataFrame
        Columns ``context question answer_prefix answer max_new_tokens task`` as in kvpress's RULER dataset, ``depths``
        (see ``Sample``) and ``context_tokens``.

    Raises
    ------
    ValueError
        If a task is unknown or lacks its file, a length does not suit a task, or a file is not of its format.
    """
    length = int(data_dir)
    files = {"squad_file": squad_file, "hotpotqa_file": hotpotqa_file}
    if tasks is None:
        tasks = [*TASKS, *(task for task, (setting, _) in QUESTION_TASKS.items() if files[setting] is not None)]
    check_tasks(tasks, files)
    measure = Measure(length, lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids))
    essay = _built_in_essay() if text_file is None else Essay(read_text(text_file))

    def generators(task: str) -> Iterator[random.Random]:
        return (random.Random(f"{seed}/{task}/{index}") for index in range(n_samples))

    rows = []
    for task in tasks:
        shared = random.Random(f"{seed}/{task}")
        samples: Iterable[Sample]
        if task in NEEDLE_TASKS:
            start = shared.random()
            samples = (
                NEEDLE_TASKS[task].write(even_depth(index, start), generator, measure, essay)
                for index, generator in enumerate(generators(task))
            )
        elif task in _LIST_TASKS:
            samples = (_LIST_TASKS[task](generator, measure) for generator in generators(task))
        else:
            setting, read = QUESTION_TASKS[task]
            file = files[setting]
            assert file is not None  # check_tasks has seen to it
            samples = write_questions(read(file), generators(task), shared, measure)
        try:
            for sample in samples:
                fixed = {"task": task, "max_new_tokens": _MAX_NEW_TOKENS[task.split("_")[0]]}
                rows.append({**asdict(sample), **fixed, "context_tokens": measure.count_tokens(sample.context)})
        except ValueError as error:
            raise ValueError(f"{task}: {error}") from error
    return pd.DataFrame(rows)
