# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Cells that share prefills: the same results as cells that are measured one by one, and nothing lost between."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kvpress import attention_patch
from test_sweep import SECONDS, appeared, results, sweep, write_grid
from tiny import tiny_checkpoint

from evaluation import evaluate
from evaluation.answers import Questions
from evaluation.evaluate_registry import PRESS_REGISTRY
from evaluation.prefill import prefill
from evaluation.report.runs import read_results
from evaluation.sweep import here, shared_prefill, together
from evaluation.sweep import unfinished as unfinished_module
from evaluation.sweep.grid import group_cells, read_grid
from evaluation.text import built_in_text
from kvpress_merging.registry import PREFILL_PRESSES

pytestmark = pytest.mark.usefixtures("one_thread")

# Presses that load something from a hub, and one that needs the question.
NOT_HERE = ("RestoreKV", "duo_attention", "fastkvzip", "kvzap", "qfilter", "lukv", "finch")
BARE = [name for name in PREFILL_PRESSES if not name.startswith(NOT_HERE)]
ALONE = ("kvzip", "kvgrad", "kvcompose")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_checkpoint(folder)
    return folder


@pytest.fixture
def fidelity(tmp_path) -> dict:
    text = tmp_path / "text.txt"
    text.write_text(built_in_text()[:3000])
    return {"dataset": "fidelity", "text_file": str(text), "continuation_length": 9}


@pytest.fixture
def prefills(monkeypatch) -> list[int]:
    """How many presses share each shared prefill."""
    counts: list[int] = []

    def count(model, input_ids, presses):
        counts.append(len(presses))
        return shared_prefill.prefill_many(model, input_ids, presses)

    monkeypatch.setattr(together, "prefill_many", count)
    return counts


# One that draws, one that masks, one that prunes channels, one that prefills in eager attention, two that cannot answer
# and one of those that are alone.
OF_EACH_KIND = ["random", "adakv_snapkv", "snap_think", "observed_attention", "pyramidkv", "kvcompose", "kvzip"]


@pytest.mark.parametrize(
    "bare", [OF_EACH_KIND, pytest.param(BARE, marks=pytest.mark.long)], ids=["one of each kind", "all"]
)
def test_every_press_has_the_results_that_it_has_alone_bare_merging_and_matching(
    bare, model, tmp_path, fidelity, prefills, monkeypatch
):
    # A random model has queries that no key hides from, where kvpress gives up; any key will do here.
    monkeypatch.setattr(attention_patch, "search_hyperplane", lambda queries: -queries.mean(dim=1))
    presses = ["no_press", *(prefix + name for name in bare for prefix in ("", "merging_", "matching_"))]
    presses = [name for name in presses if name in PRESS_REGISTRY]
    blocks = [{"press_name": presses, "n_samples": 2}, {"press_name": presses, **fidelity}]
    settings = {"key_channel_compression_ratio": 0.25, "cells": blocks}
    grid = write_grid(tmp_path, model, **settings)
    assert sweep(grid, tmp_path / "shared") == sweep(grid, tmp_path / "alone", "--share_prefill", "False")
    shared, alone = results(tmp_path / "shared"), results(tmp_path / "alone")
    assert shared == alone
    errors = {error["cell"]: error["error"] for error in read_results(tmp_path / "shared").errors}
    assert errors == {error["cell"]: error["error"] for error in read_results(tmp_path / "alone").errors}
    # kvpress cannot answer from layers of different lengths.
    assert all("pyramidkv" in cell or "kvcompose" in cell for cell in errors)
    assert not any(cell.startswith("fidelity") for cell in errors)
    assert len(shared) + len(errors) == 2 * len(presses)
    n_alone = sum(name.removeprefix("merging_").removeprefix("matching_").startswith(ALONE) for name in presses)
    # The observed attentions share among themselves, in eager attention.
    n_eager = sum("observed_attention" in name for name in presses)
    n_sharing = len(presses) - n_alone - n_eager
    assert set(prefills) == {n_eager, n_sharing, n_sharing - 3}  # the last without PyramidKV, which could not answer
    assert prefills.count(n_eager) == 3


