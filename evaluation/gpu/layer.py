# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Where the time goes: the parts of one layer's merge beside attention, the bare matrix product and the peak."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from evaluation.gpu.bench import Bench, why_missing
from evaluation.gpu.cost import RATIO
from evaluation.speed.rounds import Call, seconds_of
from evaluation.speed.subjects import QUERY_HEADS, Cell, Inputs, attention, bare_products, matching, merging
from kvpress_merging.kernels.nearest import nearest_survivors


def _search(inputs: Inputs, kernel: str) -> Call:
    eviction = inputs.eviction()
    is_finite = torch.ones(inputs.keys.shape[:3], dtype=torch.bool, device=inputs.keys.device)
    return lambda: nearest_survivors(inputs.keys, is_finite, eviction, kernel=kernel)


SUBJECTS: dict[str, Callable[[Inputs], Call]] = {
    "attention": attention,
    "product": bare_products,
    "search, torch": partial(_search, kernel="torch"),
    "search, triton": partial(_search, kernel="triton"),
    "merging, torch": merging,
    "matching": matching,
}
"""What is timed: attention as a prefill has it, the bare product of an exact search, and ours."""


def measure_layer(bench: Bench, k_len: int) -> Iterator[dict[str, Any]]:
    """
    A row for each of :data:`SUBJECTS`, on a layer of the model's heads in bfloat16.

    ``operations_per_second``, multiplications and additions, of those that are mostly products, and its
    ``share_of_peak``, that of the product of two large square matrices, which is timed along; ``to_attention``, the
    median ratio; for merging, ``without_search``, the seconds that are left of a round's merge after its search.
    """
    shape, device = bench.sizes.shape, bench.device
    cell = Cell(str(device), k_len, shape["num_key_value_heads"], shape["head_dim"], RATIO, "bfloat16")
    per_head = 2 * cell.num_key_value_heads * cell.head_dim
    operations = dict.fromkeys(("product", "search, torch", "search, triton"), per_head * cell.n_kept * cell.n_evicted)
    operations["attention"] = per_head * QUERY_HEADS * k_len**2
    seconds = None if bench.rate is None else (1 + bench.sizes.repeats) * 3 * sum(operations.values()) / bench.rate
    why_not = bench.too_long(seconds)
    if why_not is not None:
        yield from ({"k_len": k_len, "subject": name, "left_out": why_not} for name in SUBJECTS)
        return
    inputs = Inputs.of(cell)
    calls = {name: make(inputs) for name, make in SUBJECTS.items()}
    rounds = bench.time(calls)
    peak = peak_rate(device, bench.sizes.side)
    for name in SUBJECTS:
        row: dict[str, Any] = {"k_len": k_len, "subject": name}
        if name in rounds.notes:
            yield {**row, **why_missing(rounds.notes[name])}
            continue
        median = statistics.median(rounds.seconds[name])
        row |= {"seconds": rounds.seconds[name], "median_seconds": median}
        row |= {"extra_bytes": rounds.extra_bytes.get(name), "to_attention": rounds.median_ratio(name, "attention")}
        if name in operations:
            row["operations_per_second"] = operations[name] / median
            row["share_of_peak"] = operations[name] / median / peak
        if name == "search, triton":
            row["to_torch"] = rounds.median_ratio(name, "search, torch")
        if name.startswith("merging"):
            pairs = zip(rounds.seconds[name], rounds.seconds.get("search, torch", ()))
            row["without_search"] = statistics.median([whole - search for whole, search in pairs] or [median])
        yield row


def peak_rate(device: torch.device, side: int) -> float:
    """Operations a second, multiplications and additions, of the product of two square matrices in bfloat16."""
    left, right = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    product = partial(torch.mm, left, right)
    for _ in range(3):
        product()
    return 2 * side**3 / min(seconds_of(product, device) for _ in range(5))
