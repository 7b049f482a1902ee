# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""How much less cache a wrapper takes for the bare press's score."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpress import KnormPress
from run_folders import write_run

from evaluation.report.equal_quality import equal_quality, needed_share
from evaluation.report.plots import Styles, plot_kept_shares
from evaluation.report.runs import read_results
from kvpress_merging import AttentionMatchingPress, MergingPress

SHARES = [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("scores", "target", "needed"),
    [
        ([0, 40, 60, 80], 50, 0.625),
        ([0, 40, 60, 80], 60, 0.75),
        ([0, 40, 60, 80], 0, 0.25),
        ([0, 40, 60, 80], -1, -math.inf),
        ([0, 40, 60, 80], 81, math.inf),
        # It falls in between: at its best it has 50 with less cache.
        ([0, 60, 40, 80], 50, 0.25 + 0.25 * 5 / 6),
        ([60, 40, 60, 80], 50, -math.inf),
        # Level: the smallest share that has it.
        ([0, 50, 50, 80], 50, 0.5),
    ],
)
def test_a_line_between_measured_shares_says_what_is_needed(scores, target, needed):
    assert needed_share(SHARES, scores, target) == needed


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=4, max_size=4), st.floats(-100, 100))
def test_no_smaller_measured_share_is_as_good_as_what_is_said_to_be_needed(scores, target):
    needed = needed_share(SHARES, scores, target)
    assert all(score < target for share, score in zip(SHARES, scores) if share < needed)
    if math.isfinite(needed):
        assert np.interp(needed, SHARES, scores) == pytest.approx(target, abs=1e-9)


def runs_of(root, ours, *, full=0.0, **settings):
    """Bare Knorm with an ``answer_nll`` of ten times what it evicts, and matching at 0.75 with what is given."""
    if full is not None:
        write_run(root, "no_press", None, {"qa": [0.0] * 3}, nll=[full] * 3, compression_ratio=0.0)
    for ratio in (0.25, 0.5, 0.75):
        nll = [10 * ratio] * 3
        write_run(root, "knorm", KnormPress(ratio), {"qa": [0.0] * 3}, nll=nll, compression_ratio=ratio)
    press = AttentionMatchingPress(KnormPress(0.75))
    write_run(root, "matching_knorm", press, {"qa": [0.0] * 3}, nll=ours, compression_ratio=0.75, **settings)
    return read_results(root).runs


def rows_of(runs):
    return equal_quality(runs, "b").set_index("metric")


def test_what_is_saved_is_a_share_of_what_the_bare_press_needs(tmp_path):
    row = rows_of(runs_of(tmp_path, [3.0, 4.0, 5.0])).loc["answer_nll"]
    assert (row["kept_share"], row["needed_share"], row["says"]) == (0.25, pytest.approx(0.6), "")
    assert row["saved"] == pytest.approx(1 - 0.25 / 0.6)
    # The bare press does not vary, so that the interval is that of 3, 4 and 5: means from 3 to 5 need 0.7 to 0.5.
    assert 1 - 0.25 / 0.5 <= row["low"] < row["saved"] < row["high"] <= 1 - 0.25 / 0.7
    assert (row["press"], row["kind"], row["level"], row["n_samples"]) == ("knorm", "matching", "0.75", 3)


def test_a_wrapper_that_changes_nothing_saves_nothing(tmp_path):
    row = rows_of(runs_of(tmp_path, [7.5] * 3)).loc["answer_nll"]
    assert row[["saved", "low", "high"]].tolist() == [0, 0, 0]


def test_it_is_said_in_any_metric_whichever_way_is_better(tmp_path):
    write_run(tmp_path, "no_press", None, {"qa": [100.0] * 2}, compression_ratio=0.0)
    for ratio, score in ((0.5, 60.0), (0.75, 20.0)):
        write_run(tmp_path, "knorm", KnormPress(ratio), {"qa": [score] * 2}, compression_ratio=ratio)
        press = MergingPress(KnormPress(ratio))
        write_run(tmp_path, "merging_knorm", press, {"qa": [score + 20] * 2}, compression_ratio=ratio)
    table = equal_quality(read_results(tmp_path).runs, "b")
    assert set(table["metric"]) == {"string_match"}
    assert table["needed_share"].tolist() == pytest.approx([0.75, 0.375])


def test_tasks_weigh_the_same_however_many_samples_they_have(tmp_path):
    for name, press, ratio, scores in (
        ("knorm", KnormPress(0.5), 0.5, (60.0, 0.0)),
        ("knorm", KnormPress(0.75), 0.75, (0.0, 0.0)),
        ("merging_knorm", MergingPress(KnormPress(0.75)), 0.75, (0.0, 30.0)),
    ):
        tasks = {"qa": [scores[0]] * 2, "vt": [scores[1]] * 8}
        write_run(tmp_path, name, press, tasks, compression_ratio=ratio)
    assert rows_of(read_results(tmp_path).runs).loc["string_match", "needed_share"] == pytest.approx(0.375)


@pytest.mark.parametrize(
    ("ours", "full", "says"),
    [
        ([-1.0] * 3, 0.0, "better than the full cache"),
        ([-1.0] * 3, None, "better than the bare press with 75.0 % of the cache"),
        ([9.0] * 3, 0.0, "worse than the bare press with 25.0 % of the cache"),
    ],
)
def test_where_no_measured_share_has_the_score_there_are_words_and_no_number(tmp_path, ours, full, says):
    row = rows_of(runs_of(tmp_path, ours, full=full)).loc["answer_nll"]
    assert row["says"] == says
    assert row[["needed_share", "saved", "low", "high"]].isna().all()


def test_an_interval_ends_where_what_was_measured_ends(tmp_path):
    row = rows_of(runs_of(tmp_path, [-9.0, 0.0, 12.0])).loc["answer_nll"]
    assert (row["low"], row["high"]) == (0, 0.75)


def test_a_press_measured_at_one_ratio_is_left_out(tmp_path):
    runs = [run for run in runs_of(tmp_path, [3.0] * 3) if run.kind != "bare" or run.ratio == 0.75]
    assert equal_quality(runs, "b").empty


def test_the_picture_of_equal_quality_has_a_panel_a_kind_and_a_line_a_press_with_its_interval():
    rows = [
        (press, kind, 1 - ratio, 1.25 * (1 - ratio), 0.1, 0.3)
        for press in ("knorm", "snapkv")
        for kind in ("merged", "matching")
        for ratio in (0.5, 0.75)
    ]
    rows.append(("tova", "matching", 0.5, np.nan, np.nan, np.nan))
    table = pd.DataFrame(rows, columns=["press", "kind", "kept_share", "needed_share", "low", "high"])
    figure = plot_kept_shares(table, Styles(["knorm", "snapkv", "tova"], ["merged", "matching"]), "score")
    assert [axes.get_title() for axes in figure.axes] == ["merged", "matching"]
    for axes in figure.axes:
        diagonal, *lines = (line for line in axes.lines if len(line.get_xdata()) == 2)
        assert diagonal.get_xydata().tolist() == [[0, 0], [100, 100]]
        assert len(lines) == len(axes.containers) == 2
        for line, drawn in zip(lines, axes.containers):
            assert line.get_xydata().tolist() == [[25, 31.25], [50, 62.5]]
            (bars,) = drawn[2]
            ends = [path.vertices[:, 1].tolist() for path in bars.get_paths()]
            assert np.allclose(ends, [[25 / 0.9, 25 / 0.7], [50 / 0.9, 50 / 0.7]])
