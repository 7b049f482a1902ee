# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What can be named in a configuration: datasets, their scorers, and presses."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping

import pandas as pd
from kvpress import BasePress, CAMPress, ExpectedAttentionPress, ThinKPress

from evaluation.benchmarks import fidelity, longbench, needle_in_haystack, ruler, ruler_synthetic
from evaluation.cli import closest
from evaluation.config import NO_PRESS, EvaluationConfig
from kvpress_merging import PRESS_REGISTRY as MERGING_PRESSES
from kvpress_merging.registry import DECODING_PRESSES, PREFILL_PRESSES, PressRegistry

DATASET_REGISTRY: dict[str, Callable[..., pd.DataFrame]] = {
    "ruler-synthetic": ruler_synthetic.generate,
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
    **DECODING_PRESSES,
    # The press inside merging_expected_attention alone: kvpress's expected_attention is this one within an AdaKVPress.
    "expected_attention_head": lambda: ExpectedAttentionPress(epsilon=1e-2),
    "think": ThinKPress,
    **{
        f"cam_{name}": lambda name=name: CAMPress(base_press=PREFILL_PRESSES[name]())  # type: ignore[arg-type,misc]
        for name in ("adakv_snapkv", "knorm", "streaming_llm", "tova")
    },
}

# Only ever read: a ChainMap writes to its first map alone, and these have no way to be written.
PRESS_REGISTRY: Mapping[str, BasePress | None] = ChainMap(
    MERGING_PRESSES,  # type: ignore[arg-type]
    PressRegistry(_BARE_PRESSES),  # type: ignore[arg-type]
    {NO_PRESS: None},
)
"""Press by name, made anew at each look-up: ``no_press``, kvpress's by the names of its own evaluation, and ours."""


def check_names(config: EvaluationConfig) -> None:
    """Raise a ValueError if there is no such press, or questions of ruler-synthetic that cannot be asked."""
    if config.press_name not in PRESS_REGISTRY:
        raise ValueError(
            f"--press_name: there is no {config.press_name!r}{closest(str(config.press_name), PRESS_REGISTRY)}"
        )
    if config.n_questions > 1 and config.query_aware:
        raise ValueError("--n_questions asks over one compressed context, and --query_aware compresses one for each")
    if config.dataset == "ruler-synthetic" and config.tasks is not None:
        ruler_synthetic.check_tasks(config.tasks, vars(config), config.n_questions)
