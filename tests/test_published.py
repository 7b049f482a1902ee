# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
The tables of README and docs say what the committed results say.

Each row is worked out anew from ``evaluation/results/<name>/scores.csv``, and each report drawn anew from the runs that
are packed beside it. Where a row has to change, the failure shows what it should be.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import json
import re
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from extras import needs_extra

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
from matplotlib.image import imread
from scipy import stats

from evaluation.__main__ import main
from evaluation.gpu.show import describe, markdown
from evaluation.report.runs import Run, read_results

pytestmark = needs_extra("eval")

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "evaluation" / "results"
MODELS = {"smollm2": "SmolLM2", "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B"}
RULER = "qwen2.5-coder-0.5b"
LARGER = "qwen2.5-coder-1.5b"
PRESSES = {
    "knorm": "Knorm",
    "expected_attention_head": "ExpectedAttention",
    "keydiff": "KeyDiff",
    "snapkv": "SnapKV",
    "adakv_snapkv": "AdaKV(SnapKV)",
    "tova": "TOVA",
    "streaming_llm": "StreamingLLM",
    "kvzip": "KVzip",
}
ON_RULER = tuple(press for press in PRESSES if press != "kvzip")
"""Presses measured on RULER at four ratios."""
BY_ANSWERS = ON_RULER[:6]
"""Those measured by its own score too."""
ON_LARGER = ON_RULER[:4]
"""Those measured on RULER with the larger model too."""
ON_PEERS = ("expected_attention_head", "keydiff", "snapkv", "tova", "adakv_snapkv")
"""Those measured with the merges of others too."""
PEERS = {
    "matching": "`AttentionMatchingPress`",
    "merged": "`MergingPress`",
    "kvpress merged": "kvpress's `MergingPress`",
    "kvfold": "kvfold",
    "GRKV": "GRKV",
}
KINDS = ("merged", "matching")
LEVELS = ("0.25", "0.5", "0.75", "0.88")


@functools.cache
def task_means(name: str, metric: str) -> pd.DataFrame:
    """``scores.csv`` of a folder: a row each run and task."""
    table = pd.read_csv(RESULTS / name / "scores.csv", dtype={"level": str})
    return table[table["metric"] == metric]


@functools.cache
def means(name: str, metric: str) -> pd.DataFrame:
    """Mean over tasks of each run of a folder: columns ``benchmark``, ``press``, ``kind``, ``level`` and ``mean``."""
    table = task_means(name, metric)
    keys = ["benchmark", "press", "kind", "level"]
    return table.groupby(keys, dropna=False, sort=False)["mean"].mean().reset_index()


def mean_of(name: str, metric: str, press: str, kind: str, level: str, benchmark: str = "qwen2.5-coder-0.5b") -> float:
    """Of one run; ``benchmark`` is part of what its benchmark is called."""
    table = means(name, metric)
    table = table[table["benchmark"].str.contains(benchmark) & (table["kind"] == kind)]
    if kind != "full":
        table = table[(table["press"] == press) & (table["level"] == level)]
    assert len(table) == 1, (name, metric, press, kind, level, benchmark)
    return float(table["mean"].iloc[0])


def won_back(
    name: str, presses: Iterable[str], kind: str, levels: tuple[str, ...], benchmark: str = "qwen2.5-coder-0.5b"
) -> str:
    """Share of what eviction adds to the full cache's ``answer_nll`` that one of ours takes away again."""
    cells = list(itertools.product(presses, levels))
    bare, ours, full = (
        sum(mean_of(name, "answer_nll", press, one, level, benchmark) for press, level in cells)
        for one in ("bare", kind, "full")
    )
    return f"{100 * (bare - ours) / (bare - full):.0f} %"


def share(press: str, kind: str, level: str, model: str) -> float:
    """KL divergence from the full cache, as a share of eviction's."""
    kl = [mean_of("text-1024", "kl", press, one, level, model) for one in (kind, "bare")]
    return kl[0] / kl[1]