def test_likelihoods_and_several_questions_are_the_same_and_the_full_cache_is_prefilled_once(
    model, tmp_path, prefills, monkeypatch
):
    monkeypatch.setattr(attention_patch, "search_hyperplane", lambda queries: -queries.mean(dim=1))
    presses = ["knorm", "no_press", "merging_knorm", "matching_knorm", "adakv_snapkv", "merging_adakv_snapkv", "kvzip"]
    settings = {"press_name": presses, "n_samples": 2, "tasks": "niah_multikey_2", "n_questions": 2, "data_dir": 400}
    grid = write_grid(tmp_path, model, max_new_tokens=[0, 2], answer_kl=True, **settings)
    alone_full = []
    monkeypatch.setattr(
        evaluate, "prefill", lambda *arguments: alone_full.append(arguments[2] is None) or prefill(*arguments)
    )
    assert sweep(grid, tmp_path / "shared") == 0
    # Two contexts of each group: with the full cache beside those that share, and once more for what is alone.
    assert prefills == [len(presses) - 1 + 1] * 4
    assert alone_full == [True, False] * 4
    assert sweep(grid, tmp_path / "alone", "--share_prefill", "False") == 0
    assert results(tmp_path / "shared") == results(tmp_path / "alone")
    for run in read_results(tmp_path / "shared").runs:
        assert run.predictions["turn"].to_list() == [1, 2, 1, 2]
        assert ("predicted_answer" in run.predictions) == (run.config["max_new_tokens"] == 2)
        assert run.predictions["answer_nll"].nunique() == 4
        assert (run.predictions["answer_kl"] > 0).all() or run.kind == "full"
        assert (run.predictions["answer_kl"] == 0).all() == (run.kind == "full")


def test_times_are_told_apart_where_a_prefill_is_shared(model, tmp_path, fidelity):
    blocks = [{"press_name": ["knorm", "snapkv"]}, {"press_name": ["knorm", "snapkv"], **fidelity}]
    for folder, flag in (("shared", "True"), ("alone", "False")):
        assert sweep(write_grid(tmp_path, model, cells=blocks), tmp_path / folder, "--share_prefill", flag) == 0
        for run in read_results(tmp_path / folder).runs:
            times = run.predictions[[name for name in SECONDS if name in run.predictions]]
            assert times["press_seconds"].isna().all() == (folder == "alone")
            assert (times.drop(columns="press_seconds") > 0).all(axis=None)
            assert not (times["press_seconds"] >= times["prefill_seconds"]).any()
            if "answer_seconds" in times:
                assert times["seconds"].to_list() == pytest.approx(times["prefill_seconds"] + times["answer_seconds"])


def test_cells_that_differ_in_the_press_alone_are_a_group(model, tmp_path):
    presses = ["no_press", "knorm", "merging_knorm"]
    grid = write_grid(
        tmp_path, model, press_name=presses, compression_ratio=[0.2, 0.5], merge_fraction=0.5, seed=[1, 2]
    )
    groups = group_cells(read_grid(grid))
    assert [len(group) for group in groups] == [5, 5]
    assert [{config.seed for config in group} for group in groups] == [{1}, {2}]
    for settings in ({"max_context_length": [10, 20]}, {"query_aware": [True, False]}, {"data_dir": [300, 310]}):
        groups = group_cells(read_grid(write_grid(tmp_path, model, press_name=presses, **settings)))
        assert [len(group) for group in groups] == [3, 3]


def test_a_press_that_cannot_share_is_measured_alone_and_the_log_says_why(model, tmp_path, prefills, caplog):
    grid = write_grid(tmp_path, model, press_name=["knorm", "kvcompose", "snapkv", "decoding_knorm"])
    sweep(grid, tmp_path / "results")
    assert prefills == [2]
    said = [record.getMessage() for record in caplog.records if "Measured alone" in record.getMessage()]
    assert [line.rpartition(": ")[2] for line in said] == [
        "it replaces the forward of model",
        "it evicts while decoding",
    ]


class Broken(Exception):
    pass


def break_press(monkeypatch, press_name: str, at_sample: int, error: Exception) -> None:
    """Have a press raise an error in the prefill of a sample, shared or not."""
    press_class = type(PRESS_REGISTRY[press_name])
    original, calls = press_class.score, []

    def score(self, module, *arguments):
        calls.append(module.layer_idx)
        if calls.count(0) == at_sample + 1:
            raise error
        return original(self, module, *arguments)

    monkeypatch.setattr(press_class, "score", score)


