# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
A user's program, for mypy --strict: never run.

Each ``type: ignore`` stands where mypy must find a mistake: --strict complains of those that are not needed.
"""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from kvpress import BasePress, KnormPress
from matplotlib.figure import Figure
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import assert_type

from kvpress_merging import (
    PRESS_REGISTRY,
    AttentionMatchingPress,
    Eviction,
    MergeOnEvictPress,
    MergeReport,
    MergingPress,
    __version__,
)


@dataclass
class MeanPress(MergeOnEvictPress):
    share: float = 0.1

    def fold(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        kept_keys: torch.Tensor,
        kept_values: torch.Tensor,
        eviction: Eviction,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert_type(eviction.survivors, torch.Tensor)
        assert_type(eviction.counts, tuple[tuple[int, int], ...] | None)
        assert_type(eviction.n_evicted, int)
        return kept_keys, kept_values


def prefill(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor) -> None:
    press = MergingPress(KnormPress(0.5), similarity_threshold=0.3, max_merge_per_token=4, record_pairs=True)
    for each in (press, AttentionMatchingPress(KnormPress(0.5), n_queries=64), MeanPress(KnormPress(), share=0.2)):
        with each(model):
            model(input_ids)
        assert_type(each.report, MergeReport)
    assert_type(press.merge_fraction, float)
    assert_type(press.compression_ratio, float)
    assert_type(press.report.to_dict(), dict[int, dict[str, Any]])
    assert_type(press.report.to_frame(), pd.DataFrame)
    assert_type(press.report.merges(0), pd.DataFrame)
    assert_type(press.report.plot(tokenizer, input_ids, 0, head=1), Figure)
    assert_type(press.report.plot_layers(), Figure)
    assert_type(PRESS_REGISTRY["merging_knorm"], BasePress)
    assert_type(Eviction.from_kept(input_ids, k_len=5), Eviction)
    assert_type(__version__, str)


def mistakes() -> None:
    MergingPress()  # type: ignore[call-arg]
    MergingPress(KnormPress(), similarity_threshold="0.5")  # type: ignore[arg-type]
    MergingPress(KnormPress(), threshold=0.5)  # type: ignore[call-arg]
    MergingPress(0.5)  # type: ignore[arg-type]
    AttentionMatchingPress(KnormPress(), n_queries=None)  # type: ignore[arg-type]
    MergeReport().plot(0, 1)  # type: ignore[call-arg, arg-type]
