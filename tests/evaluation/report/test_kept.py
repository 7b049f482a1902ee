# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What a wrapper does to answers that eviction kept, and to those that it lost."""

import math
import re
import warnings

import numpy as np
import pandas as pd
import pytest
from kvpress import KnormPress, SnapKVPress
from run_folders import write_run

from evaluation.__main__ import main
from evaluation.report.compare import twins_of
from evaluation.report.kept import ALL, answers_of, harmed_answers, kept_and_lost, kept_table
from evaluation.report.runs import read_results, read_run
from kvpress_merging import MergingPress

FULL = [0.0, 0.0, 1.0, 0.5, 0.0, 4.0, 4.0]
BARE = [0.05, 0.0, 1.05, 2.5, 1.0, 4.0, 6.0]
MERGED = [0.05, 0.31, 0.85, 1.5, 1.4, 9.0, 5.0]
"""Two texts: three answers kept, of which one is harmed; two lost, of which one is harmed; two that nothing has."""
TEXTS = [0, 1, 0, 0, 1, 1, 0]


def test_kept_and_lost_answers_have_paper_and_pencil_numbers():
    told = kept_and_lost(FULL, BARE, MERGED, TEXTS)
    assert (told["n_kept"], told["kept_harmed"], told["n_lost"], told["lost_harmed"]) == (3, 1, 2, 1)
    assert told["n_left_out"] == 2
    assert told["kept_change"] == pytest.approx((0 + 0.31 - 0.2) / 3)
    assert told["won_back"] == pytest.approx((1 - 0.4) / (2 + 1))
    assert (told["kept_worst"], told["lost_worst"]) == pytest.approx((0.31, 0.4))


def test_the_thresholds_are_the_callers():
    told = kept_and_lost(FULL, BARE, MERGED, kept_below=1.5, harmed_above=0.35, found_below=5)
    assert (told["n_kept"], told["kept_harmed"], told["n_lost"], told["n_left_out"]) == (5, 2, 2, 0)
    assert kept_and_lost(FULL, BARE, MERGED, found_below=1)["n_left_out"] == 3
    # What eviction adds exactly as much as the threshold to is lost, and what rises by exactly as much is not harmed.
    assert kept_and_lost([0.0], [0.5], [0.75], kept_below=0.5, harmed_above=0.25)["n_lost"] == 1
    assert kept_and_lost([0.0], [0.5], [0.75], kept_below=0.5, harmed_above=0.25)["lost_harmed"] == 0


def test_a_rule_that_changes_nothing_harms_and_wins_back_nothing():
    told = kept_and_lost(FULL, BARE, BARE)
    assert (told["kept_harmed"], told["lost_harmed"], told["kept_change"], told["won_back"]) == (0, 0, 0, 0)
    assert kept_and_lost(FULL, BARE, FULL)["won_back"] == 1


def test_what_is_asked_about_one_text_is_resampled_together():
    """Two texts, each with a hundred answers that change alike: two numbers, not two hundred."""
    full, texts = np.zeros(200), np.repeat([0, 1], 100)
    merged = np.where(texts == 0, 0.0, 0.2)
    together = kept_and_lost(full, full, merged, texts)
    assert (together["kept_low"], together["kept_change"], together["kept_high"]) == pytest.approx((0, 0.1, 0.2))
    alone = kept_and_lost(full, full, merged)
    assert 0.08 < alone["kept_low"] < 0.1 < alone["kept_high"] < 0.12


def test_where_there_is_nothing_to_say_it_of_it_is_nan():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = kept_and_lost([0.0], [0.0], [0.2])
    assert (told["n_kept"], told["kept_change"], told["n_lost"]) == (1, pytest.approx(0.2), 0)
    assert all(math.isnan(told[name]) for name in ("kept_low", "won_back", "won_low", "lost_worst"))