def test_a_press_that_fails_at_one_sample_fails_its_cell_alone(model, tmp_path, monkeypatch):
    presses = ["knorm", "keydiff", "snapkv"]
    grid = write_grid(tmp_path, model, press_name=presses, n_samples=3)
    assert sweep(grid, tmp_path / "well") == 0
    break_press(monkeypatch, "keydiff", 1, Broken("in the second sample"))
    assert sweep(grid, tmp_path / "broken") == 1
    (error,) = read_results(tmp_path / "broken").errors
    assert error["error"] == "Broken: in the second sample"
    assert "in score" in error["traceback"]
    well = results(tmp_path / "well")
    assert results(tmp_path / "broken") == {name: cell for name, cell in well.items() if "keydiff" not in name}
    # Its first sample is not measured again.
    monkeypatch.undo()
    measured = watch_prefills(monkeypatch)
    assert sweep(grid, tmp_path / "broken") == 0
    assert len(measured) == 2
    assert results(tmp_path / "broken") == well


def test_a_press_that_runs_out_of_memory_beside_others_is_tried_alone(model, tmp_path, monkeypatch, caplog):
    grid = write_grid(tmp_path, model, press_name=["knorm", "keydiff", "snapkv"], n_samples=2)
    assert sweep(grid, tmp_path / "well") == 0
    break_press(monkeypatch, "keydiff", 1, torch.OutOfMemoryError("too many caches"))
    assert sweep(grid, tmp_path / "results") == 0
    assert "keydiff" in caplog.text
    assert "OutOfMemoryError: too many caches" in caplog.text
    assert results(tmp_path / "results") == results(tmp_path / "well")


@pytest.mark.parametrize(("answer_kl", "counts"), [(False, [5, 2, 2, 1]), (True, [6, 2, 2, 2])])
def test_no_more_caches_are_held_than_half_of_the_free_memory_has_room_for(
    answer_kl, counts, model, tmp_path, prefills, monkeypatch
):
    presses = ["knorm", "random", "merging_random", "keydiff", "snapkv"]
    grid = write_grid(tmp_path, model, press_name=presses, answer_kl=answer_kl)
    assert sweep(grid, tmp_path / "well") == 0
    # 4 layers of keys and values of 2 heads of 16 numbers of 4 bytes, for somewhat more than 300 tokens.
    free = 2 * (2 * 4 * 2 * 16 * 4 * 420) * 2
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    assert sweep(grid, tmp_path / "results") == 0
    assert prefills == counts
    assert results(tmp_path / "results") == results(tmp_path / "well")


def test_a_cell_that_cannot_answer_fails_alone(model, tmp_path, monkeypatch):
    grid = write_grid(tmp_path, model, press_name=["knorm", "keydiff", "snapkv"])

    def measure(self, context, prefilled, full):
        if "KeyDiff" in str(prefilled.press):
            raise Broken("no words")
        return original(self, context, prefilled, full)

    original = Questions.measure
    monkeypatch.setattr(Questions, "measure", measure)
    assert sweep(grid, tmp_path / "results") == 1
    collected = read_results(tmp_path / "results")
    assert [run.press_name for run in collected.runs] == ["knorm", "snapkv"]
    assert [error["error"] for error in collected.errors] == ["Broken: no words"]


def test_where_the_shared_prefill_fails_each_cell_is_tried_alone(model, tmp_path, monkeypatch, caplog):
    grid = write_grid(tmp_path, model, press_name=["knorm", "keydiff"], n_samples=2)
    assert sweep(grid, tmp_path / "well") == 0

    def fail(*arguments):
        raise MemoryError("too long")

    monkeypatch.setattr(together, "prefill_many", fail)
    assert sweep(grid, tmp_path / "results") == 0
    assert caplog.text.count("sharing failed: MemoryError: too long") == 2
    assert results(tmp_path / "results") == results(tmp_path / "well")


# What is measured of a cell that is not finished.


def watch_prefills(monkeypatch) -> list:
    """The prefills of presses that share, and of those that are alone."""
    calls: list = []
    many, alone = together.prefill_many, here.measure_alone

    def count_many(model, input_ids, presses):
        calls.append(len(presses))
        return many(model, input_ids, presses)

    def count_alone(evaluation, read, context):
        calls.append(1)
        return alone(evaluation, read, context)

    monkeypatch.setattr(together, "prefill_many", count_many)
    monkeypatch.setattr(here, "measure_alone", count_alone)
    return calls


def interrupt_after(monkeypatch, n_appended: int) -> None:
    """End the sweep after so many samples are on the disk."""
    original, appended = unfinished_module.UnfinishedCell.append, []

    def append(self, rows):
        original(self, rows)
        appended.append(rows)
        if len(appended) == n_appended:
            raise KeyboardInterrupt

    monkeypatch.setattr(unfinished_module.UnfinishedCell, "append", append)


