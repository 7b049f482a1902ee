# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What ``python -m evaluation gpu`` checks: a kernel that is wrong, or a press that reads from the device, is seen."""

from __future__ import annotations

import re
import time
import warnings
from dataclasses import replace

import pytest
import torch
from kvpress import KnormPress

from evaluation.gpu import right, waits
from evaluation.gpu.bench import QUICK, Bench
from evaluation.gpu.show import has_failed
from kvpress_merging import MergingPress

CPU = torch.device("cpu")


@pytest.fixture
def few_cells(monkeypatch):
    monkeypatch.setattr(right, "HEAD_DIMS", (33,))
    monkeypatch.setattr(right, "DTYPES", {"float32": torch.float32})
    return Bench(CPU, QUICK, time.monotonic() + 600)


def spoiled(function, spoil):
    """The same function, its result spoiled."""

    def spoiled(*args, **kwargs):
        return spoil(function(*args, **kwargs))

    return spoiled


def move_one(found):
    similarity, target = found
    return similarity, (target + 1) % (target.max() + 1)


@pytest.mark.parametrize(
    ("name", "spoil", "check"),
    [
        ("nearest_survivors", lambda found: (found[0] + 1e-5, found[1]), "search"),
        ("nearest_survivors", move_one, "search"),
        ("cosine_blend", lambda blend: replace(blend, values=blend.values * (1 + 1e-4)), "merging"),
        ("cosine_blend", lambda blend: replace(blend, keys=blend.keys.nan_to_num(0)), "merging"),
        ("cosine_blend", lambda blend: replace(blend, values=blend.values * (1 + 1e-6 * torch.rand(()))), "merging"),
        ("attention_match", lambda match: replace(match, values=match.values * 1.01), "matching"),
        ("attention_match", lambda match: replace(match, is_fitted=~match.is_fitted), "matching"),
    ],
)
def test_a_kernel_that_is_wrong_is_seen(few_cells, monkeypatch, name, spoil, check):
    monkeypatch.setattr(right, name, spoiled(getattr(right, name), spoil))
    rows = list(right.check_kernels(few_cells, ("torch", "match")))
    assert len(rows) == 6
    for row in rows:
        if row["check"] == check:
            assert not row.get("right"), row
    assert has_failed({"rows": rows})


def test_a_kernel_that_is_right_is_right_in_the_same_cells(few_cells):
    rows = list(right.check_kernels(few_cells, ("torch", "match")))
    assert all(row["right"] for row in rows)


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda keys: keys.sum().item(), "_local_scalar_dense"),
        (lambda keys: bool((keys > 0).any()), "_local_scalar_dense"),
        (lambda keys: keys.sum().tolist(), "tolist"),
        (lambda keys: keys[keys > 0], "index by a mask"),
        (lambda keys: (keys > 0).nonzero(), "nonzero"),
        (lambda keys: keys.cpu(), "cpu"),
    ],
)
def test_a_press_that_reads_from_the_device_is_seen(monkeypatch, read, name):
    fold = MergingPress.fold

    def fold_and_read(self, module, hidden_states, keys, *args):
        read(keys)
        return fold(self, module, hidden_states, keys, *args)

    monkeypatch.setattr(MergingPress, "fold", fold_and_read)
    bench = Bench(CPU, QUICK, time.monotonic() + 600)
    rows = {(row["press"], row["kind"]): row for row in waits.check_waits(bench)}
    row = rows["knorm", "merging"]
    assert row["readings"] == 1
    assert not row["right"]
    assert any(line.endswith(name) for line in row["by_line"])
    assert rows["knorm", "matching"]["right"]


def test_a_gpu_would_forbid_to_wait_in_a_prefill_that_reads_nothing_itself(monkeypatch):
    """kvpress's own hook reads where the tokens stand; it is given that on the CPU."""
    seen = []
    monkeypatch.setattr(
        KnormPress, "score", lambda self, *args: seen.append(args[-1]["cache_position"]) or args[2].norm(dim=-1)
    )
    bench = Bench(CPU, QUICK, time.monotonic() + 600)
    waits._prefill(bench.model, torch.zeros(1, 80, dtype=torch.int64), KnormPress(0.5))
    assert [positions.device.type for positions in seen] == ["cpu", "cpu"]


def test_where_a_gpu_waits_is_told_by_its_warnings(monkeypatch):
    """The part that only a GPU runs, with warnings as PyTorch words them."""
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with waits.readings(torch.device("cuda")) as by_line:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    ((line, n),) = by_line.items()
    assert re.fullmatch(r"test_gpu_checks\.py:\d+", line)
    assert n == 3
    assert modes == ["warn", 0]

    def wait() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    assert waits._forbidden(lambda: None) == {}
    assert not waits._forbidden(wait)["right"]
    assert modes[2:] == ["error", 0] * 2
