# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Two runs on the same samples: which belong together, and what the comparison says."""

import json
import math
import re
from typing import Any, cast

import pandas as pd
import pytest
from kvpress import AdaKVPress, ExpectedAttentionPress, KnormPress
from kvpress import MergingPress as KVPressMergingPress
from run_folders import write_run

from evaluation.__main__ import main
from evaluation.evaluate_registry import PRESS_REGISTRY
from evaluation.report.compare import ALL_TASKS, compare_folders, compare_runs, compare_twins
from evaluation.report.runs import bare_name, is_twin, read_results, read_run
from evaluation.report.statistics import paired_difference
from evaluation.report.summary import compare_all
from kvpress_merging import PRESS_REGISTRY as MERGING_PRESSES
from kvpress_merging import AttentionMatchingPress, MergingPress


@pytest.fixture
def pair(tmp_path):
    """Knorm at 0.5 on two tasks, bare and merged."""
    bare = write_run(tmp_path, "knorm", KnormPress(0.5), {"qa": [0, 0, 100, 50], "vt": [100, 0]})
    merged = write_run(
        tmp_path, "merging_knorm", MergingPress(KnormPress(0.5)), {"qa": [100, 0, 100, 25], "vt": [100, 100]}
    )
    return bare, merged


# What belongs together.


def test_a_merged_run_is_compared_with_the_press_inside(pair):
    bare, merged = map(read_run, pair)
    assert (bare.kind, merged.kind) == ("bare", "merged")
    assert is_twin(merged, bare)
    assert not is_twin(bare, merged)
    assert not is_twin(bare, bare)


def test_a_comparison_has_paper_and_pencil_numbers(pair):
    table = compare_runs(*map(read_run, pair), benchmark="b").set_index("task")
    qa = table.loc["qa"]
    assert (qa["bare"], qa["merged"], qa["difference"]) == (37.5, 56.25, 18.75)
    assert (qa["n_samples"], qa["wins"], qa["ties"], qa["losses"]) == (4, 1, 2, 1)
    assert (qa["mean_loss"], qa["worst_loss"]) == (25, 25)
    assert table.loc["vt", ["mean_loss", "worst_loss"]].isna().all()
    assert table.loc[ALL_TASKS, "difference"] == (18.75 + 50) / 2
    assert table.loc[ALL_TASKS, "n_samples"] == 6
    expected = paired_difference([[100, 0, 0, -25], [0, 100]])
    assert tuple(table.loc[ALL_TASKS, ["low", "high", "p"]]) == (expected.low, expected.high, expected.p_value)


def test_holm_is_over_the_tasks_of_a_comparison(tmp_path):
    tasks = {"a": [0.0] * 6, "b": [0.0] * 6, "c": [0.0] * 6}
    bare = write_run(tmp_path, "knorm", KnormPress(0.5), tasks)
    better = {"a": [100.0] * 6, "b": [100.0] * 5 + [0.0], "c": [0.0] * 6}
    merged = write_run(tmp_path, "merging_knorm", MergingPress(KnormPress(0.5)), better)
    table = compare_runs(read_run(bare), read_run(merged), "b").set_index("task")
    assert table["p"].to_dict() == {"a": 2 / 64, "b": 2 / 32, "c": 1, ALL_TASKS: 2 / 2048}
    assert table["p_holm"].to_dict() == {"a": 6 / 64, "b": 4 / 32, "c": 1, ALL_TASKS: 2 / 2048}
    assert table.loc[ALL_TASKS, "verdict"] == "better"
    assert table.loc["a", "verdict"] == "no difference shown"


def test_of_kl_less_is_better_and_of_agreement_more(tmp_path):
    bare = write_run(tmp_path, "knorm", KnormPress(0.5), [0.2] * 8)
    merged = write_run(tmp_path, "merging_knorm", MergingPress(KnormPress(0.5)), [0.1] * 8)
    table = compare_runs(read_run(bare), read_run(merged), "b").set_index("metric")
    assert sorted(table.index) == ["attention_error", "kl", "nll_increase", "top1_agreement"]
    assert (table["verdict"] == "better").all()
    assert (table["wins"] == 8).all()
    assert table["difference"].to_dict() == pytest.approx(
        {"kl": -0.1, "nll_increase": -0.1, "attention_error": -0.05, "top1_agreement": 0.1}
    )
    assert table.loc["kl", "direction"] == "lower is better"
    assert table.loc["top1_agreement", "direction"] == "higher is better"