@pytest.mark.parametrize("share", ["True", "False"])
def test_a_sweep_that_broke_off_goes_on_from_the_sample_that_it_was_at(share, model, tmp_path, fidelity, monkeypatch):
    presses = ["random", "merging_random", "snapkv"]
    blocks = [
        {"press_name": [*presses, "decoding_knorm"], "n_samples": 4},
        {"press_name": [*presses, "kvzip"], **fidelity, "n_samples": 3},
    ]
    grid = write_grid(tmp_path, model, cells=blocks)
    flags = ("--share_prefill", share)
    assert sweep(grid, tmp_path / "alone", *flags) == 0
    folder = tmp_path / "killed"
    n_rounds, n_measured = 0, 0
    while True:
        with monkeypatch.context() as patch:
            calls = watch_prefills(patch)
            interrupt_after(patch, 3)
            status = sweep(grid, folder, *flags)
        n_rounds, n_measured = n_rounds + 1, n_measured + sum(calls)
        if status == 0:
            break
        assert status == 130
    assert n_rounds > 8
    # Of what shared the prefill that broke off, those that had not answered prefill once more.
    n_samples = 4 * (4 + 3)
    assert n_measured == n_samples if share == "False" else n_samples <= n_measured <= n_samples + 2 * n_rounds
    assert results(folder) == results(tmp_path / "alone")
    assert not (folder / "unfinished").exists()


def interrupted(model, tmp_path, monkeypatch, **settings) -> Path:
    """A cell of three samples, of which two are there."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert sweep(write_grid(tmp_path, model, n_samples=3, **settings), tmp_path / "results") == 130
    (file,) = (tmp_path / "results" / "unfinished").iterdir()
    return file


def test_a_line_that_was_being_written_is_cut_off(model, tmp_path, monkeypatch):
    file = interrupted(model, tmp_path, monkeypatch)
    about, *lines = file.read_text().splitlines(keepends=True)
    assert json.loads(about)["settings"]["n_samples"] == 3
    assert [json.loads(line)["sample"] for line in lines] == [0, 1]
    file.write_text(about + lines[0] + lines[1][:-20])
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert sweep(tmp_path / "grid.yaml", tmp_path / "results") == 130
    assert [json.loads(line)["sample"] for line in file.read_text().splitlines()[1:]] == [0, 1]
    calls = watch_prefills(monkeypatch)
    assert sweep(tmp_path / "grid.yaml", tmp_path / "results") == 0
    assert calls == [1]
    assert sweep(tmp_path / "grid.yaml", tmp_path / "whole") == 0
    assert results(tmp_path / "results") == results(tmp_path / "whole")


@pytest.mark.parametrize("spoil", ["version", "settings", "nonsense", "empty"])
def test_samples_of_other_settings_or_versions_are_not_mixed_in(spoil, model, tmp_path, monkeypatch):
    file = interrupted(model, tmp_path, monkeypatch)
    text = file.read_text()
    if spoil == "version":
        file.write_text(text.replace('"kvpress-merging": "', '"kvpress-merging": "9'))
    elif spoil == "settings":
        file.write_text(text.replace('"n_samples": 3', '"n_samples": 4'))
    else:
        file.write_bytes(b"\xff\x00\nnot JSON\n" if spoil == "nonsense" else b"")
    calls = watch_prefills(monkeypatch)
    assert sweep(tmp_path / "grid.yaml", tmp_path / "results") == 0
    assert calls == [1, 1, 1]
    assert not file.exists()


def test_what_was_left_of_a_cell_that_is_there_is_removed(model, tmp_path, monkeypatch):
    file = interrupted(model, tmp_path, monkeypatch)
    text = file.read_text()
    assert sweep(tmp_path / "grid.yaml", tmp_path / "results") == 0
    before = appeared(tmp_path / "results")
    file.parent.mkdir()
    file.write_text(text)  # as if it had been killed between the two
    assert sweep(tmp_path / "grid.yaml", tmp_path / "results") == 0
    assert appeared(tmp_path / "results") == before
    assert not file.parent.exists()


def test_values_come_back_to_the_bit(tmp_path):
    (tmp_path / "grid.yaml").write_text("press_name: knorm")
    (config,) = read_grid(tmp_path / "grid.yaml")
    cell = unfinished_module.UnfinishedCell(tmp_path, config, threads=1)
    rows = {3: {"a": 0.1 + 0.2, "b": 1e-310, "c": "Ä\n\ud800", "d": 7}, 5: {"a": float("inf"), "b": -0.0}}
    cell.append({3: rows[3]})
    cell.append({5: rows[5]})
    assert repr(cell.read()) == repr(rows)
