# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What can be named in a configuration: datasets, their scorers, and presses."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import pandas as pd
from kvpress import (
    AdaKVPress,
    BasePress,
    CAMPress,
    DecodingPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    QFilterPress,
    SnapKVPress,
    StreamingLLMPress,
    ThinKPress,
    TOVAPress,
)
from transformers import PreTrainedTokenizerBase

from evaluation.benchmarks import fidelity, longbench, needle_in_haystack, ruler
from evaluation.benchmarks.hub import load_hub_dataset
from evaluation.benchmarks.ruler_synthetic import load_ruler_synthetic
from kvpress_merging import PRESS_REGISTRY as MERGING_PRESSES
from kvpress_merging.registry import PREFILL_PRESSES, PressRegistry

if TYPE_CHECKING:
    from evaluation.config import EvaluationConfig

NO_PRESS = "no_press"
"""The press name that means the full cache."""


def _load_ruler(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    samples = load_hub_dataset("ruler", config.data_dir, ruler.COLUMNS, quiet=config.quiet)
    if config.tasks is None:
        return samples
    if missing := set(config.tasks) - set(samples["task"]):
        known = ", ".join(sorted(set(samples["task"])))
        raise ValueError(f"--tasks: the dataset has no {', '.join(sorted(missing))}, only {known}")
    return samples[samples["task"].isin(config.tasks)].reset_index(drop=True)


def _load_longbench(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    return load_hub_dataset("longbench", config.data_dir, longbench.COLUMNS, quiet=config.quiet)


def _load_needle_in_haystack(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    assert config.max_context_length is not None  # the configuration makes sure
    assert isinstance(config.needle_depth, list)
    essays = load_hub_dataset("needle_in_haystack", config.data_dir, needle_in_haystack.COLUMNS, quiet=config.quiet)
    return needle_in_haystack.hide_needle(essays, tokenizer, config.max_context_length, config.needle_depth)


DATASET_REGISTRY: dict[str, Callable[[EvaluationConfig, PreTrainedTokenizerBase], pd.DataFrame]] = {
    "ruler-synthetic": load_ruler_synthetic,
    "fidelity": fidelity.load_windows,
    "ruler": _load_ruler,
    "longbench": _load_longbench,
    "needle_in_haystack": _load_needle_in_haystack,
}
"""Dataset to what loads it: from a configuration and the model's tokenizer, a table with one row for each sample."""

SCORER_REGISTRY: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "ruler-synthetic": ruler.string_match,
    "fidelity": fidelity.score,
    "ruler": ruler.string_match,
    "longbench": longbench.score,
    "needle_in_haystack": needle_in_haystack.score,
}
"""Dataset to what scores its predictions: from the table of predictions, one with a column for each metric."""

# kvpress's own names and settings.
_BARE_PRESSES: dict[str, Callable[[], BasePress]] = {
    **PREFILL_PRESSES,
    # The press inside merging_expected_attention alone: kvpress's expected_attention is this one within an AdaKVPress.
    "expected_attention_head": lambda: ExpectedAttentionPress(epsilon=1e-2),
    "think": ThinKPress,
    "cam_adakv_snapkv": lambda: CAMPress(base_press=AdaKVPress(SnapKVPress())),
    "cam_knorm": lambda: CAMPress(base_press=KnormPress()),
    "cam_streaming_llm": lambda: CAMPress(base_press=StreamingLLMPress()),
    "cam_tova": lambda: CAMPress(base_press=TOVAPress()),
    "decoding_adakv_expected_attention_e2": lambda: DecodingPress(
        base_press=AdaKVPress(ExpectedAttentionPress(epsilon=1e-2))
    ),
    "decoding_adakv_snapkv": lambda: DecodingPress(base_press=AdaKVPress(SnapKVPress())),
    "decoding_keydiff": lambda: DecodingPress(base_press=KeyDiffPress()),
    "decoding_knorm": lambda: DecodingPress(base_press=KnormPress()),
    "decoding_qfilter": lambda: DecodingPress(base_press=QFilterPress()),
    "decoding_streaming_llm": lambda: DecodingPress(base_press=StreamingLLMPress()),
    "decoding_tova": lambda: DecodingPress(base_press=TOVAPress()),
}

# Only ever read: a ChainMap writes to its first map alone, and these have no way to be written.
PRESS_REGISTRY: Mapping[str, BasePress | None] = ChainMap(
    MERGING_PRESSES,  # type: ignore[arg-type]
    PressRegistry(_BARE_PRESSES),  # type: ignore[arg-type]
    {NO_PRESS: None},
)
"""Press by name, made anew at each look-up: ``no_press``, kvpress's by the names of its own evaluation, and ours."""