def shares(press: str, kind: str, levels: tuple[str, ...], model: str) -> str:
    """From the lowest to the highest."""
    all_shares = [share(press, kind, level, model) for level in levels]
    return f"{min(all_shares):.2f} to {max(all_shares):.2f}"


def levels_of(press: str) -> tuple[str, ...]:
    """Ratios at which a press was measured on text: KVzip at those where it loses something."""
    return ("0.75", "0.88", "0.94") if press == "kvzip" else LEVELS


def advice_row(press: str) -> str:
    """README, less the advice itself."""
    text = shares(press, "matching", levels_of(press), "qwen2.5-coder-0.5b")
    if press == "kvzip":
        return f"| {PRESSES[press]} | not measured | | | {text} |"
    saved = " / ".join(less_cache(press)[1:3])
    won = won_back("ruler-4096", [press], "matching", LEVELS, RULER)
    row = kept(RULER, "matching", press=press)
    return f"| {PRESSES[press]} | {saved} | {won} | {row['kept_harmed']} of {row['n_kept']} | {text} |"


def text_row(press: str, model: str) -> str:
    """docs/method.md: eviction's KL and what the rules leave of it, ratio by ratio."""
    cells = [
        f"{mean_of('text-1024', 'kl', press, 'bare', level, model):.4f}: "
        + " / ".join(f"{share(press, kind, level, model):.2f}" for kind in KINDS)
        for level in levels_of(press)
    ]
    name = f"KVzip, {MODELS[model]}" if press == "kvzip" else PRESSES[press]
    return f"| {name} | {' | '.join(cells)} |"


def larger_row(press: str) -> str:
    """docs/method.md: the larger model's negative log-likelihood, eviction's and matching's, and what is won back."""
    cells = []
    for level in LEVELS[1:3]:
        nll = {kind: mean_of("ruler-4096", "answer_nll", press, kind, level, LARGER) for kind in ("bare", "matching")}
        won = won_back("ruler-4096", [press], "matching", (level,), LARGER)
        cells.append(f"{nll['bare']:.2f} → {nll['matching']:.2f} ({won})")
    return f"| {PRESSES[press]} | {' | '.join(cells)} |"


def ruler_row(press: str) -> str:
    """docs/method.md: the answers' negative log-likelihood over RULER's tasks, bare, merging and matching."""
    cells = [
        " / ".join(f"{mean_of('ruler-4096', 'answer_nll', press, kind, level, RULER):.2f}" for kind in ("bare", *KINDS))
        for level in LEVELS
    ]
    return f"| {PRESSES[press]} | {' | '.join(cells)} |"


def less_cache(press: str) -> list[str]:
    """How much less cache matching takes for eviction's likelihood, ratio by ratio."""
    table = pd.read_csv(RESULTS / "ruler-4096" / "equal_quality.csv", dtype={"level": str}).fillna({"says": ""})
    table = table[table["benchmark"].str.contains(RULER) & (table["press"] == press) & (table["kind"] == "matching")]
    rows = table.set_index("level")
    return [saved_share(rows.loc[level]) for level in LEVELS]


def saved_share(row: pd.Series) -> str:
    """In per cent; in words where eviction's curve does not have that likelihood."""
    if row["says"]:
        return str(row["says"])
    return f"{round(100 * row['saved']) + 0.0:.0f} %"  # + 0.0, so that nothing is not -0.


def cache_row(press: str) -> str:
    """docs/method.md."""
    return f"| {PRESSES[press]} | {' | '.join(less_cache(press))} |"


def kept(benchmark: str, kind: str, name: str = "ruler-4096", **part: str) -> dict[str, Any]:
    """What a rule does to the answers that eviction kept and lost: all, or those of one press, level or task."""
    table = pd.read_csv(RESULTS / name / "kept.csv", dtype={"level": str})
    table = table[table["benchmark"].str.contains(benchmark) & (table["kind"] == kind)]
    for column in ("press", "level", "task"):
        table = table[table[column] == part.get(column, "all")]
    (row,) = table.to_dict("records")
    return row


