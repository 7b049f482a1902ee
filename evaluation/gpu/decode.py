# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Whether decoding stays as fast: tokens a second after compression, with eviction alone and with ours."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from evaluation.gpu.bench import Bench, why_missing
from evaluation.gpu.cost import KINDS, RATIO
from evaluation.prefill import Prefilled, masks_of
from evaluation.speed.prefill import INNER_PRESSES, prefills
from evaluation.speed.rounds import seconds_of

PRESS = "knorm"
_KINDS = ("bare", "merging", "matching")


def measure_decoding(bench: Bench, k_len: int) -> Iterator[dict[str, Any]]:
    """A row for eviction and each of ours: ``tokens_per_second``, and how many times as fast as the bare press."""
    n_tokens, model = bench.sizes.n_tokens, bench.model
    rows = {kind: {"k_len": k_len, "press": PRESS, "kind": kind, "n_tokens": n_tokens} for kind in _KINDS}
    seconds = None
    if bench.rate is not None:
        n_layers = len(model.model.layers)
        seconds = len(rows) * bench.prefill_operations(n_layers, k_len) / bench.rate
    why_not = bench.too_long(seconds)
    if why_not is None:
        presses = {kind: KINDS[kind](INNER_PRESSES[PRESS](RATIO)) for kind in rows}
        prefilled = {kind: call() for kind, call in prefills(model, k_len, presses).items()}
        two_tokens = partial(decode, model, prefilled["bare"], 2)
        two_tokens()  # the first time tells nothing of the others
        one_token = seconds_of(two_tokens, bench.device) / 2
        why_not = bench.too_long(len(rows) * (1 + bench.sizes.repeats) * n_tokens * one_token)
    if why_not is not None:
        yield from ({**row, "left_out": why_not} for row in rows.values())
        return
    rounds = bench.time({kind: partial(decode, model, of_kind, n_tokens) for kind, of_kind in prefilled.items()})
    for kind, row in rows.items():
        if kind in rounds.notes:
            yield {**row, **why_missing(rounds.notes[kind])}
            continue
        row |= {"seconds": rounds.seconds[kind], "cache_length": prefilled[kind].cache.get_seq_length()}
        row["tokens_per_second"] = n_tokens / statistics.median(rounds.seconds[kind])
        ratios = rounds.ratios("bare", kind)
        if kind != "bare" and ratios:
            row |= {"to_bare": statistics.median(ratios), "to_bare_range": [min(ratios), max(ratios)]}
        yield row


@torch.no_grad()
def decode(model: PreTrainedModel, prefilled: Prefilled, n_tokens: int) -> None:
    """Decode greedily from a compressed cache, which is as before afterwards. Nothing is read back on the way."""
    length, device = prefilled.cache.get_seq_length(), model.device
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    positions = torch.arange(prefilled.start, prefilled.start + n_tokens, device=device)[:, None, None]
    with masks_of(model, prefilled):
        for position_ids in positions:
            logits = model(token, past_key_values=prefilled.cache, position_ids=position_ids, logits_to_keep=1).logits
            token = logits[:, -1:].argmax(dim=-1)
    prefilled.cache.crop(length)
