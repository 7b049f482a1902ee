# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What can be named in a configuration: datasets, their scorers, and presses."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping

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

from evaluation.benchmarks import fidelity, longbench, needle_in_haystack, ruler, ruler_synthetic
from evaluation.cli import closest
from evaluation.config import NO_PRESS, EvaluationConfig
from kvpress_merging import PRESS_REGISTRY as MERGING_PRESSES
from kvpress_merging.registry import PREFILL_PRESSES, PressRegistry

DATASET_REGISTRY: dict[str, Callable[..., pd.DataFrame]] = {
    "ruler-synthetic": ruler_synthetic.load_ruler_synthetic,
    "fidelity": fidelity.load_windows,
    "ruler": ruler.load_ruler,
    "longbench": longbench.load_longbench,
    "needle_in_haystack": needle_in_haystack.load_needle_in_haystack,
}
"""
Dataset to what loads it: from the model's tokenizer, and settings as keyword arguments of their names, a table with one
row for each sample.
"""

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


def check_names(config: EvaluationConfig) -> None:
    """Raise a ValueError if there is no such press, or no such task of ruler-synthetic."""
    if config.press_name not in PRESS_REGISTRY:
        raise ValueError(
            f"--press_name: there is no {config.press_name!r}{closest(str(config.press_name), PRESS_REGISTRY)}"
        )
    if config.dataset == "ruler-synthetic" and config.tasks is not None:
        ruler_synthetic.check_tasks(config.tasks, vars(config))