def test_of_the_likelihood_of_answers_less_is_better_and_it_is_paired_with_an_interval(tmp_path):
    tasks = {"qa": [0.0] * 8}
    falls = [0.1 * i for i in range(1, 9)]
    bare = write_run(tmp_path, "knorm", KnormPress(0.5), tasks, nll=[2.0] * 8)
    press = MergingPress(KnormPress(0.5))
    merged = write_run(tmp_path, "merging_knorm", press, tasks, nll=[2.0 - fall for fall in falls])
    table = compare_runs(read_run(bare), read_run(merged), benchmark="b").set_index("metric")
    row = table.loc["answer_nll"]
    assert (row["direction"], row["verdict"], row["wins"]) == ("lower is better", "better", 8)
    expected = paired_difference([[-fall for fall in falls]])
    assert (row["difference"], row["low"], row["high"]) == pytest.approx((expected.mean, expected.low, expected.high))


def test_questions_about_one_context_are_one_sample(tmp_path):
    scores = {"niah_multivalue": [0, 100, 50, 50, 0, 0]}
    press = MergingPress(KnormPress(0.5))
    bare = write_run(tmp_path, "knorm", KnormPress(0.5), scores, n_questions=2)
    merged = write_run(
        tmp_path, "merging_knorm", press, {"niah_multivalue": [100, 100, 0, 50, 100, 100]}, n_questions=2
    )
    row = compare_runs(read_run(bare), read_run(merged), benchmark="b").iloc[0]
    assert (row["n_samples"], row["wins"], row["ties"], row["losses"]) == (3, 2, 0, 1)
    expected = paired_difference([[50, -25, 100]])
    assert tuple(row[["difference", "low", "high", "p"]]) == (
        expected.mean, expected.low, expected.high, expected.p_value
    )  # fmt: skip


def test_of_runs_with_and_without_a_likelihood_the_scores_are_compared(tmp_path):
    bare = write_run(tmp_path, "knorm", KnormPress(0.5), {"qa": [0.0, 0.0]})
    merged = write_run(tmp_path, "merging_knorm", MergingPress(KnormPress(0.5)), {"qa": [0.0, 9.0]}, nll=[1.0, 2.0])
    assert compare_runs(read_run(bare), read_run(merged), benchmark="b")["metric"].tolist() == ["string_match"]


@pytest.mark.parametrize(
    "different", [{"seed": 1}, {"data_dir": "2048"}, {"model": "other"}, {"query_aware": True}, {"n_samples": 3}]
)
def test_runs_that_differ_in_a_setting_are_no_twins(tmp_path, different):
    bare = write_run(tmp_path, "knorm", KnormPress(0.5), {"qa": [1.0]})
    merged = write_run(tmp_path, "merging_knorm", MergingPress(KnormPress(0.5)), {"qa": [1.0]}, **different)
    assert not is_twin(read_run(merged), read_run(bare))
    benchmarks, notes = compare_all(read_results(tmp_path))
    assert sum(len(benchmark.table) for benchmark in benchmarks) == 0
    assert len({benchmark.label for benchmark in benchmarks}) == 2
    assert any("has no run of the bare press" in note for note in notes)


def test_runs_at_different_ratios_are_no_twins(tmp_path):
    write_run(tmp_path, "knorm", KnormPress(0.25), {"qa": [1.0]}, compression_ratio=0.25)
    write_run(tmp_path, "merging_knorm", MergingPress(KnormPress(0.5)), {"qa": [1.0]})
    assert compare_twins(read_results(tmp_path).runs, "b")[0].empty


def test_other_merge_settings_are_other_comparisons_named_by_what_is_not_default(tmp_path):
    write_run(tmp_path, "knorm", KnormPress(0.5), {"qa": [0.0, 1.0]})
    for threshold in (None, 0.5, 0.0):
        press = MergingPress(KnormPress(0.5), similarity_threshold=threshold or 0.0)
        write_run(tmp_path, "merging_knorm", press, {"qa": [1.0, 1.0]}, similarity_threshold=threshold)
    table, _ = compare_twins(read_results(tmp_path).runs, "b")
    assert sorted(table["kind"]) == ["merged", "merged, similarity_threshold=0.5"]


