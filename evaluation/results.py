# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""The folder that an evaluation leaves: config.yaml, predictions.csv and metrics.json."""

from __future__ import annotations

import json
import platform
import shutil
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from kvpress import BasePress
from transformers import PreTrainedModel

from evaluation.config import EvaluationConfig
from evaluation.presses import choose_attention
from kvpress_merging import __version__


def write_results(
    config: EvaluationConfig,
    press: BasePress | None,
    model: PreTrainedModel,
    predictions: pd.DataFrame,
    metrics: dict[str, Any],
) -> Path:
    """
    Write the three files into a folder of their own, which appears whole or not at all.

    The folder is never one that is there already: a second run of the same configuration goes to a sub-folder ``1``,
    a third to ``2``.

    Parameters
    ----------
    config : EvaluationConfig
        What was measured; ``output_dir`` says where the folder goes.
    press : BasePress or None
        The press as it was used.
    model : PreTrainedModel
        The model.
    predictions : pd.DataFrame
        One row for each sample. Lists are written as JSON.
    metrics : dict
        ``{task: {name: value}}``.

    Returns
    -------
    Path
        The folder.
    """
    output_dir = Path(config.output_dir).expanduser()
    output_dir.mkdir(parents=True, exist_ok=True)
    folder = output_dir / config.folder_name()
    temporary = output_dir / f".{folder.name}.{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        config.press_init_command = str(press)
        config.save(temporary / "config.yaml", describe_versions(config, press, model))
        _as_csv(predictions).to_csv(temporary / "predictions.csv", index=False)
        (temporary / "metrics.json").write_text(json.dumps(metrics, indent=4) + "\n", encoding="utf-8")
        return _place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    }


def _as_csv(predictions: pd.DataFrame) -> pd.DataFrame:
    """The same table with lists as JSON."""
    table = predictions.copy()
    for name in table.select_dtypes("object").columns:
        table[name] = [json.dumps(cell) if isinstance(cell, list) else cell for cell in table[name]]
    return table


def _place(temporary: Path, folder: Path) -> Path:
    """Rename a folder to the first of ``folder``, ``folder/1``, ``folder/2`` ... that is not there."""
    number = 0
    while True:
        target = folder / str(number) if number else folder
        if not target.exists():
            try:
                return temporary.rename(target)
            except OSError:
                # Another process was faster, unless the folder is still not there.
                if not target.exists():
                    raise
        number += 1
