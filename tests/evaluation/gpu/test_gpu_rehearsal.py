# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m evaluation gpu --quick``: a rehearsal without a GPU and without what a GPU's machine may lack."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch

from evaluation import gpu
from evaluation.gpu import cost
from evaluation.gpu.bench import QUICK
from evaluation.gpu.plot import plot
from evaluation.gpu.show import has_failed, lines, markdown

ROOT = Path(__file__).parents[3]
PRESSES = ("knorm", "snapkv", "adakv_snapkv", "expected_attention")
NOT_NEEDED = (
    "matplotlib",
    "rich",
    "psutil",
    "scipy",
    "gguf",
    "ray",
    "jinja2",
    "thefuzz",
    "rouge",
    "triton",
    "hypothesis",
)
"""None of these comes with torch, transformers or kvpress."""

REHEARSAL = f"""
import sys
sys.modules.update(dict.fromkeys({NOT_NEEDED}))
from evaluation.__main__ import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """What it printed, the CPU time that it took, the folder that it wrote, and the figures in it."""
    folder = tmp_path_factory.mktemp("gpu") / "deeper"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", REHEARSAL, "gpu", "--quick", "--output_dir", str(folder)],
        capture_output=True,
        text=True,
        env=env,
        cwd=folder.parent,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, seconds, folder, json.loads((folder / "gpu.json").read_text())


def of_part(figures: dict, part: str, **fields: object) -> list[dict]:
    rows = [row for row in figures["rows"] if row["part"] == part]
    return [row for row in rows if all(row.get(name) == value for name, value in fields.items())]


def test_a_rehearsal_takes_less_than_a_minute_of_one_core(rehearsal):
    assert rehearsal[1] < 60


def test_all_parts_are_there_and_nothing_is_left_out_without_a_word(rehearsal):
    figures = rehearsal[3]
    assert figures["status"] == "complete"
    assert {row["part"] for row in figures["rows"]} == set(gpu.PARTS)
    for row in figures["rows"]:
        is_measured = {"right", "readings", "median_seconds", "tokens_per_second"} & set(row)
        assert is_measured or re.search(r"\w+ \w+", row["left_out"]), row
    assert not has_failed(figures)
    left_out = Counter(row["left_out"] for row in figures["rows"] if "left_out" in row)
    assert set(left_out) == {
        "kernel='triton' needs triton, which is not installed; use kernel='torch'",
        "MergingPress requires a ScorerPress, got AdaKVPress",
    }
    assert figures["files_left_out"] == {"gpu.png": "there is no package matplotlib"}


def test_every_kernel_is_checked_in_every_cell(rehearsal):
    figures = rehearsal[3]
    cells = set(product(("float32", "float16", "bfloat16"), (64, 128, 256, 33), ("even", "ragged")))
    checks = [("search", "torch"), ("search", "auto"), ("search", "triton"), ("matching", "match")]
    for check, kernel in [*checks, ("merging", "torch"), ("merging", "auto"), ("merging", "triton")]:
        rows = of_part(figures, "right", check=check, kernel=kernel)
        assert {(row["dtype"], row["head_dim"], row["eviction"]) for row in rows} == cells
        assert len(rows) == len(cells)
        if kernel != "triton":
            assert all(0 < row["worst"] <= row["bound"] and row["same_bits"] for row in rows)
        if kernel == "match":
            assert all(row["fitted"] == 3 for row in rows)  # all heads but the one that is not finite


def test_every_press_is_timed_with_every_rule_around_it_at_every_length(rehearsal):
    figures = rehearsal[3]
    rows = of_part(figures, "cost")
    measured = [(row["k_len"], row["press"], row["kind"]) for row in rows]
    assert sorted(measured) == sorted(product(QUICK.k_lens, PRESSES, cost.KINDS))
    for row in rows:
        if row["kind"] in ("merging", "matching"):
            assert len(row["seconds"]) == QUICK.repeats
            assert row["over_bare_range"][0] <= row["over_bare"] <= row["over_bare_range"][1]
            assert row["launches"] > 20
            assert row["n_layers"] == 2
    assert len(of_part(figures, "layer")) == 3 * 6
    assert [row["kind"] for row in of_part(figures, "decode")] == ["bare", "merging", "matching"]
    assert {row["cache_length"] for row in of_part(figures, "decode")} == {QUICK.k_lens[1] // 2}


def test_a_ragged_eviction_is_read_once_a_layer_and_an_even_one_never(rehearsal):
    readings = {
        (row["press"], row["kind"]): row["readings"]
        for row in of_part(rehearsal[3], "right", check="waits")
        if row["kind"] != "bare"
    }
    assert readings == {
        ("knorm", "merging"): 0,
        ("knorm", "matching"): 0,
        ("adakv_snapkv", "merging"): 1,
        ("adakv_snapkv", "matching"): 1,
    }


def test_the_table_is_on_the_screen_and_in_markdown_with_machine_and_versions(rehearsal):
    printed, _, folder, figures = rehearsal
    text = (folder / "gpu.md").read_text()
    assert text == markdown(figures)
    first = text.splitlines()[0]
    for version in (f"torch {torch.__version__}, no CUDA, triton ", "transformers ", "kvpress ", "kvpress-merging 0."):
        assert version in first
    assert first in printed
    assert "No GPU that this PyTorch can use: the CPU is taken." in printed
    for line in lines(figures):
        assert line.what in printed
        assert line.measured in printed


def test_the_plot_is_drawn_where_matplotlib_is(rehearsal, tmp_path):
    plot(rehearsal[3]).savefig(tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    plot({**rehearsal[3], "rows": []}).savefig(tmp_path / "empty.png")