@pytest.mark.parametrize("sides", [([0.0], [0.0, 1.0], [0.0]), ([0.0], [math.nan], [0.0]), ([0.0], [0.0], [math.inf])])
def test_answers_without_a_number_are_refused(sides):
    with pytest.raises(ValueError, match="must"):
        kept_and_lost(*sides)


@pytest.fixture
def answers(tmp_path):
    """Two presses at two ratios, two tasks of two answers; SnapKV has no run of the bare press at 0.75."""
    tasks = {"qa": [0.0, 0.0], "vt": [0.0, 0.0]}
    write_run(tmp_path, "no_press", None, tasks, nll=[0.0, 0.0, 0.0, 5.0], compression_ratio=0.0)
    for name, press in (("knorm", KnormPress), ("snapkv", SnapKVPress)):
        for ratio in (0.5, 0.75):
            settings = {"compression_ratio": ratio}
            if (name, ratio) != ("snapkv", 0.75):
                write_run(tmp_path, name, press(ratio), tasks, nll=[0.0, 2 * ratio, 0.0, 5.0], **settings)
            nll = [ratio, ratio, 0.1, 5.0]
            write_run(tmp_path, f"merging_{name}", MergingPress(press(ratio)), tasks, nll=nll, **settings)
    runs = read_results(tmp_path).runs
    return answers_of(twins_of(runs), [run for run in runs if run.kind == "full"], "b")


def test_a_table_says_it_over_all_by_press_by_ratio_and_by_task(answers):
    table = kept_table(answers).set_index(["press", "level", "task"])
    assert list(table.index) == [
        (ALL, ALL, ALL), ("knorm", ALL, ALL), ("snapkv", "0.5", ALL), (ALL, "0.5", ALL), ("knorm", "0.75", ALL),
        (ALL, ALL, "qa"), (ALL, ALL, "vt"),
    ]  # fmt: skip
    assert set(table["kind"]) == {"merged"}
    assert table["n_kept"].tolist() == [6, 4, 2, 4, 2, 3, 3]
    assert table["kept_harmed"].tolist() == [3, 2, 1, 2, 1, 3, 0]
    assert table["n_lost"].tolist() == [3, 2, 1, 2, 1, 3, 0]
    assert table["n_left_out"].tolist() == [3, 2, 1, 2, 1, 0, 3]
    # Of 1, 1.5 and 1 nats it takes half, 0.5, 0.75 and 0.5.
    assert table.loc[(ALL, ALL, ALL), "won_back"] == 0.5


def test_of_one_press_one_ratio_and_one_task_there_is_one_row(answers):
    of_one = answers[(answers["press"] == "knorm") & (answers["level"] == "0.5") & (answers["task"] == "qa")]
    assert kept_table(of_one)[["press", "level", "task", "n_kept"]].to_numpy().tolist() == [["knorm", "0.5", "qa", 1]]


def test_harmed_answers_that_were_lost_or_that_nothing_has_are_not_among_the_kept():
    about = {"benchmark": "b", "kind": "merged", "press": "knorm", "level": "0.5", "task": "qa"}
    answers = pd.DataFrame({"full": FULL, "bare": BARE, "merged": MERGED, "sample": range(7)}).assign(**about)
    assert harmed_answers(answers)["sample"].tolist() == [1]


def test_the_kept_answers_that_are_harmed_are_named_the_worst_first(answers):
    table = harmed_answers(answers)
    assert table["rise"].tolist() == [0.75, 0.5, 0.5]
    assert table["level"].tolist() == ["0.75", "0.5", "0.5"]
    assert set(table["sample"]) == {0}
    assert (table["merged"] - table["bare"] == table["rise"]).all()


