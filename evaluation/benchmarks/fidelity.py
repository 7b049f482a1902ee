# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Fidelity as a dataset: how far a model strays from its full cache, over windows of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
from kvpress import BasePress, KnormPress
from scipy.stats import bootstrap
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.fidelity import Fidelity, Reference, measure_fidelity, measure_reference
from evaluation.text import Window, cut_windows, read_text

if TYPE_CHECKING:
    from evaluation.config import EvaluationConfig

TASK = "fidelity"

METRICS = ("kl", "nll", "nll_full", "top1_agreement", "attention_error")
"""What is measured of each window; see ``Fidelity``. ``attention_error`` is the mean over layers."""

N_RESAMPLES = 2000
"""Bootstrap samples that an interval is made of."""

_REFERENCES: WeakKeyDictionary[PreTrainedModel, dict[tuple, Reference]] = WeakKeyDictionary()


def load_windows(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """
    Cut ``n_samples`` windows out of the text: ``data_dir`` tokens to prefill, ``continuation_length`` that follow.

    Returns
    -------
    pd.DataFrame
        Columns ``window``, ``start`` (in tokens) and ``task``.

    Raises
    ------
    ValueError
        If the text is too short for the windows, or no text.
    OSError
        If the text cannot be read.
    """
    assert config.data_dir is not None  # the configuration fills it in
    windows = cut_windows(
        read_text(config.text_file), tokenizer, config.n_samples, int(config.data_dir), config.continuation_length
    )
    return pd.DataFrame({"task": TASK, "start": [window.start for window in windows], "window": windows})


def measure_windows(
    model: PreTrainedModel, press: BasePress | None, windows: pd.DataFrame, *, quiet: bool = False
) -> pd.DataFrame:
    """
    Measure a press on each window.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    press : BasePress or None
        The press; None compares the full cache with itself.
    windows : pd.DataFrame
        What ``load_windows`` gave.
    quiet : bool
        Without a progress bar.

    Returns
    -------
    pd.DataFrame
        One row for each window: ``METRICS``, the error of each layer as ``attention_error_layer_<i>``, the share of the
        cache that attention no longer sees as ``compression_ratio``, bytes, and seconds.
    """
    if press is None:
        press = KnormPress(compression_ratio=0.0)  # evicts nothing
    rows = []
    for window in tqdm(windows["window"], desc=TASK, unit="window", disable=quiet, leave=None):
        reference = _reference(model, window).to(model.device)
        rows.append(_row(measure_fidelity(model, press, reference)))
    return windows.drop(columns="window").join(pd.DataFrame(rows, index=windows.index))


def score(predictions: pd.DataFrame) -> pd.DataFrame:
    """The columns of ``METRICS``, which ``measure_windows`` has filled."""
    return predictions[list(METRICS)]


def means_with_intervals(scores: pd.DataFrame, seed: int) -> dict[str, dict[str, Any]]:
    """
    Mean of each metric over the windows, with a 95 % bootstrap interval (percentiles) of that mean.

    Parameters
    ----------
    scores : pd.DataFrame
        One row for each window, one column for each metric.
    seed : int
        Draws the bootstrap samples.

    Returns
    -------
    dict
        ``{"fidelity": {metric: mean, f"{metric}_interval": [low, high]}}``; no interval if there is one window only.
    """
    metrics: dict[str, Any] = {}
    for name, column in scores.items():
        values = column.to_numpy()
        metrics[str(name)] = float(values.mean())
        if len(values) > 1:
            interval = bootstrap(
                (values,), np.mean, n_resamples=N_RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
            ).confidence_interval
            metrics[f"{name}_interval"] = [float(interval.low), float(interval.high)]
    return {TASK: metrics}


def _reference(model: PreTrainedModel, window: Window) -> Reference:
    """The full cache's side, measured once for all presses that one process measures with a model. On the CPU."""
    references = _REFERENCES.setdefault(model, {})
    key = (
        window.context_ids.numpy().tobytes(),
        window.continuation_ids.numpy().tobytes(),
        str(model.config._attn_implementation),
    )
    if key not in references:
        references[key] = measure_reference(model, window, attention_errors=True).to("cpu")
    return references[key]


def _row(fidelity: Fidelity) -> dict[str, float]:
    return {
        "kl": fidelity.kl,
        "nll": fidelity.nll,
        "nll_full": fidelity.nll_full,
        "top1_agreement": fidelity.top1_agreement,
        "attention_error": sum(fidelity.attention_errors) / len(fidelity.attention_errors),
        **{f"attention_error_layer_{i}": error for i, error in enumerate(fidelity.attention_errors)},
        "compression_ratio": 1 - fidelity.cache_bytes_seen / fidelity.cache_bytes_full,
        "cache_bytes": fidelity.cache_bytes,
        "cache_bytes_full": fidelity.cache_bytes_full,
        "prefill_seconds": fidelity.prefill_seconds,
        "prefill_seconds_full": fidelity.prefill_seconds_full,
    }
