# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""The folder that an evaluation leaves: config.yaml, predictions.csv and metrics.json."""

from __future__ import annotations

import itertools
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from kvpress import BasePress
from transformers import PreTrainedModel

from evaluation.config import EvaluationConfig, measured_settings
from evaluation.files import write_folder
from evaluation.presses import choose_attention
from kvpress_merging import __version__

FILES = ("config.yaml", "predictions.csv", "metrics.json")
"""What makes a folder a run."""

IDENTITY = (
    *("task", "start", "context", "question", "answer_prefix", "answer", "answers", "all_classes"),
    *("needle", "needle_depth"),
)
"""Columns that say which sample a row is about."""


def write_results(
    config: EvaluationConfig,
    press: BasePress | None,
    model: PreTrainedModel,
    predictions: pd.DataFrame,
    metrics: dict[str, Any],
) -> Path:
    """Write what was measured with a press, as it was used, and a model: see ``write_files``."""
    config.press_init_command = str(press)
    return write_files(config, describe_versions(config, press, model), predictions, metrics)


def write_files(
    config: EvaluationConfig, versions: dict[str, str], predictions: pd.DataFrame, metrics: dict[str, Any]
) -> Path:
    """
    Write the three files into a folder of their own, which appears whole or not at all.

    The folder goes to ``config.output_dir`` and is never one that is there already: a second run of the same
    configuration goes to a sub-folder ``1``, a third to ``2``. Versions are what ``describe_versions`` says, lists in
    the predictions are written as JSON, and metrics are ``{task: {name: value}}``.
    """
    table = predictions.copy()
    for name in table.select_dtypes("object").columns:
        table[name] = [json.dumps(cell) if isinstance(cell, list) else cell for cell in table[name]]

    def write(place: Path) -> None:
        config.save(place / "config.yaml", versions)
        table.to_csv(place / "predictions.csv", index=False, lineterminator="\n")
        (place / "metrics.json").write_text(json.dumps(metrics, indent=4) + "\n", encoding="utf-8")

    return write_folder(Path(config.output_dir).expanduser() / config.folder_name(), write)


def read_predictions(folder: Path) -> pd.DataFrame:
    """
    Read the ``predictions.csv`` of a run.

    What the model said and what says which sample it was (``IDENTITY``) come as the text that was written, whatever it
    looks like: digits are no number, and neither ``nan`` nor nothing at all is a missing value. The rest is read as
    pandas reads it. Where the file cannot be read that is an ``OSError`` or a ``ValueError``.
    """
    # A converter takes the place of all that pandas makes of a text by itself; and a carriage return ends no line.
    as_text = dict.fromkeys((*IDENTITY, "predicted_answer"), str)
    return pd.read_csv(folder / "predictions.csv", converters=as_text, lineterminator="\n")


def find_results(config: EvaluationConfig) -> Path | None:
    """The folder with the results of a configuration, if they are there: however it was run, and by what versions."""
    folder = Path(config.output_dir).expanduser() / config.folder_name()
    for number in itertools.count():
        place = folder / str(number) if number else folder
        if not place.exists():
            return None
        if all((place / name).is_file() for name in FILES):
            try:
                record = yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8"))
                if measured_settings(record) == measured_settings(config.record()):
                    return place
            except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError):
                continue  # of another program
    return None


def describe_versions(config: EvaluationConfig, press: BasePress | None, model: PreTrainedModel) -> dict[str, str]:
    """What results depend on beside the configuration: versions of packages, device, data type, attention."""
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.machine()
    return {
        **package_versions(),
        "device": device,
        "dtype": str(model.dtype),
        "attention": choose_attention(config, press, model),
        # Sums are split among threads, and come out a little different for another number of them.
        "threads": str(torch.get_num_threads()),
    }


def package_versions() -> dict[str, str]:
    """Versions of what results depend on, known without a model."""
    packages = {name: version(name) for name in ("torch", "transformers", "kvpress")}
    return {"python": platform.python_version(), **packages, "kvpress-merging": __version__}
