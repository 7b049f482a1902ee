# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
import json
import shlex
import sys

import pandas as pd
import pytest
from kvpress import KnormPress
from matplotlib.image import imread
from run_folders import write_run

from evaluation import demo
from evaluation.cli import parse_config
from evaluation.demo import DemoConfig, verdict
from evaluation.models import BUILT_IN_MODELS
from evaluation.report.runs import read_results
from evaluation.text import built_in_text


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(built_in_text()[:4000])
    sizes = ["--n_contexts=2", "--context_length=160", "--continuation_length=9"]
    return [*sizes, f"--text_file={text}", "--device=cpu", "--quiet"]


@pytest.fixture(scope="module")
def measured(checkpoint, flags):
    """What the demo measures, once for all who only look at what becomes of it."""
    config = parse_config(DemoConfig, [f"--model={checkpoint}", *flags], prog="demo", description="")
    return demo.measure(config)


def runs_of(record, dataset):
    """By press, kind and ratio; what a sample says of times left out."""
    return {
        (each["press"], each["kind"], each["compression_ratio"]): [
            {name: value for name, value in sample.items() if "seconds" not in name} for sample in each["samples"]
        ]
        for each in record["runs"]
        if ("kl" in each["samples"][0]) == (dataset == "fidelity")
    }


def test_the_demo_ends_with_a_table_answers_json_and_a_plot_and_measures_the_same_again(
    checkpoint, flags, measured, tmp_path, capsys
):
    demo.main([f"--model={checkpoint}", f"--output_dir={tmp_path / 'out'}", *flags])
    record = json.loads((tmp_path / "out" / "demo.json").read_text())

    out = capsys.readouterr().out
    for press in ("knorm", "expected_attention_head", "snapkv"):
        for kind in ("bare", "merged", "matching"):
            assert f"{press} 0.5, {kind}" in out
    assert "Merging lowered KL in" in out
    assert "Matching lowered KL in" in out
    assert "Next:" not in out

    assert record["config"]["context_length"] == 160
    assert record["versions"]["torch"]
    windows = runs_of(record, "fidelity")
    assert set(windows) == {
        (press, kind, ratio)
        for press in ("knorm", "expected_attention_head", "snapkv")
        for kind in ("bare", "merged", "matching")
        for ratio in (0.5, 0.75)
    }
    for (press, kind, ratio), samples in windows.items():
        assert len(samples) == 2
        for sample in samples:
            assert sample["cache_bytes"] == (1 - ratio) * sample["cache_bytes_full"]
        if kind != "bare":
            assert samples != windows[press, "bare", ratio]
    assert len(record["comparisons"]) == 3 * 2 * 2
    for row in record["comparisons"]:
        merged = windows[row["press"], row["kind"], row["compression_ratio"]]
        assert row["metric"] == "kl"
        assert row["merged"] == pytest.approx(sum(sample["kl"] for sample in merged) / 2)
    assert len(runs_of(record, "needle")) == 10

    image = imread(tmp_path / "out" / "demo.png")
    assert image.shape[0] > 300
    assert image.std() > 0.05

    again = json.loads(json.dumps({"runs": [demo._record(each) for each in measured[0]]}))
    for dataset in ("fidelity", "needle"):
        assert runs_of(again, dataset) == runs_of(record, dataset)


def test_the_demo_writes_beside_what_is_there(flags, measured, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "measure", lambda config: measured)
    before = {"demo.json": b"mine", "demo.png": b"mine too"}
    (tmp_path / "out").mkdir()
    for name, content in before.items():
        (tmp_path / "out" / name).write_bytes(content)
    demo.main([f"--output_dir={tmp_path / 'out'}", *flags])
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
    assert {file.name for file in (tmp_path / "out" / "1").iterdir()} == set(before)
    assert str(tmp_path / "out" / "1" / "demo.json") in capsys.readouterr().out


def test_on_the_small_model_the_last_line_leads_to_one_that_retrieves(flags, measured, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "measure", lambda config: measured)
    demo.main(["--model=smollm2", f"--output_dir={tmp_path / 'out'}", *flags])
    last = capsys.readouterr().out.splitlines()[-1]
    python, flag, package, command, *said = shlex.split(last)
    assert (python, flag, package, command) == (sys.executable, "-m", "evaluation", "demo")
    assert parse_config(DemoConfig, said, prog="demo", description="").model in BUILT_IN_MODELS


def test_answers_are_shown_as_they_were_given(tmp_path):
    for ratio, said, score in ((0.5, "3344286", 100.0), (0.75, "007", 0.0), (0.9, "", 0.0)):
        about = {"identity": "3344286", "said": said, "compression_ratio": ratio}
        write_run(tmp_path, "knorm", KnormPress(ratio), {"niah": [score]}, **about)
    question, *lines = demo.answer_lines(read_results(tmp_path).runs)
    assert question == "Needle: the context says 3344286. Asked: ?"
    assert [line.split(", bare")[1].split() for line in lines] == [["found", "3344286"], ["missed", "007"], ["missed"]]


def test_the_verdict_names_where_merging_did_worse_too():
    better, worse = {"press": "knorm", "level": "0.5", "difference": -0.1}, {"press": "snapkv", "level": "0.5"}
    worse["difference"] = 0.1
    for rows, line in (
        ([better, worse], "Merging lowered KL in 1 of 2 comparisons (knorm 0.5), and did not for snapkv 0.5."),
        ([better], "Merging lowered KL in 1 of 1 comparisons (knorm 0.5)."),
        ([worse], "Merging lowered KL in 0 of 1 comparisons, and did not for snapkv 0.5."),
    ):
        assert verdict(pd.DataFrame(rows), "Merging") == line


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_contexts": 0}, "--n_contexts must be at least 1, got 0"),
        ({"context_length": 64}, "--context_length must be at least 128, got 64"),
        ({"continuation_length": 1}, "--continuation_length must be at least 2, got 1"),
        ({"text_file": "nowhere.txt"}, "there is no file 'nowhere.txt'"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        DemoConfig(**fields)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=./nowhere"], "There is no folder './nowhere'"),
        (["--text_file={short}"], "the text has 5 tokens"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(flags, message, checkpoint, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("short")
    flags = [flag.format(short=tmp_path / "short.txt") for flag in flags]
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        demo.main([f"--model={checkpoint}", "--quiet", "--device=cpu", *flags])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