def test_runs_belong_together_by_name_and_settings_however_their_presses_are_written(tmp_path):
    write_run(tmp_path, "knorm", "KnormPress(hook=<function f at 0x7f>)", {"qa": [0.0]})
    write_run(tmp_path, "snapkv", "SnapKVPress(hook=<function f at 0x7f>)", {"qa": [0.0]})
    merged = write_run(tmp_path, "merging_knorm", "MergingPress(press=KnormPress(hook=<f>), x=1)", {"qa": [1.0]})
    runs = read_results(tmp_path).runs
    assert [bare.press_name for bare in runs if is_twin(read_run(merged), bare)] == ["knorm"]


@pytest.mark.parametrize(
    ("press_name", "bare"),
    [
        *((f"{prefix}_snapkv", "snapkv") for prefix in ("merging", "matching")),
        ("merging_expected_attention", "expected_attention_head"),
        ("matching_adakv_expected_attention", "expected_attention"),
        ("merging_kvzap_mlp", "kvzap_mlp_head"),
        ("matching_dms_kvzap_mlp", "kvzap_mlp"),
        ("merging_of_tomorrow", "of_tomorrow"),
    ],
)
def test_a_name_of_ours_says_which_bare_press_is_inside(press_name, bare):
    assert bare_name(press_name) == bare


def test_every_press_of_ours_has_its_bare_press_in_the_registry():
    for name in MERGING_PRESSES:
        inner: Any = PRESS_REGISTRY[bare_name(name)]
        assert inner == cast(Any, MERGING_PRESSES[name]).press, name


def test_a_press_that_evicts_at_other_moments_is_named_by_them(tmp_path):
    for interval in (None, 8, 16):
        write_run(tmp_path, "decoding_knorm", "?", {"qa": [0.0]}, compression_interval=interval)
    assert sorted(run.press for run in read_results(tmp_path).runs) == [
        "decoding_knorm",
        "decoding_knorm (compression_interval=16)",
        "decoding_knorm (compression_interval=8)",
    ]


def test_kvpresss_own_merging_press_is_not_taken_for_ours(tmp_path):
    write_run(tmp_path, "knorm", KnormPress(0.5), {"qa": [0.0]})
    write_run(tmp_path, "merging_knorm", KVPressMergingPress(KnormPress(0.5)), {"qa": [1.0]}, versions={})
    assert compare_twins(read_results(tmp_path).runs, "b")[0].empty


def test_a_matching_press_is_compared_too_and_called_so(tmp_path):
    write_run(tmp_path, "knorm", KnormPress(0.5), {"qa": [0.0]})
    folder = write_run(tmp_path, "matching_knorm", AttentionMatchingPress(KnormPress(0.5)), {"qa": [1.0]})
    assert read_run(folder).kind == "matching"
    assert compare_twins(read_results(tmp_path).runs, "b")[0]["kind"].tolist() == ["matching"]


def test_presses_go_by_the_name_of_their_bare_run_and_no_two_by_one_name(tmp_path):
    inner = AdaKVPress(ExpectedAttentionPress(0.5, epsilon=1e-2))
    write_run(tmp_path, "expected_attention", inner, {"qa": [0.0]})
    write_run(tmp_path, "merging_adakv_expected_attention", MergingPress(inner), {"qa": [0.0]})
    write_run(tmp_path, "merging_expected_attention", MergingPress(ExpectedAttentionPress(0.5)), {"qa": [0.0]})
    names = {run.press_name: run.press for run in read_results(tmp_path).runs}
    assert names["merging_adakv_expected_attention"] == names["expected_attention"] == "expected_attention"
    assert names["merging_expected_attention"] == "expected_attention_head"


def test_of_repeats_the_newest_is_taken_and_told(tmp_path):
    for score in range(12):
        write_run(tmp_path / "deep" / "down", "knorm", KnormPress(0.5), {"qa": [float(score)]})
    results = read_results(tmp_path)
    (run,) = results.runs
    assert run.scores["string_match"].tolist() == [11]
    assert "was run 12 times" in results.notes[0]


def test_only_shared_samples_are_compared_and_told(pair):
    file = pair[1] / "predictions.csv"
    file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")
    table, _, notes = compare_folders(*pair)
    assert table.set_index("task").loc["vt", "n_samples"] == 1
    assert any("5 samples are in both runs, of 6 and 5" in note for note in notes)


