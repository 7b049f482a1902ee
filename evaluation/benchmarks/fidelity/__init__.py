# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Fidelity as a dataset: how far a model strays from its full cache, over windows of a text."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import pandas as pd
from kvpress import BasePress, KnormPress
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.benchmarks.fidelity.measure import Reference, measure_fidelity, measure_reference
from evaluation.text import Window, cut_windows, read_text

TASK = "fidelity"

METRICS = ("kl", "nll", "nll_full", "top1_agreement", "attention_error")
"""What is measured of each window; see ``Fidelity``. ``attention_error`` is the mean over layers."""

_REFERENCES: WeakKeyDictionary[PreTrainedModel, dict[tuple, Reference]] = WeakKeyDictionary()


def load_windows(
    tokenizer: PreTrainedTokenizerBase,
    *,
    data_dir: str,
    n_samples: int,
    continuation_length: int,
    text_file: str | None = None,
) -> pd.DataFrame:
    """
    Cut ``n_samples`` windows out of the text: ``data_dir`` tokens to prefill, ``continuation_length`` that follow.

    Columns ``window``, ``start`` (in tokens) and ``task``. A ValueError says if the text is too short, or no text.
    """
    windows = cut_windows(read_text(text_file), tokenizer, n_samples, int(data_dir), continuation_length)
    return pd.DataFrame({"task": TASK, "start": [window.start for window in windows], "window": windows})


def measure_windows(
    model: PreTrainedModel, press: BasePress | None, windows: pd.DataFrame, *, quiet: bool = False
) -> pd.DataFrame:
    """Measure a press on each window that ``load_windows`` gave: one row for each, see ``measure_window``."""
    progress = tqdm(windows["window"], desc=TASK, unit="window", disable=quiet, leave=None)
    rows = [measure_window(model, press, window) for window in progress]
    return windows.drop(columns="window").join(pd.DataFrame(rows, index=windows.index))


def measure_window(model: PreTrainedModel, press: BasePress | None, window: Window) -> dict[str, float]:
    """
    Measure a press on one window; None compares the full cache with itself.

    Returns
    -------
    dict
        ``METRICS``, the error of each layer as ``attention_error_layer_<i>``, the share of the cache that attention no
        longer sees as ``compression_ratio``, bytes, and seconds.
    """
    if press is None:
        press = KnormPress(compression_ratio=0.0)  # evicts nothing
    fidelity = measure_fidelity(model, press, _reference(model, window).to(model.device))
    errors = fidelity.attention_errors
    return {
        **{name: getattr(fidelity, name) for name in METRICS[:-1]},
        "attention_error": sum(errors) / len(errors),
        **{f"attention_error_layer_{i}": error for i, error in enumerate(errors)},
        "compression_ratio": 1 - fidelity.cache_bytes_seen / fidelity.cache_bytes_full,
        "cache_bytes": fidelity.cache_bytes,
        "cache_bytes_full": fidelity.cache_bytes_full,
        "prefill_seconds": fidelity.prefill_seconds,
        "prefill_seconds_full": fidelity.prefill_seconds_full,
    }


def score(predictions: pd.DataFrame) -> pd.DataFrame:
    """The columns of ``METRICS``, which ``measure_windows`` has filled."""
    return predictions[list(METRICS)]


def _reference(model: PreTrainedModel, window: Window) -> Reference:
    """The full cache's side, measured once for all presses that one process measures with a model. On the CPU."""
    references = _REFERENCES.setdefault(model, {})
    tokens = [ids.numpy().tobytes() for ids in (window.context_ids, window.continuation_ids)]
    key = (*tokens, str(model.config._attn_implementation))
    if key not in references:
        references[key] = measure_reference(model, window, attention_errors=True).to("cpu")
    return references[key]
