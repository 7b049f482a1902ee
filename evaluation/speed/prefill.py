# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""How much longer a whole model's prefill takes with merging than with the bare press, in pairs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from kvpress import AdaKVPress, BasePress, KnormPress, SnapKVPress
from transformers import DynamicCache, PreTrainedModel

from evaluation.prefill import synchronize
from kvpress_merging import AttentionMatchingPress, MergingPress

INNER_PRESSES: dict[str, Callable[[float], BasePress]] = {
    "knorm": KnormPress,
    "snapkv": SnapKVPress,
    "adakv_snapkv": lambda compression_ratio: AdaKVPress(SnapKVPress(compression_ratio)),
}
"""Whose prefills are timed, bare and with ours around them. To time one press more, add it here."""


@torch.no_grad()
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
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(model.config.vocab_size, (1, k_len), generator=generator).to(model.device)
    seconds: dict[str, list[float]] = {}
    for i in range(repeats + 1):
        for kind, press in presses.items():
            cache = DynamicCache()
            with press(model) if press is not None else nullcontext():
                synchronize(model.device)
                start = time.perf_counter()
                # The body alone, as kvpress's pipeline prefills: logits of a context are of no use.
                model.base_model(input_ids=input_ids, past_key_values=cache)
                synchronize(model.device)
                if i > 0:
                    seconds.setdefault(kind, []).append(time.perf_counter() - start)
    return {
        "press": name,
        "k_len": k_len,
        "compression_ratio": compression_ratio,
        "seconds": seconds,
        "median_seconds": {kind: statistics.median(values) for kind, values in seconds.items()},
        "overhead": {
            kind: statistics.median(with_ours / alone for with_ours, alone in zip(seconds[kind], seconds["bare"])) - 1
            for kind in seconds
            if kind not in ("full", "bare")
        },
    }
