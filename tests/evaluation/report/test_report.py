# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""A report on a folder of runs: what is read and written, and what the page shows."""

import io
import json
import re
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import browser
import numpy as np
import pandas as pd
import pytest
import yaml
from kvpress import KnormPress, SnapKVPress
from run_folders import write_run

from evaluation.__main__ import main
from evaluation.config import EvaluationConfig
from evaluation.evaluate import run
from evaluation.report.plots import Styles, plot_heat_map, plot_lines
from evaluation.report.summary import summarize, verdict_on
from evaluation.report.tables import as_markdown
from evaluation.report.write import MARKER
from kvpress_merging import MergingPress

HOSTILE = "</script><img src=x onerror=\"window.hacked=1\">|$x_y$ & 'q'"


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A small sweep: two presses, two ratios, two tasks (one with a hostile name) and fidelity."""
    root = tmp_path_factory.mktemp("results")
    generator = np.random.default_rng(0)

    def draw(rate):
        return {task: (100.0 * (generator.uniform(size=8) < rate)).tolist() for task in ("niah", HOSTILE)}

    write_run(root, "no_press", None, draw(1))
    write_run(root, "no_press", None, [0.0] * 8)
    for name, press in (("knorm", KnormPress), ("snapkv", SnapKVPress)):
        for ratio in (0.25, 0.75):
            kl = generator.uniform(0.1, 0.2, size=8)
            settings = {"compression_ratio": ratio}
            write_run(root, name, press(ratio), draw(1 - ratio), **settings)
            write_run(root, f"merging_{name}", MergingPress(press(ratio)), draw(1.1 - ratio), **settings)
            write_run(root, name, press(ratio), kl.tolist(), **settings)
            write_run(root, f"merging_{name}", MergingPress(press(ratio)), (kl * 0.9).tolist(), **settings)
    reference = {"press_name": "knorm", "dataset": "ruler-synthetic", "data_dir": "1024", "model": "smollm2"}
    rows = [
        {**reference, "compression_ratio": 0.5, "score": 77.7, "source": "https://example.org/board"},
        {**reference, "model": "other", "compression_ratio": 0.5, "score": 66.6, "source": "javascript:alert(1)"},
    ]
    (root / "sweep.yaml").write_text(yaml.safe_dump({"presses": ["knorm"], "reference": rows}))
    (root / "errors").mkdir()
    error = {"cell": "broken cell", "config": {}, "error": f"OSError: {HOSTILE}", "traceback": "Traceback: it broke"}
    (root / "errors" / "broken.json").write_text(json.dumps(error))
    return root


@pytest.fixture(scope="module")
def report(results) -> Path:
    main(["report", str(results), "--output_dir", str(results.parent / "first report")])
    return results.parent / "first report"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: None, "there are no results"),
        (lambda root: (root / "sweep.yaml").write_text("reference: [{score: x}]") and keep(root), "sweep.yaml"),
        (lambda root: (keep(root) / "predictions.csv").write_text("a,b\n1,2\n"), "lacks the columns sample and task"),
        (lambda root: (keep(root) / "metrics.json").write_text("{"), "is not a run that can be read"),
        (lambda root: (keep(root) / "config.yaml").write_text("- 1"), "config.yaml lacks"),
        (lambda root: (keep(root), (root / "errors").mkdir(), (root / "errors/a.json").write_text("[")), "a.json"),
        (
            lambda root: (keep(root), (root / "report").mkdir(), (root / "report/mine").touch()),
            "holds what is no report",
        ),
        (lambda root: (keep(root), (root / "report").touch()), "is not a folder"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_leaves_nothing(spoil, message, tmp_path, capsys):
    spoil(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit_info:
        main(["report", str(tmp_path)])
    assert exit_info.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("python -m evaluation report: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def keep(root):
    """A run, so that there is one."""
    return write_run(root, "knorm", KnormPress(0.5), {"qa": [0.0]})


def test_a_report_of_bare_runs_alone_says_that_there_is_nothing_to_compare(tmp_path, capsys):
    keep(tmp_path)
    main(["report", str(tmp_path)])
    assert "no merged run with a bare run" in capsys.readouterr().out
    assert (tmp_path / "report" / "index.html").is_file()


def test_a_report_is_replaced_but_nothing_else_is(results, tmp_path, capsys):
    folder = tmp_path / "report"
    folder.mkdir()  # an empty one is taken
    main(["report", str(results), "--output_dir", str(folder)])
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    main(["report", str(results), "--output_dir", str(folder)])
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == first
    assert [place.name for place in tmp_path.iterdir()] == ["report"]
    (folder / "mine.txt").touch()
    with pytest.raises(SystemExit):
        main(["report", str(results), "--output_dir", str(folder)])
    assert "mine.txt" in capsys.readouterr().err
    assert (folder / "mine.txt").exists()
    (folder / "mine.txt").unlink()
    (folder / "README.md").write_text("with a word of mine")
    with pytest.raises(SystemExit):
        main(["report", str(results), "--output_dir", str(folder)])
    assert f"{folder / 'README.md'} has been changed since it was written" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "with a word of mine"


# What a report holds.


def test_what_runs_write_is_what_a_report_reads(model, tokenizer, tmp_path, capsys):
    settings = {"n_samples": 2, "quiet": True, "output_dir": tmp_path / "results"}
    for name in ("no_press", "snapkv", "merging_snapkv"):
        for more in (
            {"data_dir": "400", "max_new_tokens": 2, "tasks": ["niah_single_1", "vt"]},
            {"data_dir": "200", "dataset": "fidelity", "continuation_length": 9},
        ):
            run(EvaluationConfig(press_name=name, **settings, **more), model, tokenizer)
    main(["report", str(tmp_path / "results")])
    table = pd.read_csv(tmp_path / "results" / "report" / "comparisons.csv")
    assert table["metric"].value_counts().to_dict() == {
        "string_match": 3, "answer_nll": 3, "kl": 1, "nll_increase": 1, "top1_agreement": 1, "attention_error": 1,
    }  # fmt: skip
    kl = table.set_index("metric").loc["kl"]
    folders = {
        name: next((tmp_path / "results").glob(f"fidelity*__{name}__*")) for name in ("snapkv", "merging_snapkv")
    }
    bare, merged = (json.loads((folder / "metrics.json").read_text())["fidelity"]["kl"] for folder in folders.values())
    assert (kl["bare"], kl["merged"], kl["difference"]) == pytest.approx((bare, merged, merged - bare))
    assert "Note" not in capsys.readouterr().out


def test_the_verdict_tells_merging_and_matching_apart():
    rows = [("merged", "better"), ("merged, merge_fraction=0.5", "no difference shown"), ("matching", "worse")]
    sentence = verdict_on(pd.DataFrame(rows, columns=["kind", "verdict"]))
    assert "merged is better in 1 and worse in 0 of 2, matching is better in 0 and worse in 1 of 1 comp" in sentence


def test_several_questions_about_a_context_have_a_table_by_turn(tmp_path):
    scores = {"niah_multivalue": [0, 100, 50, 50, 0, 0]}
    for name, press in (("knorm", KnormPress(0.5)), ("merging_knorm", MergingPress(KnormPress(0.5)))):
        write_run(tmp_path, name, press, scores, n_questions=2)
    main(["report", str(tmp_path)])
    turns = pd.read_csv(tmp_path / "report" / "turns.csv")
    assert turns["kind"].tolist() == ["bare", "bare", "merged", "merged"]
    assert turns["turn"].tolist() == [1, 2] * 2
    assert turns["mean"].tolist() == pytest.approx([50 / 3, 50] * 2)
    assert (turns["n_samples"] == 3).all()
    assert ((turns["low"] <= turns["mean"]) & (turns["mean"] <= turns["high"])).all()
    assert "Means of each run, metric and turn" in (tmp_path / "report" / "index.html").read_text()


def test_without_several_questions_there_is_no_table_by_turn(tmp_path):
    write_run(tmp_path, "knorm", KnormPress(0.5), {"vt": [0, 100]})
    main(["report", str(tmp_path)])
    assert not (tmp_path / "report" / "turns.csv").exists()
    assert "By turn" not in (tmp_path / "report" / "index.html").read_text()


def test_what_a_heat_map_says_of_its_colours_is_not_cut_off():
    rows = [
        {"press": press, "kind": "merged", "level": str(ratio), "compression_ratio": ratio, "task": "fidelity"}
        for press in ("expected_attention_head", "knorm")
        for ratio in (0.25, 0.5, 0.75)
    ]
    table = pd.DataFrame(rows).assign(difference=0.1, p_holm=1.0, direction="lower is better")
    figure = plot_heat_map(table, "KL from the full cache, nats ↓, merged minus bare")
    figure.savefig(io.BytesIO())
    label = next(axes.xaxis.label for axes in figure.axes if "blue is better" in axes.get_xlabel())
    extent = label.get_window_extent()
    assert figure.bbox.x0 <= extent.x0 < extent.x1 <= figure.bbox.x1


def test_rulers_picture_is_a_panel_a_press_with_intervals_of_the_mean_of_tasks():
    points = [
        (press, kind, ratio, value, value - 5, value + 5)
        for press, value in (("knorm", 40.0), ("snapkv", 60.0))
        for kind in ("bare", "merged", "matching")
        for ratio in (0.25, 0.5)
    ]
    table = pd.DataFrame(points, columns=["press", "kind", "ratio", "value", "low", "high"])
    references = [{"press": press, "compression_ratio": 0.5, "score": 50} for press in ("snapkv", "tova")]
    styles = Styles(["knorm", "snapkv"], ["bare", "merged", "matching"])
    figure = plot_lines(table, styles, "score", full=90.0, references=references, panels=True)
    knorm, snapkv = (axes for axes in figure.axes if axes.get_visible())
    assert (knorm.get_title(), snapkv.get_title()) == ("knorm", "snapkv")
    # The full cache, three kinds, and the press's own published score.
    assert (len(knorm.lines), len(snapkv.lines)) == (4, 5)
    for axes, value in ((knorm, 40), (snapkv, 60)):
        for band in axes.collections:
            ends = band.get_paths()[0].vertices[:, 1]
            assert (ends.min(), ends.max()) == (value - 5, value + 5)
        assert len(axes.collections) == 3


def test_a_report_has_tables_plots_and_a_page(report):
    names = {file.name for file in report.iterdir()}
    assert {"comparisons.csv", "README.md", "scores.csv", "index.html", MARKER} <= names
    for dataset in ("fidelity", "ruler-synthetic"):
        for plot in ("scores", "times", "cache", "differences"):
            assert sum(dataset in name and plot in name for name in names) == 2  # PNG and SVG
    for file in report.glob("*.svg"):
        xml.etree.ElementTree.parse(file)
    for file in report.glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG")
    assert (report / "index.html").stat().st_size < 600_000
    table = pd.read_csv(report / "comparisons.csv")
    assert len(table) == 4 * 3 + 4 * 4  # two tasks and all of them; four metrics
    scores = pd.read_csv(report / "scores.csv")
    assert len(scores) == 9 * 2 + 9 * 4
    assert len(pd.read_csv(report / "equal_quality.csv")) == 4 + 4 * 4  # in each metric
    assert not (report / "kept.csv").exists()  # no likelihood was measured


def test_the_markdown_page_shows_what_the_page_does_where_html_is_shown_as_source(report):
    text = (report / "README.md").read_text()
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert sorted(pictures) == sorted(file.name for file in report.glob("*.png"))
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| press"))]
    table, equal = (pd.read_csv(report / f"{name}.csv") for name in ("comparisons", "equal_quality"))
    n_compared = len(table.groupby(["benchmark", "press", "kind", "level", "metric"]))
    assert len(rows) == n_compared + equal["metric"].isin(["kl", "string_match"]).sum()
    assert verdict_on(summarize(table)) in text


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_hostile_names_are_text_and_nothing_else(report):
    page = (report / "index.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert [tag for tag, _ in tags.tags].count("script") == 1
    assert not any(tag in ("img", "iframe", "object", "base") for tag, _ in tags.tags)
    assert not any(name.startswith("on") for _, attributes in tags.tags for name in attributes)
    links = [attributes["href"] for tag, attributes in tags.tags if tag == "a"]
    assert "https://example.org/board" in links
    assert all(link.startswith(("https://", "#")) for link in links)
    assert "&lt;/script&gt;" in page
    assert "<img" not in (report / "README.md").read_text()
    for file in report.glob("*.svg"):
        assert not list(xml.etree.ElementTree.parse(file).iter("img"))


def test_a_markdown_row_has_as_many_cells_as_its_head():
    table = pd.DataFrame({"task": ["a|b\nc"], "difference": [0.5], "p": [0.0001]})
    lines = as_markdown(table).splitlines()
    assert lines[2] == r"| a\|b c | +0.5000 | &lt;0.001 |"


def test_the_page_says_what_made_it_what_failed_and_what_is_published(report):
    page = (report / "index.html").read_text()
    for text in ("report: scipy", "runs: kvpress-merging", "broken cell", "Traceback: it broke", "77.7", "66.6"):
        assert text in page
    assert "press_init_command" in page


# In a browser.

needs_browser = pytest.mark.skipif(
    browser.BROWSER is None or browser.DRIVER is None,
    reason="no browser: apt-get install chromium chromium-driver",
)


def sort_key(text):
    try:
        return (0, float(text), "")
    except ValueError:
        return (1, 0.0, text)


@needs_browser
@pytest.mark.parametrize(("width", "height"), [(360, 740), (1280, 900)])
def test_in_a_browser_the_page_fits_sorts_and_asks_the_network_for_nothing(report, width, height, tmp_path):
    seen = browser.browse(report / "index.html", width, height, screenshot=tmp_path / "page.png")
    assert seen["innerWidth"] == width
    assert max(seen["scrollWidth"]) <= width  # with details closed and open
    assert seen["outside"] == []
    assert seen["smallest_text"] >= 12
    assert seen["console"] == []
    assert seen["requests"] == [(report / "index.html").as_uri()]
    assert (seen["scripts"], seen["images"], seen["handlers"], seen["hacked"]) == (1, 0, 0, False)
    assert HOSTILE.split("|")[0] in seen["text"]
    assert seen["repeated_ids"] == seen["dangling"] == []
    assert len(seen["svg_sizes"]) == 8
    assert min(seen["svg_sizes"]) > 0.7 * min(width, 400)
    assert len(seen["tables"]) >= 6
    for table in seen["tables"]:
        assert table["caption"]
        assert table["row_scopes"] == ["row"]
        for column in table["columns"]:
            assert (column["scope"], column["focusable"]) == ("col", 0)
            (up, ascending, n_marked), (down, descending, _) = column["first"], column["second"]
            assert (up, down, n_marked) == ("ascending", "descending", 1)
            filled = [text for text in ascending if text]
            if all(sort_key(text)[0] == 0 for text in filled):
                assert [sort_key(text) for text in filled] == sorted(map(sort_key, filled))
                assert [sort_key(text) for text in descending if text] == sorted(map(sort_key, filled), reverse=True)
            assert ascending == filled + [""] * (len(ascending) - len(filled))  # what is missing comes last
            assert sorted(ascending) == sorted(descending)
    assert (tmp_path / "page.png").stat().st_size > 5000


@needs_browser
def test_in_a_browser_that_prefers_dark_the_page_is_dark(report):
    ink, paper = (
        [int(number) for number in re.findall(r"\d+", colour)][:3]
        for colour in browser.browse(report / "index.html", 360, 740, dark=True)["colours"]
    )
    assert max(paper) < 60
    assert min(ink) > 200
