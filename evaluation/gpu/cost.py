# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What a whole prefill costs: with the bare press, ours and kvpress's own merge around it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import kvpress
import torch
from kvpress import BasePress
from torch.profiler import ProfilerActivity, profile

from evaluation.gpu.bench import Bench, first_layers, why_missing
from evaluation.speed.operations import OperationCounter
from evaluation.speed.prefill import INNER_PRESSES, prefills
from evaluation.speed.rounds import Call, Rounds, failure
from kvpress_merging import AttentionMatchingPress, MergingPress

KINDS: dict[str, Callable[[Any], BasePress]] = {
    "bare": lambda press: press,
    "merging": MergingPress,
    "matching": AttentionMatchingPress,
    "kvpress": kvpress.MergingPress,
}
"""What is put around a press, by what the rows call it."""

RATIO = 0.5
_COUNTED_LAYERS = 2


def measure_cost(bench: Bench, k_len: int) -> Iterator[dict[str, Any]]:
    """
    A row for each press and each of :data:`KINDS`.

    ``seconds`` round by round and their median, ``over_bare`` the median over rounds of the ratio to the bare press,
    less 1, with the smallest and the largest; ``bytes_over_bare``, of the peak, on a GPU; ``launches``, over bare, what
    is asked of the device for each layer; ``n_layers`` and ``attention`` of the model.
    """
    for name in INNER_PRESSES:
        rows = {kind: {"k_len": k_len, "press": name, "kind": kind, "compression_ratio": RATIO} for kind in KINDS}
        n_layers, why_not = _layers(bench, k_len)
        if why_not is not None:
            yield from ({**row, "left_out": why_not} for row in rows.values())
            continue
        attention = bench.model.config._attn_implementation
        with first_layers(bench.model, n_layers):
            presses, refused = _presses(name)
            calls = prefills(bench.model, k_len, presses)
            rounds = bench.time(calls)
        if rounds.seconds.get("bare"):
            bench.rate = bench.prefill_operations(n_layers, k_len) / min(rounds.seconds["bare"])
        launches = _launches(bench, {kind: call for kind, call in calls.items() if kind in rounds.seconds})
        for kind, row in rows.items():
            if kind in refused:
                yield {**row, "left_out": refused[kind]}
            else:
                yield {
                    **row,
                    "n_layers": n_layers,
                    "attention": attention,
                    **_figures(rounds, kind),
                    **_over_bare(launches, kind),
                }


def _presses(name: str) -> tuple[dict[str, BasePress], dict[str, str]]:
    """The press bare and with each of ours around it, and why one cannot be put around it."""
    presses, refused = {}, {}
    for kind, around in KINDS.items():
        try:
            presses[kind] = around(INNER_PRESSES[name](RATIO))
        except AssertionError as error:  # of kvpress's own
            refused[kind] = str(error)
    return presses, refused


def _layers(bench: Bench, k_len: int) -> tuple[int, str | None]:
    """How many of the model's layers fit memory and time, all or a quarter, or else why none of the two does."""
    n_all, free = len(bench.model.model.layers), bench.free_bytes()
    why_not = None
    for n_layers in dict.fromkeys((n_all, max(1, n_all // 4))):
        n_bytes = bench.prefill_bytes(n_layers, k_len)
        if free is not None and n_bytes > free:
            why_not = (
                f"it would have taken some {n_bytes / 1e9:.0f} GB beside the weights, and {free / 1e9:.0f} are free"
            )
            continue
        seconds = None
        if bench.rate is not None:
            n_prefills = len(KINDS) * (1 + bench.sizes.repeats)
            seconds = n_prefills * bench.prefill_operations(n_layers, k_len) / bench.rate
        why_not = bench.too_long(seconds)
        if why_not is None:
            return n_layers, None
    return 0, why_not


def _figures(rounds: Rounds, kind: str) -> dict[str, Any]:
    if kind in rounds.notes:
        return why_missing(rounds.notes[kind])
    figures: dict[str, Any] = {
        "seconds": rounds.seconds[kind],
        "median_seconds": statistics.median(rounds.seconds[kind]),
    }
    ratios = rounds.ratios(kind, "bare")
    if kind != "bare" and ratios:
        figures["over_bare"] = statistics.median(ratios) - 1
        figures["over_bare_range"] = [min(ratios) - 1, max(ratios) - 1]
        if "bare" in rounds.extra_bytes:
            figures["bytes_over_bare"] = rounds.extra_bytes[kind] - rounds.extra_bytes["bare"]
    return figures


def _launches(bench: Bench, calls: dict[str, Call]) -> dict[str, float | str]:
    """What each prefill asks of the device for each layer, counted over two layers, or how counting failed."""
    launches: dict[str, float | str] = {}
    with first_layers(bench.model, _COUNTED_LAYERS):
        for kind, call in calls.items():
            try:
                launches[kind] = count_launches(call, bench.device) / _COUNTED_LAYERS
            except Exception as error:
                launches[kind] = failure(error)
    return launches


def _over_bare(launches: dict[str, float | str], kind: str) -> dict[str, Any]:
    ours, bare = launches.get(kind), launches.get("bare")
    if kind == "bare" or ours is None or bare is None:
        return {}
    if isinstance(ours, str) or isinstance(bare, str):
        return {"launches": None, "launches_note": ours if isinstance(ours, str) else bare}
    return {"launches": ours - bare}


def count_launches(call: Call, device: torch.device) -> int:
    """Kernels that a call launches on a GPU, copies and fills among them; on a CPU, PyTorch's operations but views."""
    if device.type != "cuda":
        with OperationCounter() as counter:
            call()
        return counter.n_operations
    call()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    n_launches = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events() or ())
    if n_launches == 0:
        raise RuntimeError("the profiler saw no kernels")
    return n_launches