def kept_row(benchmark: str, kind: str) -> str:
    """docs/method.md."""
    row = kept(benchmark, kind)
    cells = [
        f"{row['n_kept']:,}",
        f"{row['kept_change']:+.3f} ({row['kept_low']:+.3f} .. {row['kept_high']:+.3f})",
        f"{row['kept_harmed']} ({100 * row['kept_harmed'] / row['n_kept']:.1f} %)",
        f"{row['n_lost']:,}",
        f"{100 * row['won_back']:.1f} % ({100 * row['won_low']:.1f} .. {100 * row['won_high']:.1f})",
        f"{row['lost_harmed']} ({100 * row['lost_harmed'] / row['n_lost']:.1f} %)",
    ]
    name = "merging" if kind == "merged" else kind
    return f"| {re.search(r'coder-([0-9.]+b)', benchmark)[1].upper()}, {name} | {' | '.join(cells)} |"


def peer_row(kind: str) -> str:
    """docs/related.md: what a rule wins back for each press, and what it does to answers that eviction kept."""
    presses = [press for press in ON_PEERS if kind != "kvpress merged" or press != "adakv_snapkv"]
    cells = [won_back("peers-4096", [press], kind, LEVELS[1:3]) if press in presses else "" for press in ON_PEERS]
    row = kept("qwen2.5-coder-0.5b", kind, name="peers-4096")
    won = won_back("peers-4096", presses, kind, LEVELS[1:3])
    return f"| {PEERS[kind]} | {' | '.join(cells)} | {won} | {row['kept_harmed']} of {row['n_kept']} |"