def test_samples_without_a_score_are_left_out_and_told(pair):
    predictions = pd.read_csv(pair[1] / "predictions.csv").astype({"string_match": float})
    predictions.loc[0, "string_match"] = math.inf
    predictions.to_csv(pair[1] / "predictions.csv", index=False)
    table, _, notes = compare_folders(*pair)
    assert table.set_index("task").loc["qa", "n_samples"] == 3
    assert any("1 samples without a finite string_match" in note for note in notes)


def test_different_samples_are_an_error(tmp_path, capsys):
    write_run(tmp_path, "knorm", KnormPress(0.5), {"qa": [0.0, 1.0]})
    write_run(tmp_path, "merging_knorm", MergingPress(KnormPress(0.5)), {"qa": [0.0, 1.0]}, identity="b")
    with pytest.raises(SystemExit) as exit_info:
        main(["report", str(tmp_path)])
    assert exit_info.value.code == 2
    err = capsys.readouterr().err
    assert "sample 0 is not the same" in err
    assert "answer differs" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_different_windows_are_an_error(tmp_path):
    bare = write_run(tmp_path, "knorm", KnormPress(0.5), [0.2] * 3)
    merged = write_run(tmp_path, "merging_knorm", MergingPress(KnormPress(0.5)), [0.1] * 3)
    predictions = pd.read_csv(merged / "predictions.csv").assign(nll_full=[2.0, 2.0, 3.0])
    predictions.to_csv(merged / "predictions.csv", index=False)
    with pytest.raises(ValueError, match=r"sample 2 is not the same .* full cache differs"):
        compare_runs(read_run(bare), read_run(merged), "b")


def test_each_task_may_have_a_metric_of_its_own(pair):
    for folder in pair:
        predictions = pd.read_csv(folder / "predictions.csv")
        is_qa = predictions["task"] == "qa"
        score = predictions.pop("string_match")
        predictions.assign(f1=score.where(is_qa), rouge_l=score.where(~is_qa)).to_csv(
            folder / "predictions.csv", index=False
        )
        (folder / "metrics.json").write_text(json.dumps({"qa": {"f1": 1.0}, "vt": {"rouge_l": 1.0}}))
    table = compare_runs(*map(read_run, pair), benchmark="b")
    assert table["metric"].tolist() == ["score"] * 3
    assert table["task"].tolist() == ["qa", "vt", ALL_TASKS]


# The commands.


def test_two_runs_are_compared_on_the_command_line(pair, capsys):
    main(["compare", *map(str, pair)])
    out = capsys.readouterr().out
    assert re.search(r"all tasks +6 +43\.8 +78\.1 +\+34\.4 ", out)
    assert "1/2/1" in out


def test_what_gets_worse_is_told_by_how_much_on_average_and_at_worst(tmp_path, capsys):
    tasks = {"qa": [0.0] * 4}
    bare = write_run(tmp_path, "knorm", KnormPress(0.5), tasks, nll=[1.0] * 4)
    press = MergingPress(KnormPress(0.5))
    merged = write_run(tmp_path, "merging_knorm", press, tasks, nll=[0.5, 1.0, 1.25, 2.75])
    row = compare_runs(read_run(bare), read_run(merged), benchmark="b").set_index("metric").loc["answer_nll"]
    assert (row["wins"], row["ties"], row["losses"]) == (1, 1, 2)
    assert (row["mean_loss"], row["worst_loss"]) == (1, 1.75)
    main(["compare", str(bare), str(merged)])
    assert re.search(r"1/1/2 +1\.00 \(1\.75\)", capsys.readouterr().out)


def test_in_a_narrow_terminal_names_differences_and_verdicts_stay(pair, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    main(["compare", *map(str, pair)])
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, out.splitlines())) <= 80
    for text in ("knorm", "all tasks", "+34.4", "1/2/1"):
        assert text in " ".join(out.split()) or all(part in out for part in text.split())
    assert "…" not in out


def test_two_folders_are_compared_run_by_run(tmp_path, capsys):
    for root, score in (("old", 0.0), ("new", 1.0)):
        write_run(tmp_path / root, "knorm", KnormPress(0.5), {"qa": [score] * 3})
        write_run(tmp_path / root, "merging_knorm", MergingPress(KnormPress(0.5)), {"qa": [2 * score] * 3})
    table, _, _ = compare_folders(tmp_path / "old", tmp_path / "new")
    assert sorted(table["difference"]) == [1, 2]
