# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Whether anything waits for the device: what a prefill reads back from it, line by line."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kvpress import BasePress
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, PreTrainedModel

from evaluation.gpu.bench import Bench, first_layers
from evaluation.speed.operations import MASK_INDEX, OperationCounter
from evaluation.speed.prefill import INNER_PRESSES
from evaluation.speed.rounds import failure
from kvpress_merging import AttentionMatchingPress, MergingPress

ALLOWED = {"knorm": 0, "adakv_snapkv": 1}
"""Readings a layer that ours may add to a press's own: of a ragged eviction, the counts of its heads once."""

N_LAYERS = 2

_READING_METHODS = {"tolist", "numpy", "cpu"}
_READING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", MASK_INDEX, *_READING_METHODS}


def check_waits(bench: Bench) -> Iterator[dict[str, Any]]:
    """A row for each press and rule: readings a layer over the bare press's, and whether they are as few as allowed."""
    generator = torch.Generator().manual_seed(0)
    model, k_len = bench.model, bench.sizes.k_lens[0]
    input_ids = torch.randint(model.config.vocab_size, (1, k_len), generator=generator).to(bench.device)
    with first_layers(model, N_LAYERS):
        for name, allowed in ALLOWED.items():
            bare = INNER_PRESSES[name](0.5)
            presses: Mapping[str, BasePress] = {
                "bare": bare,
                "merging": MergingPress(bare),
                "matching": AttentionMatchingPress(bare),
            }
            of_bare: Counter[str] = Counter()
            for kind, press in presses.items():
                row: dict[str, Any] = {"check": "waits", "press": name, "kind": kind}
                try:
                    for _ in range(2):  # what is made once is made before
                        _prefill(model, input_ids, press)
                    with readings(bench.device) as by_line:
                        _prefill(model, input_ids, press)
                except Exception as error:
                    yield {**row, "failed": failure(error)}
                    continue
                if kind == "bare":
                    of_bare = by_line
                    yield {**row, "readings": by_line.total() / N_LAYERS, "by_line": dict(by_line)}
                    continue
                by_line.subtract(of_bare)
                n_readings = by_line.total() / N_LAYERS
                row |= {"readings": n_readings, "allowed": allowed, "right": n_readings <= allowed}
                if allowed == 0 and bench.device.type == "cuda" and not of_bare.total():
                    row |= _forbidden(partial(_prefill, model, input_ids, press))
                yield {**row, "by_line": {line: n for line, n in by_line.items() if n}}


@torch.no_grad()
def _prefill(model: PreTrainedModel, input_ids: torch.Tensor, press: BasePress) -> None:
    """
    Read a context with a press.

    kvpress's own hook reads ``cache_position`` in each layer, so that is given on the CPU, where it need not wait.
    """
    positions = torch.arange(input_ids.shape[1])
    position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    with press(model):
        model.model(
            input_ids=input_ids, past_key_values=DynamicCache(), position_ids=position_ids, cache_position=positions
        )


def _forbidden(call: Callable[[], None]) -> dict[str, Any]:
    """Run a call while waiting for a GPU is an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return {"right": False, "failed": failure(error)}
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return {}


@contextlib.contextmanager
def readings(device: torch.device) -> Iterator[Counter[str]]:
    """
    Count what is read back from a device within, by the line of code that reads.

    CUDA itself tells. A CPU has nothing to wait for: there what would wait on a GPU is counted, the operations whose
    result or shape depends on a tensor's content, and the methods that hand its content to Python.
    """
    by_line: Counter[str] = Counter()
    if device.type == "cuda":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield by_line
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for warning in caught:
            if "synchronizing CUDA operation" in str(warning.message):
                by_line[f"{Path(warning.filename).name}:{warning.lineno}"] += 1
        return
    operations = OperationCounter()
    with _MethodCounter(operations), operations:
        yield by_line
    for (line, name), n in operations.by_line.items():
        if name in _READING:
            by_line[f"{line} {name}"] += n


class _MethodCounter(TorchFunctionMode):
    """Has a counter of operations count methods too that copy a tensor's content to Python without any operation."""

    def __init__(self, operations: OperationCounter) -> None:
        super().__init__()
        self.operations = operations

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READING_METHODS:
            self.operations.by_line[self.operations.line(), name] += 1
        return func(*args, **(kwargs or {}))
