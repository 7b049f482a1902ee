# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Fidelity as a dataset: how far a model strays from its full cache, over windows of a text."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.benchmarks.fidelity.measure import Reference, compare_caches, measure_reference
from evaluation.prefill import Prefilled
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


class Windows:
    """
    Windows of a text as a reading: each is a context, and what truly follows is read over its cache.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    samples : pd.DataFrame
        What ``load_windows`` gave.
    """

    def __init__(self, model: PreTrainedModel, samples: pd.DataFrame):
        self.model = model
        self.samples = samples.drop(columns="window")
        self.contexts = [samples.iloc[[i]] for i in range(len(samples))]

    def input_ids(self, context: pd.DataFrame) -> torch.Tensor:
        """The window's context, of shape ``(1, context_length)``."""
        return context["window"].iloc[0].context_ids

    def read_full_cache(self, context: pd.DataFrame, prefilled: Prefilled) -> None:
        """Nothing: the full cache of each window is measured once for all presses."""

    def measure(self, context: pd.DataFrame, prefilled: Prefilled, full: None = None) -> list[dict[str, Any]]:
        """
        Compare a cache of the window's context with the full one.

        Returns
        -------
        list of dict
            One: ``METRICS``, the error of each layer as ``attention_error_layer_<i>``, the share of the cache that
            attention no longer sees as ``compression_ratio``, bytes, and seconds.
        """
        reference = _reference(self.model, context["window"].iloc[0]).to(self.model.device)
        fidelity = compare_caches(self.model, prefilled, reference)
        errors = fidelity.attention_errors
        return [
            {
                **{name: getattr(fidelity, name) for name in METRICS[:-1]},
                "attention_error": sum(errors) / len(errors),
                **{f"attention_error_layer_{i}": error for i, error in enumerate(errors)},
                "compression_ratio": 1 - fidelity.cache_bytes_seen / fidelity.cache_bytes_full,
                "cache_bytes": fidelity.cache_bytes,
                "cache_bytes_full": fidelity.cache_bytes_full,
                "prefill_seconds": fidelity.prefill_seconds,
                "press_seconds": prefilled.press_seconds,
                "prefill_seconds_full": fidelity.prefill_seconds_full,
            }
        ]


def score(predictions: pd.DataFrame) -> pd.DataFrame:
    """The columns of ``METRICS``, which ``Windows`` has filled."""
    return predictions[list(METRICS)]


def _reference(model: PreTrainedModel, window: Window) -> Reference:
    """The full cache's side, measured once for all presses that one process measures with a model. On the CPU."""
    references = _REFERENCES.setdefault(model, {})
    tokens = [ids.numpy().tobytes() for ids in (window.context_ids, window.continuation_ids)]
    key = (*tokens, str(model.config._attn_implementation))
    if key not in references:
        references[key] = measure_reference(model, window, attention_errors=True).to("cpu")
    return references[key]
