# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What can be named in a configuration: datasets, their scorers, and presses."""

from __future__ import annotations

import contextlib
import logging
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import kvpress
import pandas as pd
from kvpress import (
    BasePress,
    CAMPress,
    DecodingPress,
    ExpectedAttentionPress,
    KVzapPress,
    ObservedAttentionPress,
    ScorerPress,
    ThinKPress,
)

from evaluation.benchmarks import fidelity, longbench, needle_in_haystack, ruler, ruler_synthetic
from evaluation.cli import closest
from evaluation.config import NO_PRESS, EvaluationConfig
from evaluation.peers.grkv import GRKVPress
from evaluation.peers.kvfold import KVFoldPress
from evaluation.peers.scored_press import gives_scores
from kvpress_merging import PRESS_REGISTRY as MERGING_PRESSES
from kvpress_merging.checks import rotates_keys
from kvpress_merging.registry import DECODING_PRESSES, PREFILL_PRESSES, PressRegistry
from kvpress_merging.wrapping import nested_presses

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


@contextlib.contextmanager
def unused_presses() -> Iterator[None]:
    """Presses that are made only to be looked at have nothing to warn of: they will when they are used."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)


def _kvfold(press: BasePress) -> BasePress:
    is_log = any(isinstance(inner, KVzapPress) for inner in nested_presses(press))
    return KVFoldPress(press, score_map="identity" if is_log else "auto")


def _peers() -> dict[str, Callable[[], BasePress]]:
    """What is inside ``merging_<name>``, in the wrappers of others, each where it can wrap that."""
    factories: dict[str, Callable[[], BasePress]] = {}
    with unused_presses():
        for ours in MERGING_PRESSES:
            prefix, _, name = ours.partition("_")
            press = MERGING_PRESSES[ours].press  # type: ignore[attr-defined]
            wrappers: dict[str, Callable[[Any], BasePress]] = {}
            if prefix == "merging" and not isinstance(press, DecodingPress):
                has_weights = any(isinstance(inner, ObservedAttentionPress) for inner in nested_presses(press))
                if gives_scores(press) and not has_weights:  # attention that gives its weights adds no bias
                    wrappers["kvfold"] = _kvfold
                if gives_scores(press) and not rotates_keys(press):
                    wrappers["grkv"] = GRKVPress
                if isinstance(press, ScorerPress):
                    wrappers["kvpress_merging"] = kvpress.MergingPress
            for wrapper_name, wrapper in wrappers.items():
                factories[f"{wrapper_name}_{name}"] = lambda ours=ours, wrapper=wrapper: wrapper(  # type: ignore[misc]
                    MERGING_PRESSES[ours].press  # type: ignore[attr-defined]
                )
    return factories


# Only ever read: a ChainMap writes to its first map alone, and these have no way to be written.
PRESS_REGISTRY: Mapping[str, BasePress | None] = ChainMap(
    MERGING_PRESSES,  # type: ignore[arg-type]
    PressRegistry(_BARE_PRESSES),  # type: ignore[arg-type]
    PressRegistry(_peers()),  # type: ignore[arg-type]
    {NO_PRESS: None},
)
"""
Press by name, made anew at each look-up: ``no_press``, kvpress's by the names of its own evaluation, ours, and those of
others: ``kvfold_<name>``, ``grkv_<name>`` and, with kvpress's own MergingPress, ``kvpress_merging_<name>``, around the
press inside ``merging_<name>``.
"""


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
