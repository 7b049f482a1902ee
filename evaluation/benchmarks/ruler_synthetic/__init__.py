# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
RULER's tasks, made here: no download, any length, any model.

What the tasks are follows the paper (RULER: What's the Real Context Size of Your Long-Context Language Models?,
arXiv 2404.06654). Wording, words and prose are our own, so scores are not those of the published dataset.
"""

from evaluation.benchmarks.ruler_synthetic.tasks import (
    MANY_QUESTION_TASKS,
    QUESTION_TASKS,
    TASKS,
    check_tasks,
    generate,
)

__all__ = ["MANY_QUESTION_TASKS", "QUESTION_TASKS", "TASKS", "check_tasks", "generate"]
