# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""The folder that an evaluation leaves: config.yaml, predictions.csv and metrics.json."""

from __future__ import annotations

import dataclasses
import glob
import itertools
import json
import platform
import shutil
import uuid
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from kvpress import BasePress
from transformers import PreTrainedModel

from evaluation.config import PRESS_FIELDS, EvaluationConfig
from evaluation.evaluate_registry import PRESS_REGISTRY
from evaluation.presses import choose_attention
from kvpress_merging import __version__

FILES = ("config.yaml", "predictions.csv", "metrics.json")
"""What makes a folder a run."""

# What a saved configuration says that does not change what is measured.
_HOW = ("press_init_command", "versions", "output_dir", "log_level", "quiet", "device", "trust_remote_code")


def write_results(
    config: EvaluationConfig,
    press: BasePress | None,
    model: PreTrainedModel,
    predictions: pd.DataFrame,
    metrics: dict[str, Any],
) -> Path:
    """
    Write what was measured with a press, as it was used, and a model: see ``write_files``.

    Returns
    -------
    Path
        The folder.
    """
    config.press_init_command = str(press)
    return write_files(config, describe_versions(config, press, model), predictions, metrics)


def write_files(
    config: EvaluationConfig, versions: dict[str, str], predictions: pd.DataFrame, metrics: dict[str, Any]
) -> Path:
    """
    Write the three files into a folder of their own, which appears whole or not at all.

    The folder is never one that is there already: a second run of the same configuration goes to a sub-folder ``1``,
    a third to ``2``.

    Parameters
    ----------
    config : EvaluationConfig
        What was measured; ``output_dir`` says where the folder goes.
    versions : dict
        What ``describe_versions`` says.
    predictions : pd.DataFrame
        One row for each sample. Lists are written as JSON.
    metrics : dict
        ``{task: {name: value}}``.

    Returns
    -------
    Path
        The folder.
    """

    def write(place: Path) -> None:
        config.save(place / "config.yaml", versions)
        _as_csv(predictions).to_csv(place / "predictions.csv", index=False)
        (place / "metrics.json").write_text(json.dumps(metrics, indent=4) + "\n", encoding="utf-8")

    return write_folder(Path(config.output_dir).expanduser() / config.folder_name(), write)


def write_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """
    Have ``write`` fill a new folder, which appears whole or not at all.

    Parameters
    ----------
    folder : Path
        Where it goes. If it is there and not empty, to its sub-folder ``1``, or ``2``, and so on.
    write : callable
        Takes the folder to write to.

    Returns
    -------
    Path
        The folder that appeared.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        write(temporary)
        return _place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove what processes that were killed while they wrote ``names`` into a folder have left there."""
    for name in names:
        for leftover in folder.glob(f".{glob.escape(name)}.{'[0-9a-f]' * 32}"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


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


def measured_settings(record: dict[str, Any]) -> dict[str, Any]:
    """
    What two configurations that measure the same have in common.

    Parameters
    ----------
    record : dict
        A configuration as it is saved.

    Returns
    -------
    dict
        The settings that say what is measured and are not default.
    """
    press = PRESS_REGISTRY.get(record["press_name"])
    defaults = {setting.name: setting.default for setting in dataclasses.fields(EvaluationConfig)}
    defaults |= {name: getattr(press, name) for name in PRESS_FIELDS if hasattr(press, name)}
    return {
        name: value
        for name, value in record.items()
        if name not in _HOW and value is not None and value != {} and value != defaults.get(name)
    }


def describe_versions(config: EvaluationConfig, press: BasePress | None, model: PreTrainedModel) -> dict[str, str]:
    """What results depend on beside the configuration: versions of packages, device, data type, attention."""
    packages = {name: version(name) for name in ("torch", "transformers", "kvpress")}
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        **packages,
        "kvpress-merging": __version__,
        "device": device,
        "dtype": str(model.dtype),
        "attention": choose_attention(config, press, model),
        # Sums are split among threads, and come out a little different for another number of them.
        "threads": str(torch.get_num_threads()),
    }


def _as_csv(predictions: pd.DataFrame) -> pd.DataFrame:
    """The same table with lists as JSON."""
    table = predictions.copy()
    for name in table.select_dtypes("object").columns:
        table[name] = [json.dumps(cell) if isinstance(cell, list) else cell for cell in table[name]]
    return table


def _place(temporary: Path, folder: Path) -> Path:
    """Rename a folder to the first of ``folder``, ``folder/1``, ``folder/2`` ... that is not there, or is empty."""
    number = 0
    while True:
        target = folder / str(number) if number else folder
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            try:
                return temporary.rename(target)
            except OSError:
                # Another process was faster, unless the folder is still not there.
                if not target.exists():
                    raise
        number += 1
