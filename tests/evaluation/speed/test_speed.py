# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from kvpress import KnormPress
from tiny import tiny_model

from evaluation import models, speed
from evaluation.speed import SpeedArguments, growth, main
from evaluation.speed import subjects as speed_subjects
from evaluation.speed.prefill import measure_prefill
from evaluation.speed.rounds import time_in_rounds
from evaluation.speed.subjects import SUBJECTS, Cell, Inputs, measure_seconds, peak_of_one_call
from kvpress_merging import AttentionMatchingPress, MergingPress
from kvpress_merging.kernels.rows import DEFAULT_TILE_BYTES

TINY = Cell("cpu", k_len=96, num_key_value_heads=2, head_dim=16, compression_ratio=0.5, dtype="bfloat16")
ON_CPU = ["eviction", "kvpress", "ours", "matching", "product", "tiles"]
has_proc = pytest.mark.skipif(
    not speed_subjects.Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc"
)


def result_of(name: str, cell: Cell):
    return SUBJECTS[name](Inputs.of(cell), DEFAULT_TILE_BYTES)()


def test_ours_and_kvpress_are_timed_on_the_same_merge():
    """kvpress returns the whole layer with the survivors' values in place; ours what the press would keep."""
    cell = replace(TINY, dtype="float32")
    (_, theirs), ours = result_of("kvpress", cell), result_of("ours", cell)
    assert ours.values.shape == (1, 2, 48, 16)
    for h in range(2):
        distance = (ours.values[0, h, :, None] - theirs[0, h]).abs().amax(dim=-1).amin(dim=-1)
        assert (distance < 1e-5).all()
    assert ours.is_merged.any()


def test_the_re_fit_is_timed_on_the_layer_that_the_merge_is():
    inputs = Inputs.of(TINY)
    match = result_of("matching", TINY)
    assert match.values.shape == (1, 2, 48, 16)
    assert (match.error_before > 0).all()
    left = match.values[~match.is_fitted]
    assert torch.equal(left, inputs.gather_kept()[1][~match.is_fitted])


def test_eviction_alone_leaves_what_is_kept():
    keys, values = result_of("eviction", TINY)
    inputs = Inputs.of(TINY)
    assert torch.equal(keys[0, 1, 5], inputs.keys[0, 1, inputs.kept[0, 1, 5]])
    assert values.shape == (1, 2, 48, 16)


@pytest.mark.parametrize("name", ["product", "tiles"])
def test_products_are_as_many_as_an_exact_search_needs(monkeypatch, name):
    n_products = []
    monkeypatch.setattr(
        speed_subjects, "multiply", lambda rows, columns: n_products.append(rows.shape[1] * columns.shape[2])
    )
    result_of(name, replace(TINY, k_len=3000))
    assert sum(n_products) == 2 * 1500 * 1500


@pytest.mark.parametrize("k_len", [96, 250])
def test_inputs_depend_on_the_cell_alone(k_len):
    cell = replace(TINY, k_len=k_len, compression_ratio=0.3)
    one, other = Inputs.of(cell), Inputs.of(cell)
    assert torch.equal(one.keys, other.keys)
    assert torch.equal(one.kept, other.kept)
    assert one.kept.shape[-1] == k_len - int(k_len * 0.3)
    assert one.keys.dtype == torch.bfloat16


def test_each_round_runs_every_subject_once(monkeypatch):
    order = []
    for name in ON_CPU:
        subject = lambda inputs, tile_bytes, name=name: lambda: order.append(name)  # noqa: E731
        monkeypatch.setitem(speed_subjects.SUBJECTS, name, subject)
    rounds = measure_seconds(TINY, ON_CPU, 3, DEFAULT_TILE_BYTES)
    assert order == ON_CPU * 4
    assert {name: len(values) for name, values in rounds.seconds.items()} == dict.fromkeys(ON_CPU, 3)


