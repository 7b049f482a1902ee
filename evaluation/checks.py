# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What the settings of an evaluation may be. Whatever is not allowed is a ValueError that names the flag."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.benchmarks.ruler_synthetic import check_tasks
from evaluation.cli import closest
from evaluation.evaluate_registry import DATASET_REGISTRY, PRESS_REGISTRY

if TYPE_CHECKING:
    from evaluation.config import EvaluationConfig

ONLY_FOR = {
    "needle_depth": {"needle_in_haystack"},
    "tasks": {"ruler", "ruler-synthetic"},
    "n_samples": {"ruler-synthetic", "fidelity"},
    "text_file": {"ruler-synthetic", "fidelity"},
    "squad_file": {"ruler-synthetic"},
    "hotpotqa_file": {"ruler-synthetic"},
    "continuation_length": {"fidelity"},
    "max_new_tokens": set(DATASET_REGISTRY) - {"fidelity"},
    "max_context_length": set(DATASET_REGISTRY) - {"fidelity"},
    "query_aware": set(DATASET_REGISTRY) - {"fidelity"},
}
"""Settings that only some datasets have a use for, and which."""

# Setting, what it may be, and whether a number is that.
_NUMBERS = (
    ("compression_ratio", "in [0, 1)", lambda x: 0 <= x < 1),
    ("key_channel_compression_ratio", "in [0, 1)", lambda x: 0 <= x < 1),
    ("head_compression_ratio", "in [0, 1]", lambda x: 0 <= x <= 1),
    ("threshold", "a finite number", math.isfinite),
    ("fraction", "in (0, 1]", lambda x: 0 < x <= 1),
    ("max_new_tokens", "a positive integer", lambda x: isinstance(x, int) and x >= 1),
    ("max_context_length", "a positive integer", lambda x: isinstance(x, int) and x >= 1),
    ("needle_depth", "an integer from 0 to 100", lambda x: isinstance(x, int) and 0 <= x <= 100),
    ("compression_interval", "a positive integer", lambda x: isinstance(x, int) and x >= 1),
    ("target_size", "a positive integer", lambda x: isinstance(x, int) and x >= 1),
    ("hidden_states_buffer_size", "an integer of at least 0", lambda x: isinstance(x, int) and x >= 0),
    ("seed", "an integer from 0 to 4294967295", lambda x: isinstance(x, int) and 0 <= x < 2**32),
    ("n_samples", "a positive integer", lambda x: isinstance(x, int) and x >= 1),
    ("continuation_length", "an integer of at least 2", lambda x: isinstance(x, int) and x >= 2),
)


def check_names(config: EvaluationConfig) -> None:
    """Names are known, and the dataset has a use for each setting that is not default."""
    for setting, valid in (
        ("dataset", DATASET_REGISTRY),
        ("press_name", PRESS_REGISTRY),
        ("log_level", ("DEBUG", "INFO", "WARNING", "ERROR")),
    ):
        if (name := getattr(config, setting)) not in valid:
            raise ValueError(f"--{setting}: there is no {name!r}{closest(str(name), valid)}")
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, datasets in ONLY_FOR.items():
        if getattr(config, name) != defaults[name] and config.dataset not in datasets:
            useful = ", ".join(sorted(datasets))
            raise ValueError(f"--{name} is of no use for the dataset {config.dataset}, only for {useful}")


def check_values(config: EvaluationConfig) -> None:
    """Values are of a type and in a range that is allowed, files are there, and so is what the dataset needs."""
    _check_types(config)
    _check_numbers(config)
    for name in ("text_file", "squad_file", "hotpotqa_file"):
        file = getattr(config, name)
        if file is not None and not Path(file).expanduser().is_file():
            raise ValueError(f"--{name}: there is no file {str(file)!r}")
    if config.dataset == "ruler-synthetic" and config.tasks is not None:
        check_tasks(config.tasks, vars(config))
    if config.dataset == "needle_in_haystack":
        for name in ("needle_depth", "max_context_length"):
            if getattr(config, name) is None:
                raise ValueError(f"the dataset needle_in_haystack needs --{name}")


def _check_types(config: EvaluationConfig) -> None:
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        # A type is its text, or what HfArgumentParser has made of that. An optional setting may be None.
        if "bool" in str(setting.type) and not isinstance(value, (bool, type(setting.default))):
            raise ValueError(f"--{setting.name} must be true or false, got {value!r}")
    if config.tasks is not None and not (
        isinstance(config.tasks, list) and config.tasks and all(isinstance(task, str) for task in config.tasks)
    ):
        raise ValueError(f"--tasks must be names of tasks, got {config.tasks!r}")


def _check_numbers(config: EvaluationConfig) -> None:
    for name, allowed, is_allowed in _NUMBERS:
        value = getattr(config, name)
        if value is None:
            continue
        for number in value if name == "needle_depth" and isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not is_allowed(number):
                raise ValueError(f"--{name} must be {allowed}, got {number!r}")