def test_questions_about_one_context_are_answers_of_one_text(tmp_path):
    tasks = {"qa": [0.0] * 4, "vt": [0.0] * 2}
    for name, press in (
        ("no_press", None),
        ("knorm", KnormPress(0.5)),
        ("merging_knorm", MergingPress(KnormPress(0.5))),
    ):
        write_run(tmp_path, name, press, tasks, nll=[0.0] * 6, n_questions=2)
    runs = read_results(tmp_path).runs
    answers = answers_of(twins_of(runs), [run for run in runs if run.kind == "full"])
    assert (len(answers), answers["text"].nunique()) == (6, 3)


def test_without_the_full_cache_or_without_likelihoods_there_is_no_table(tmp_path):
    for name, press in (("knorm", KnormPress(0.5)), ("merging_knorm", MergingPress(KnormPress(0.5)))):
        write_run(tmp_path, name, press, {"qa": [0.0]}, nll=[0.0])
    twins = twins_of(read_results(tmp_path).runs)
    other = write_run(tmp_path / "other", "no_press", None, {"qa": [0.0]}, nll=[0.0], compression_ratio=0.0, seed=1)
    assert answers_of(twins, []).empty
    assert answers_of(twins, [read_run(other)]).empty
    assert kept_table(answers_of(twins, [])).empty
    assert isinstance(harmed_answers(answers_of(twins, [])), pd.DataFrame)


# The commands.


def test_with_the_full_caches_run_kept_and_lost_answers_are_told_apart(tmp_path, capsys):
    tasks = {"qa": [0.0] * 4}
    first, second = tmp_path / "first", tmp_path / "second"
    full = write_run(first, "no_press", None, tasks, nll=[0.5] * 4, compression_ratio=0.0)
    bare = write_run(first, "knorm", KnormPress(0.5), tasks, nll=[0.5, 0.5, 2.5, 2.5])
    press = MergingPress(KnormPress(0.5))
    merged = write_run(second, "merging_knorm", press, tasks, nll=[0.5, 1.0, 2.5, 1.5])
    main(["compare", str(bare), str(merged)])
    assert "Kept and lost" not in capsys.readouterr().out
    row = r"merged +knorm +0\.5 +qa +2 +1 \(50\.0 %\) +\+0\.250 .* 2 +25\.0 % .* 0 \(0\.0 %\)"
    for sides in ((bare, merged, "--full", full), (first, second)):
        main(["compare", *map(str, sides)])
        assert re.search(row, capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["compare", str(bare), str(merged), "--full", str(bare)])
    assert "has no run with the full cache" in capsys.readouterr().err


def test_a_report_says_what_was_kept_and_lost_and_which_kept_answers_were_harmed(tmp_path):
    tasks = {"qa": [0.0] * 4}
    write_run(tmp_path, "no_press", None, tasks, nll=[0.5] * 4, compression_ratio=0.0)
    write_run(tmp_path, "knorm", KnormPress(0.5), tasks, nll=[0.5, 0.5, 2.5, 2.5])
    write_run(tmp_path, "merging_knorm", MergingPress(KnormPress(0.5)), tasks, nll=[0.5, 1.0, 2.5, 1.5])
    main(["report", str(tmp_path)])
    kept, harmed = (pd.read_csv(tmp_path / "report" / f"{name}.csv") for name in ("kept", "harmed"))
    assert kept[["n_kept", "kept_harmed", "n_lost", "won_back"]].to_numpy().tolist() == [[2, 1, 2, 0.25]]
    assert harmed[["press", "task", "sample", "rise"]].to_numpy().tolist() == [["knorm", "qa", 1, 0.5]]
    assert "1 (50.0 %)" in (tmp_path / "report" / "index.html").read_text()
    lines = (tmp_path / "report" / "README.md").read_text().splitlines()
    (row,) = (line for line in lines if "1 (50.0 %)" in line)
    assert row.startswith(
        "| merged | knorm | 0.5 | qa | 2 | 1 (50.0 %) | +0.250 (+0.000 .. +0.500) | +0.500 | 2 | 25.0 %"
    )
    assert "| merged | knorm | 0.5 | qa | 1 | 0.5000 | 0.5000 | 1.00 |" in lines