@pytest.mark.parametrize("fails_at", [0, 2])
def test_a_call_that_runs_out_of_memory_is_noted_and_the_others_go_on(fails_at):
    n_calls = Counter()

    def call(name: str) -> None:
        n_calls[name] += 1
        if name == "greedy" and n_calls[name] > fails_at:
            raise torch.OutOfMemoryError

    calls = {name: partial(call, name) for name in ("modest", "greedy", "last")}
    rounds = time_in_rounds(calls, torch.device("cpu"), 3)
    assert rounds.notes == {"greedy": "out of memory"}
    assert {name: len(seconds) for name, seconds in rounds.seconds.items()} == {"modest": 3, "last": 3}
    assert n_calls == {"modest": 4, "greedy": fails_at + 1, "last": 4}
    assert rounds.median_ratio("greedy", "modest") is None
    assert len(rounds.ratios("last", "modest")) == 3


def test_a_mistake_in_a_call_is_no_lack_of_memory():
    def mistake() -> None:
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        time_in_rounds({"call": mistake}, torch.device("cpu"), 1)


KNOWN_BYTES = 64 * 2**20


def measure_a_call_of_known_size() -> int:
    def make(inputs: Inputs, tile_bytes: int):
        return lambda: torch.ones(KNOWN_BYTES // 4 if inputs.cell == TINY else 1)

    with mock.patch.dict(speed_subjects.SUBJECTS, {"ours": make}):
        return peak_of_one_call(TINY, "ours")


@has_proc
def test_extra_memory_is_that_of_the_call():
    """In a process that runs nothing else, as it is meant: what other tests have freed would count as well."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kvpress"])
    with context.Pool(1) as pool:
        measured = pool.apply(measure_a_call_of_known_size)
    assert measured == pytest.approx(KNOWN_BYTES, rel=0.1)


@has_proc
def test_memory_of_a_subject_is_measured_in_a_process_of_its_own():
    """kvpress holds the whole matrix of cosines, of 67 MB here."""
    cell = replace(TINY, k_len=8192, num_key_value_heads=1, dtype="float32")
    n_bytes = speed_subjects.measure_extra_bytes(cell, "kvpress", DEFAULT_TILE_BYTES, threads=1)
    assert n_bytes > 4 * 4096 * 4096


def test_growth_is_the_slope_over_all_contexts():
    fields = {"device": "cpu", "num_key_value_heads": 8, "head_dim": 128, "compression_ratio": 0.5, "dtype": "float32"}
    rows = [
        {**fields, "k_len": k_len, "subject": name, "seconds": [k_len**power] * 2, "median_seconds": k_len**power}
        for name, power in (("ours", 2), ("eviction", 1))
        for k_len in (400, 100, 200)
    ]
    by_subject = {row["subject"]: row for row in growth(rows)}
    assert set(by_subject) == {"ours", "eviction"}
    assert by_subject["ours"]["times"] == 16
    assert by_subject["ours"]["exponent"] == pytest.approx(2)
    assert by_subject["eviction"]["exponent"] == pytest.approx(1)
    assert (by_subject["ours"]["from"], by_subject["ours"]["to"]) == (100, 400)
    assert growth(rows[:1]) == []


def test_figures_are_printed_written_and_drawn(tmp_path, monkeypatch, capsys):
    n_bytes = {"eviction": 500_000, "kvpress": 4_000_000, "ours": 1_000_000, "product": 0, "tiles": None}
    n_bytes["matching"] = 2_000_000
    monkeypatch.setattr(speed, "measure_extra_bytes", lambda cell, name, *others: n_bytes[name])
    folder = tmp_path / "deeper"
    grid = ["--k_len", "96", "192", "--num_key_value_heads", "1", "2", "--dtype", "float32", "--head_dim", "16"]
    main([*grid, "--repeats", "2", "--output_dir", str(folder)])

    figures = json.loads((folder / "speed.json").read_text())
    layers = figures["layers"]
    assert [(row["num_key_value_heads"], row["k_len"], row["subject"]) for row in layers] == [
        (heads, k_len, name) for heads in (1, 2) for k_len in (96, 192) for name in ON_CPU
    ]
    for row in layers:
        assert len(row["seconds"]) == 2
        assert all(seconds > 0 for seconds in row["seconds"])
    by_name = {row["subject"]: row for row in layers}
    assert by_name["kvpress"]["time_to_kvpress"] == 1
    assert by_name["ours"]["memory_to_kvpress"] == 0.25
    assert by_name["product"]["share_of_product_rate"] == 1
    assert by_name["eviction"]["share_of_product_rate"] is None
    operations = by_name["ours"]["products_per_second"] * by_name["ours"]["median_seconds"]
    assert operations == pytest.approx(2 * 2 * 96 * 96 * 16)
    assert {row["subject"] for row in figures["growth"]} == set(ON_CPU)

    output = capsys.readouterr().out
    assert "float32, 2 heads, ratio 0.5" in output
    assert "0.250" in output
    assert "not measured" in output
    assert (folder / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_whole_prefills_are_printed_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "load_model", lambda name: (tiny_model("llama"), None))
    monkeypatch.setattr(speed, "measure_extra_bytes", lambda *arguments: None)
    layer = ["--k_len", "64", "--num_key_value_heads", "1", "--head_dim", "16"]
    main([*layer, "--prefill", "96", "128", "--repeats", "2", "--output_dir", str(tmp_path)])
    prefills = json.loads((tmp_path / "speed.json").read_text())["prefills"]
    assert [(row["k_len"], row["press"]) for row in prefills] == [
        (k_len, press) for k_len in (96, 128) for press in ("knorm", "snapkv", "adakv_snapkv", "expected_attention")
    ]
    for row in prefills:
        names = ["full", "bare", "merged", "matched"]
        assert {name: len(seconds) for name, seconds in row["seconds"].items()} == dict.fromkeys(names, 2)
        assert list(row["overhead"]) == ["merged", "matched"]
        assert min(row["overhead"].values()) > -1
    printed = capsys.readouterr().out
    assert "over bare" in printed
    assert "matched" in printed


def test_a_model_that_is_not_there_is_one_line_before_any_layer_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(speed, "measure_cell", lambda *_: pytest.fail("a layer was timed"))
    with pytest.raises(SystemExit) as exit_info:
        main(["--k_len", "64", "--prefill", "96", "--model", "./nowhere"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == (
        "python -m evaluation speed: There is no folder './nowhere' to load a model from.\n"
    )


def test_prefills_are_timed_with_the_presses_at_work(monkeypatch):
    calls = Counter()

    def count(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments, **named):
            calls[name] += 1
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, counted)

    count(KnormPress, "score")
    count(MergingPress, "fold")
    count(AttentionMatchingPress, "observe")
    model = tiny_model("llama")
    measure_prefill(model, 32, 0.5, repeats=1)
    n_layers = model.config.num_hidden_layers
    assert calls == {"score": 3 * 2 * n_layers, "fold": 2 * n_layers, "observe": 2 * n_layers}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"k_len": [96, 0]}, "k_len must be at least 1, got 0"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"threads": -1}, "threads must be at least 0, got -1"),
        ({"dtype": ["int8"]}, "dtype must be among float32, float16, bfloat16, got 'int8'"),
        ({"subjects": ["theirs"]}, "subjects must be among eviction, kvpress, ours, .*, got 'theirs'"),
        ({"compression_ratio": [0.5, 1.0]}, "compression_ratio must leave and evict some of 8192 tokens, got 1.0"),
        ({"prefill": [64]}, "prefill must be more than SnapKV's window of 64 tokens, got 64"),
        ({"k_len": [1]}, "compression_ratio must leave and evict some of 1 tokens, got 0.5"),
    ],
)
def test_flags_out_of_range_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        SpeedArguments(**flags)