def unpack(name: str, folder: Path) -> Path:
    """Put the runs that are packed beside a report into a folder, and return it."""
    with tarfile.open(RESULTS / name / "runs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def runs_of(name: str) -> list[Run]:
    """The runs that are packed beside a report."""
    with tempfile.TemporaryDirectory() as folder:
        return read_results(unpack(name, Path(folder))).runs


@functools.cache
def answers() -> pd.DataFrame:
    """All answers, one a row: ``string_match`` is what it names of what it should, in per cent."""
    tables = [
        run.scores[["string_match"]].assign(task=run.predictions["task"], press=run.press, kind=run.kind)
        for run in runs_of("ruler-4096-answers")
    ]
    return pd.concat(tables).reset_index()


def n_answers(table: pd.DataFrame) -> int:
    """How many each of eviction and matching gave."""
    (n,) = set(table["kind"].value_counts()[["bare", "matching"]])
    return n


def right(table: pd.DataFrame) -> list[float]:
    """What is named of what should be, in per cent: with eviction, with matching, and with the full cache."""
    return table.groupby("kind")["string_match"].mean().reindex(["bare", "matching", "full"]).tolist()


def gain(table: pd.DataFrame) -> tuple[str, int, float]:
    """Points that matching gains, with their standard error; over how many samples; and Wilcoxon's p."""
    scores = table.pivot_table(index=["task", "sample"], columns="kind", values="string_match")
    points = scores["matching"] - scores["bare"]
    return f"{points.mean():.1f} ± {points.sem():.1f}", len(points), stats.wilcoxon(points[points != 0]).pvalue


def p_is(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.1g}"


def score_row(press: str) -> str:
    """docs/method.md: RULER's score at 0.5."""
    table = answers()
    table = table[table["press"] == press]
    bare, matched, _ = right(table)
    return f"| {PRESSES[press]} | {bare:.1f} | {matched:.1f} | {gain(table)[0]} |"


def layer_row(k_len: int) -> str:
    """docs/speed.md: time and memory of one layer."""
    figures = json.loads((RESULTS / "speed" / "layers.json").read_text(encoding="utf-8"))
    rows = {row["subject"]: row for row in figures["layers"] if row["k_len"] == k_len}
    theirs, merging, matching = (rows[name] for name in ("kvpress", "ours", "matching"))
    times = [f"{theirs['median_seconds']:.2f} s"]
    times += [f"{row['median_seconds']:.2f} s ({row['time_to_kvpress']:.2f})" for row in (merging, matching)]
    memory = [f"{theirs['extra_bytes'] / 1e6:,.0f} MB"]
    memory += [f"{row['extra_bytes'] / 1e6:,.0f} MB ({row['memory_to_kvpress']:.3f})" for row in (merging, matching)]
    return f"| {k_len:,} | {' | '.join(times)} | {' | '.join(memory)} |"


def prefill_row(press: str) -> str:
    """docs/speed.md: what ours add to a prefill."""
    figures = json.loads((RESULTS / "speed" / "prefill-1024.json").read_text(encoding="utf-8"))
    (row,) = (row for row in figures["prefills"] if row["press"] == press)
    return f"| {PRESSES[press]} | {row['overhead']['merged']:+.0%} | {row['overhead']['matched']:+.0%} |"


def test_what_gpus_were_measured_to_do_is_in_the_docs_and_where_none_was_they_say_so():
    """docs/speed.md has the lines with a bar of each run that is committed; the rest is in its gpu.md."""
    page, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/speed.md", "README.md"))
    files = sorted((RESULTS / "gpu").rglob("*.json"))
    for text in (page, readme):
        assert ("no gpu has been measured" in " ".join(text.lower().split())) == (not files)
    for file in files:
        figures = json.loads(file.read_text(encoding="utf-8"))
        assert not figures["arguments"]["quick"], f"{file} is of a rehearsal"
        assert file.with_suffix(".md").read_text(encoding="utf-8") == markdown(figures)
        table = markdown(figures, bars_alone=True)
        assert figures["machine"]["name"] in page
        assert table in page, f"docs/speed.md should have:\n\n{describe(figures)}\n\n{table}"


ROWS = [
    *(("README.md", functools.partial(advice_row, press)) for press in PRESSES),
    *(("docs/method.md", functools.partial(text_row, press, model)) for model in MODELS for press in PRESSES),
    *(("docs/method.md", functools.partial(ruler_row, press)) for press in ON_RULER),
    *(("docs/method.md", functools.partial(larger_row, press)) for press in ON_LARGER),
    *(("docs/method.md", functools.partial(cache_row, press)) for press in ON_RULER),
    *(("docs/method.md", functools.partial(kept_row, RULER, kind)) for kind in KINDS),
    ("docs/method.md", functools.partial(kept_row, LARGER, "matching")),
    *(("docs/related.md", functools.partial(peer_row, kind)) for kind in PEERS),
    *(("docs/method.md", functools.partial(score_row, press)) for press in BY_ANSWERS),
    *(("docs/speed.md", functools.partial(layer_row, k_len)) for k_len in (8192, 16384, 32768)),
    *(("docs/speed.md", functools.partial(prefill_row, press)) for press in ("knorm", "snapkv", "adakv_snapkv")),
]


@pytest.mark.parametrize(("file", "row"), ROWS, ids=lambda part: part if isinstance(part, str) else str(part.args))
def test_a_row_of_a_table_says_what_was_measured(file, row):
    expected, lines = row(), (ROOT / file).read_text(encoding="utf-8").splitlines()
    assert any(line.startswith(expected) for line in lines), f"{file} lacks the row {expected}"


def comparisons(name: str, kind: str, benchmark: str, *, by_task: bool = False) -> pd.DataFrame:
    """A kind's comparisons with its bare presses: of all tasks together, or of each."""
    table = pd.read_csv(RESULTS / name / "comparisons.csv")
    table = table[table["benchmark"].str.contains(benchmark, regex=False) & (table["kind"] == kind)]
    if "all tasks" in set(table["task"]):
        table = table[(table["task"] != "all tasks") == by_task]
    return table


def verdicts(name: str, kind: str, benchmark: str, *, by_task: bool = False) -> tuple[int, int, int]:
    """Of these comparisons, how many there are, are better, and are worse."""
    table = comparisons(name, kind, benchmark, by_task=by_task)
    return len(table), *((table["verdict"] == verdict).sum() for verdict in ("better", "worse"))


def caption() -> str:
    """README, below the picture."""
    n, better, worse = verdicts("ruler-4096", "matching", RULER)
    _, merging_better, merging_worse = verdicts("ruler-4096", "merged", RULER)
    return (
        f"Matching is better in {better} of these {n} cells and worse in {worse}, merging better in {merging_better} "
        f"and worse in {merging_worse} (p < 0.05)."
    )


def ruler_sentence() -> str:
    n, better, worse = verdicts("ruler-4096", "matching", RULER)
    _, merging_better, merging_worse = verdicts("ruler-4096", "merged", RULER)
    matching, merging = (won_back("ruler-4096", ON_RULER, kind, LEVELS, RULER) for kind in ("matching", "merged"))
    return (
        f"Over all {n} cells, matching wins back {matching} of what eviction adds and merging {merging}; at p < 0.05 "
        f"matching is better in {better} and worse in {worse}, merging better in {merging_better} and worse in "
        f"{merging_worse}."
    )


def ruler_tasks_sentence() -> str:
    table = comparisons("ruler-4096", "matching", RULER, by_task=True)
    return (
        f"By more than its interval it is worse in {(table['low'] > 0).sum()} of the {len(table)} pairs of task and "
        f"cell, better in {(table['high'] < 0).sum()}."
    )


def larger_sentence() -> str:
    n, better, worse = verdicts("ruler-4096", "matching", "1.5b")
    won = won_back("ruler-4096", ON_LARGER, "matching", LEVELS[1:3], LARGER)
    return f"matching wins back {won} over all, is better in {better} of {n} cells and worse in {worse}."


def scores_sentence() -> str:
    table = answers()
    bare, matched, full = right(table)
    points, n_samples, p = gain(table)
    return (
        f"Over these {n_answers(table)} answers it is {bare:.1f} with eviction and {matched:.1f} with matching, "
        f"{points} points more over the {n_samples} samples (Wilcoxon, {p_is(p)}), and {full:.1f} with the full cache."
    )


def readme_scores_sentence() -> str:
    bare, matched, full = right(answers())
    return f"the model scores {bare:.1f} with eviction, {matched:.1f} with matching and {full:.1f} with the full cache"


def kept_sentence() -> str:
    small, large = (kept(benchmark, "matching") for benchmark in (RULER, LARGER))
    return (
        f"of {small['n_kept']:,} answers that eviction had kept, matching makes {small['kept_harmed']} worse by more "
        f"than 0.3 nats a token; on the 1.5B model {large['kept_harmed']} of {large['n_kept']}. Of these, "
        f"{brought_back(RULER)[0]} and {brought_back(LARGER)[0]} are answers that eviction had made likelier than the "
        "full cache has them"
    )


def brought_back(benchmark: str) -> tuple[int, int]:
    """How many harmed answers end within 0.3 nats of the full cache's, and how many there are."""
    table = pd.read_csv(RESULTS / "ruler-4096" / "harmed.csv")
    table = table[table["benchmark"].str.contains(benchmark) & (table["kind"] == "matching")]
    return int((table["merged"] - table["full"] < 0.3).sum()), len(table)


def harmed_sentence() -> str:
    (small, n_small), (large, n_large) = map(brought_back, (RULER, LARGER))
    return (
        f"{small} of the {n_small} harmed answers of the 0.5B model, and {large} of the {n_large} of "
        "the 1.5B model, are such as eviction had made likelier than the full cache has them: matching brings them "
        "back to within 0.3 nats of that."
    )


def by_ratio_sentence() -> str:
    rows = [kept(RULER, "matching", level=level) for level in LEVELS]
    won = [f"{100 * row['won_back']:.0f}" for row in rows]
    harmed = [f"{row['kept_harmed']} of {row['n_kept']}" for row in rows]
    return (
        f"By ratio {', '.join(won[:3])} and {won[3]} % of what was lost is won back, and {', '.join(harmed[:3])} and "
        f"{harmed[3]} kept answers are harmed."
    )


def least_sentence() -> str:
    needles = [100 * kept(RULER, "matching", task=f"niah_multikey_{n}")["won_back"] for n in (2, 3)]
    every = won_back("ruler-4096", ["expected_attention_head"], "matching", LEVELS, RULER)
    lost = 100 * kept(RULER, "matching", press="expected_attention_head")["won_back"]
    return (
        f"Least comes back where a text is all needles: {needles[0]:.0f} % of what niah_multikey_2 lost and "
        f"{needles[1]:.0f} % of niah_multikey_3. With ExpectedAttention {every} comes back over all tasks and "
        f"{lost:.0f} % without the list of common words (cwe)"
    )


def ahead_sentence() -> str:
    """docs/related.md: matching against each of the others, sample by sample, over the cells that both have."""
    runs = runs_of("peers-4096")
    table = pd.DataFrame({(run.kind, run.press, run.level): run.predictions["answer_nll"] for run in runs})
    told = []
    for kind in PEERS:
        if kind == "matching":
            continue
        theirs = table[kind]
        nats = (theirs - table["matching"][theirs.columns]).mean(axis=1)
        told.append(f"{nats.mean():.2f} ({p_is(stats.wilcoxon(nats).pvalue)})")
    return (
        f"Sample by sample, over the cells that both have, answers are likelier with matching than with `MergingPress` "
        f"by {told[0]} nats, than with kvpress's by {told[1]}, than with kvfold by {told[2]} and than with GRKV by "
        f"{told[3]} (Wilcoxon, {len(table)} samples)."
    )


def peers_sentence() -> str:
    """docs/related.md: for how many pairs of press and ratio each rule is better and worse than eviction."""
    told = []
    for kind, name in list(PEERS.items())[2:]:
        n, better, worse = verdicts("peers-4096", kind, "qwen2.5-coder-0.5b")
        told.append(f"{name} {better} and {worse} of {n}")
    n, better, worse = verdicts("peers-4096", "matching", "qwen2.5-coder-0.5b")
    others = ", ".join(told)
    return f"At p < 0.05 matching is better than eviction in {better} and worse in {worse} of {n} cells, {others}."


def text_sentence() -> str:
    every = {
        model: [share(press, "matching", level, model) for press in PRESSES for level in levels_of(press)]
        for model in MODELS
    }
    n, better, worse = verdicts("text-1024", "matching", "fidelity")
    assert max(itertools.chain(*every.values())) < 1
    return (
        f"Matching is below eviction in each of these {sum(map(len, every.values()))} cells: "
        f"{np.mean(every['qwen2.5-coder-0.5b']):.2f} of it on average with Qwen2.5-Coder-0.5B, "
        f"{np.mean(every['smollm2']):.2f} with SmolLM2. Of {n} comparisons (four metrics), {better} are better at "
        f"p < 0.05 and {worse} worse"
    )


SENTENCES = [
    ("README.md", caption),
    ("README.md", readme_scores_sentence),
    ("README.md", kept_sentence),
    ("docs/related.md", peers_sentence),
    ("docs/related.md", ahead_sentence),
    ("docs/method.md", harmed_sentence),
    ("docs/method.md", by_ratio_sentence),
    ("docs/method.md", least_sentence),
    ("docs/method.md", ruler_sentence),
    ("docs/method.md", ruler_tasks_sentence),
    ("docs/method.md", larger_sentence),
    ("docs/method.md", scores_sentence),
    ("docs/method.md", text_sentence),
]


@pytest.mark.parametrize(("file", "sentence"), SENTENCES)
def test_a_sentence_says_what_was_measured(file, sentence):
    words = " ".join((ROOT / file).read_text(encoding="utf-8").split())
    assert sentence() in words, f"{file} lacks: {sentence()}"


def test_kept_and_lost_is_what_plain_loops_over_the_runs_say():
    """Common words alone are an answer that the full cache does not have, so that leaving them out says the same."""
    likelihoods: dict[tuple, dict[int, float]] = {}
    for run in runs_of("ruler-4096"):
        key = (run.config["model"], run.config["n_samples"])
        asked = run.predictions["task"] != "cwe"
        place = (*key, "full") if run.kind == "full" else (*key, run.kind, run.press, run.level)
        likelihoods[place] = run.predictions.loc[asked, "answer_nll"].to_dict()
    sums: dict[tuple, np.ndarray] = {}
    for (*key, kind, press, level), ours in (item for item in likelihoods.items() if item[0][2] in KINDS):
        full, bare = likelihoods[(*key, "full")], likelihoods[(*key, "bare", press, level)]
        for sample, nll in ours.items():
            rise, lost = nll - bare[sample], bare[sample] - full[sample]
            numbers = np.array([1, rise > 0.3, rise, lost])
            place = (f"{key[0]}, n_samples={key[1]}", kind, "kept" if lost < 0.1 else "lost")
            sums[place] = sums.get(place, 0) + numbers
    table = pd.read_csv(RESULTS / "ruler-4096" / "kept.csv")
    n_compared = 0
    for _, row in table.drop_duplicates(["benchmark", "kind"]).iterrows():
        of_all = row["benchmark"].removeprefix("ruler-synthetic, 4096, "), row["kind"]
        n_kept, harmed, rise, _ = sums[(*of_all, "kept")]
        assert (row["n_kept"], row["kept_harmed"], row["kept_change"]) == pytest.approx((n_kept, harmed, rise / n_kept))
        n_lost, harmed, rise, lost = sums[(*of_all, "lost")]
        assert (row["n_lost"], row["lost_harmed"], row["won_back"]) == pytest.approx((n_lost, harmed, -rise / lost))
        n_compared += 1
    assert n_compared == len({place[:2] for place in sums}) == 3


def pages() -> list:
    """The page that is drawn fastest, and the others, each of which takes half a minute and more."""
    by_size = sorted(RESULTS.glob("*/index.html"), key=lambda page: page.stat().st_size)
    return [by_size[0], *(pytest.param(page, marks=pytest.mark.long) for page in by_size[1:])]


def versions_that_drew(page: Path) -> dict[str, str]:
    found = re.findall(r"report: (\S+?)</th><td[^>]*>([^<]*)<", page.read_text(encoding="utf-8"))
    return {name: version for name, version in found if name in ("matplotlib", "pandas", "scipy")}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.parent.name)
def test_a_committed_report_is_what_its_runs_give_to_the_byte(page, tmp_path):
    drawn_by = versions_that_drew(page)
    assert len(drawn_by) == 3
    if any(importlib.metadata.version(name) != version for name, version in drawn_by.items()):
        pytest.skip(f"drawn with {drawn_by}")
    runs = unpack(page.parent.name, tmp_path / "runs")
    main(["report", str(runs), "--output_dir", str(tmp_path / "report")])
    for file in page.parent.iterdir():
        drawn = tmp_path / "report" / file.name
        if file.suffix == ".csv":  # all digits, of which the last are the processor's
            pd.testing.assert_frame_equal(pd.read_csv(file), pd.read_csv(drawn), rtol=1e-9)
        elif file.suffix == ".png":  # how its pixels are packed is Pillow's
            assert np.array_equal(imread(file), imread(drawn)), file.name
        elif file.name != "runs.tar.xz":
            assert file.read_bytes() == drawn.read_bytes(), file.name
