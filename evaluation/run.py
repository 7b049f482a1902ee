# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Measure one press on one dataset, as kvpress's evaluation does: with its flags, and into its files."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import transformers

from evaluation.benchmarks.hub import DatasetUnavailableError
from evaluation.cli import closest, fail, parse_config
from evaluation.config import FIELDS, RECORDED, EvaluationConfig
from evaluation.evaluate import measure, prepare
from evaluation.evaluate_registry import check_names
from evaluation.files import read_mapping
from evaluation.models import ModelUnavailableError
from evaluation.results import write_results

PROG = "python -m evaluation run"


@dataclass
class RunConfig(EvaluationConfig):
    """An evaluation's settings, and the file that some of them may come from."""

    config_file: str | None = field(
        default=None, metadata={"help": "YAML file with settings by these names; flags that are given win over it"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self)


def main(argv: Sequence[str]) -> None:
    """Run an evaluation with command-line arguments."""
    config = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("evaluation").setLevel(logging.WARNING if config.quiet else config.log_level)
    if config.quiet:
        transformers.utils.logging.disable_progress_bar()
    try:
        evaluation = prepare(config)
    except (ModelUnavailableError, DatasetUnavailableError, OSError, ValueError) as error:
        fail(f"{PROG}: {error}")
    predictions, metrics = measure(evaluation)
    folder = write_results(config, evaluation.press, evaluation.model, predictions, metrics)
    print(json.dumps(metrics, indent=4))
    print(f"Written to {folder}")


def parse(argv: Sequence[str]) -> RunConfig:
    """
    Read flags and the YAML file that they name: flags win over the file, and the file over defaults.

    A mistake ends the process with one line on stderr and exit status 2.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config_file", "--config-file")
    try:
        file = finder.parse_known_args(argv)[0].config_file
        argv = [*(read_config_file(file) if file is not None else []), *argv]
    except (argparse.ArgumentError, ValueError) as error:
        fail(f"{PROG}: {error}")
    return parse_config(RunConfig, argv, prog=PROG, description=__doc__ or "")


def read_config_file(file: str | Path) -> list[str]:
    """
    A YAML file's settings, as the flags that say the same.

    What a saved configuration has beside its settings is passed over, and so are settings without a value. A ValueError
    says if the file does not exist, is no mapping of settings to values, or has an unknown setting.
    """
    try:
        settings = read_mapping(Path(file).expanduser())
    except ValueError as error:
        raise ValueError(f"--config_file: {error}") from error
    flags: list[str] = []
    for name, value in settings.items():
        if name in RECORDED or value is None:
            continue
        if name not in FIELDS:
            raise ValueError(f"--config_file: {file} has an unknown setting {name!r}{closest(str(name), FIELDS)}")
        if isinstance(value, list) and "list" in str(FIELDS[name].type):
            flags += [f"--{name}", *map(str, value)]
        elif isinstance(value, (list, dict)) and name != "model_kwargs":
            raise ValueError(f"--config_file: {name} in {file} must be one value, got {value!r}")
        else:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags
