# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""How much longer a whole model's prefill takes with merging than with the bare press, in pairs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from kvpress import AdaKVPress, BasePress, ExpectedAttentionPress, KnormPress, SnapKVPress
from transformers import PreTrainedModel

from evaluation.prefill import prefill
from evaluation.speed.rounds import Call, time_in_rounds
from kvpress_merging import AttentionMatchingPress, MergingPress

INNER_PRESSES: dict[str, Callable[[float], BasePress]] = {
    "knorm": KnormPress,
    "snapkv": SnapKVPress,
    "adakv_snapkv": lambda compression_ratio: AdaKVPress(SnapKVPress(compression_ratio)),
    "expected_attention": ExpectedAttentionPress,
}
"""Whose prefills are timed, bare and with ours around them. To time one press more, add it here."""


def measure_prefill(
    model: PreTrainedModel, k_len: int, compression_ratio: float, repeats: int, name: str = "knorm"
) -> dict[str, Any]:
    """
    Time the prefill of ``k_len`` random tokens: the full cache, a press of :data:`INNER_PRESSES`, and ours around it.

    In so many rounds after one to warm up. ``overhead`` is that of each of ours over bare: the median over rounds of
    the ratio, less 1.
    """
    bare = INNER_PRESSES[name](compression_ratio)
    presses = {"full": None, "bare": bare, "merged": MergingPress(bare), "matched": AttentionMatchingPress(bare)}
    rounds = time_in_rounds(prefills(model, k_len, presses), model.device, repeats)
    return {
        "press": name,
        "k_len": k_len,
        "compression_ratio": compression_ratio,
        "seconds": rounds.seconds,
        "median_seconds": {kind: statistics.median(values) for kind, values in rounds.seconds.items()},
        "overhead": {
            kind: statistics.median(rounds.ratios(kind, "bare")) - 1 for kind in presses if kind not in ("full", "bare")
        },
    }


def prefills(model: PreTrainedModel, k_len: int, presses: Mapping[str, BasePress | None]) -> dict[str, Call]:
    """Calls that prefill the same random tokens, each with one of the presses: that of no press is the full cache."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(model.config.vocab_size, (1, k_len), generator=generator).to(model.device)
    return {kind: partial(prefill, model, input_ids, press) for kind, press in presses.items()}
