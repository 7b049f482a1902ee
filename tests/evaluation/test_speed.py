# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import multiprocessing

import pytest
import torch

from evaluation import speed
from evaluation.speed import SUBJECTS, SpeedArguments, main, make_subject

TINY = ["--k_len", "96", "--num_key_value_heads", "2", "--head_dim", "16"]


def tiny(dtype: str = "bfloat16") -> SpeedArguments:
    return SpeedArguments(k_len=96, num_key_value_heads=2, head_dim=16, dtype=dtype)


def test_ours_and_kvpress_are_timed_on_the_same_merge():
    """kvpress returns the whole layer with the survivors' values in place; ours what the press would keep."""
    (_, theirs), ours = make_subject("kvpress", tiny("float32"))(), make_subject("ours", tiny("float32"))()
    assert ours.values.shape == (1, 2, 48, 16)
    for h in range(2):
        distance = (ours.values[0, h, :, None] - theirs[0, h]).abs().amax(dim=-1).amin(dim=-1)
        assert (distance < 1e-5).all()
    assert ours.is_merged.any()


KNOWN_BYTES = 64 * 2**20


def measure_a_call_of_known_size() -> int:
    def subject(name: str, arguments: SpeedArguments):
        return lambda: torch.ones(KNOWN_BYTES // 4 if arguments.k_len == tiny().k_len else 1)

    speed.make_subject = subject
    return speed._peak_of_one_call("ours", tiny())


@pytest.mark.skipif(not speed.Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_extra_memory_is_that_of_the_call():
    """In a process that runs nothing else, as it is meant: what other tests have freed would count as well."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        measured = pool.apply(measure_a_call_of_known_size)
    assert measured == pytest.approx(KNOWN_BYTES, rel=0.1)


def test_figures_are_printed_and_written(tmp_path, monkeypatch, capsys):
    n_bytes = {"kvpress": 4_000_000, "ours": 1_000_000, "product": 0, "tiles": 0}
    monkeypatch.setattr(speed, "measure_extra_bytes", lambda arguments: n_bytes)
    output = tmp_path / "deeper" / "speed.json"
    main([*TINY, "--output", str(output)])
    figures = json.loads(output.read_text())
    assert set(figures["subjects"]) == set(SUBJECTS)
    for row in figures["subjects"].values():
        assert len(row["seconds"]) == figures["arguments"]["repeats"] == 5
        assert all(seconds > 0 for seconds in row["seconds"])
    assert figures["subjects"]["kvpress"]["time_to_kvpress"] == 1
    assert figures["subjects"]["ours"]["memory_to_kvpress"] == 0.25
    assert figures["subjects"]["product"]["share_of_product_rate"] == 1
    assert "0.25" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("k_len", 0, "k_len must be at least 1, got 0"),
        ("threads", -1, "threads must be at least 0, got -1"),
        ("dtype", "int8", "dtype must be one of float32, float16, bfloat16, got 'int8'"),
        ("compression_ratio", 1.0, "compression_ratio must leave and evict some tokens, got 1.0"),
    ],
)
def test_flags_out_of_range_are_named(flag, value, message):
    with pytest.raises(ValueError, match=message):
        SpeedArguments(**{flag: value})
