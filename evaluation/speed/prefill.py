# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""How much longer a whole model's prefill takes with merging than with the bare press, in pairs."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch
from kvpress import BasePress, KnormPress
from transformers import DynamicCache, PreTrainedModel

from evaluation.benchmarks.fidelity.compressed_cache import synchronize
from kvpress_merging import AttentionMatchingPress, MergingPress


def presses(compression_ratio: float) -> dict[str, BasePress | None]:
    """What is timed, by name. To time one press more, add it here."""
    bare = KnormPress(compression_ratio)
    return {"full": None, "bare": bare, "merged": MergingPress(bare), "matched": AttentionMatchingPress(bare)}


@torch.no_grad()
def measure_prefill(model: PreTrainedModel, k_len: int, compression_ratio: float, repeats: int) -> dict[str, Any]:
    """
    Time the prefill of ``k_len`` random tokens with each of ``presses``, in so many rounds after one to warm up.
    ``overhead`` is that of each of ours over bare: the median over rounds of the ratio, less 1.
    """
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(model.config.vocab_size, (1, k_len), generator=generator).to(model.device)
    seconds: dict[str, list[float]] = {}
    for i in range(repeats + 1):
        for name, press in presses(compression_ratio).items():
            cache = DynamicCache()
            with press(model) if press is not None else nullcontext():
                synchronize(model.device)
                start = time.perf_counter()
                # The body alone, as kvpress's pipeline prefills: logits of a context are of no use.
                model.base_model(input_ids=input_ids, past_key_values=cache)
                synchronize(model.device)
                if i > 0:
                    seconds.setdefault(name, []).append(time.perf_counter() - start)
    return {
        "k_len": k_len,
        "compression_ratio": compression_ratio,
        "seconds": seconds,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "overhead": {
            name: statistics.median(ours / bare for ours, bare in zip(seconds[name], seconds["bare"])) - 1
            for name in seconds
            if name not in ("full", "bare")
        },
    }
