# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m evaluation gpu``: a whole rehearsal without a GPU and without what a GPU's machine may lack."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from kvpress import KnormPress

from evaluation import gpu
from evaluation.gpu import cost, right, waits
from evaluation.gpu.bench import FULL, QUICK, Bench
from evaluation.gpu.plot import plot
from evaluation.gpu.show import PREFILL_BARS, has_failed, lines, markdown
from kvpress_merging import MergingPress

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
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


# Mistakes, and what goes wrong on the way.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--minutes", "0"], "minutes must be above 0, got 0.0"),
        (["--device", "mps"], "device must be cuda, cuda:<number> or cpu, got 'mps'"),
        (["--device", "cpu"], "device cpu is for a rehearsal alone: add --quick"),
        ([], "there is no GPU that this PyTorch (2."),
        (["--device", "cuda:1"], "there is no GPU that this PyTorch (2."),
    ],
)
def test_a_mistake_or_no_gpu_is_one_sentence_and_exit_status_2(flags, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_info:
        gpu.main([*flags, "--output_dir", str(tmp_path / "gpu")])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "gpu").exists()


def test_a_gpu_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit) as exit_info:
        gpu.main(["--device", "cuda:1"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "python -m evaluation gpu: there is no cuda:1, but 1 GPU\n"


ROW = {"k_len": 80, "press": "knorm", "kind": "merging"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Takes steps in place of the real ones; out come the exit status and the figures that were written."""

    def run(*steps) -> tuple[object, dict]:
        monkeypatch.setattr(gpu, "steps", lambda k_lens: [("cost", f"step {i}", step) for i, step in enumerate(steps)])
        status: object = 0
        n_threads = torch.get_num_threads()
        try:
            gpu.main(["--quick", "--device", "cpu", "--output_dir", str(tmp_path / "gpu")])
        except SystemExit as ended:
            status = ended.code
        torch.set_num_threads(n_threads)
        return status, json.loads((tmp_path / "gpu" / "gpu.json").read_text())

    return run


def fails_with(error: BaseException, *rows: dict):
    def step(bench):
        yield from rows
        raise error

    return step


def test_what_was_measured_before_ctrl_c_is_written(run, tmp_path, capsys):
    status, figures = run(
        fails_with(KeyboardInterrupt(), {**ROW, "left_out": "a reason"}), fails_with(AssertionError())
    )
    assert status == 130
    assert figures["status"] == "interrupted"
    assert figures["rows"] == [{"part": "cost", **ROW, "left_out": "a reason"}]
    assert "interrupted" in (tmp_path / "gpu" / "gpu.md").read_text()
    assert "left out: a reason" in capsys.readouterr().out


def test_out_of_memory_in_a_part_is_a_row_and_the_next_part_runs(run):
    row = {**ROW, "left_out": "a reason"}
    status, figures = run(fails_with(torch.OutOfMemoryError()), lambda bench: iter([row]))
    assert status == 0
    assert figures["rows"] == [
        {"part": "cost", "step": "step 0", "left_out": "out of memory"},
        {"part": "cost", **row},
    ]


def test_what_fails_is_a_row_and_exit_status_1(run, capsys):
    status, figures = run(fails_with(RuntimeError("no\nkernel")), lambda bench: iter([]))
    assert status == 1
    assert figures["rows"] == [{"part": "cost", "step": "step 0", "failed": "RuntimeError: no"}]
    assert "failed: RuntimeError: no" in capsys.readouterr().out


def test_killed_at_any_moment_all_rows_but_the_one_at_work_are_there(run, tmp_path):
    seen = []

    def step(bench):
        for i in range(3):
            yield {**ROW, "left_out": f"reason {i}"}
            figures = json.loads((tmp_path / "gpu" / "gpu.json").read_text())
            seen.append((figures["status"], len(figures["rows"])))

    run(step)
    assert seen == [("running", 1), ("running", 2), ("running", 3)]


def test_a_folder_that_is_there_is_kept(run, tmp_path):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "gpu.json").write_text('"mine"')
    _, figures = run(lambda bench: iter([]))
    assert figures == "mine"
    assert (tmp_path / "gpu" / "1" / "gpu.json").exists()


@pytest.mark.parametrize("rate", [None, 1.0])
def test_what_does_not_fit_the_time_is_left_out_and_says_so(rate):
    bench = Bench(CPU, QUICK, time.monotonic() + (0 if rate is None else 60))
    bench.rate = rate
    for part, _, step in gpu.steps(QUICK.k_lens):
        if part != "right":
            rows = list(step(bench))
            assert rows
            why = "no time was left" if rate is None else r"it would have taken some \d+ s, and (59|60) s were left"
            assert all(re.fullmatch(why, row["left_out"]) for row in rows), rows
    if rate is None:
        rows = list(right.check_kernels(bench, ("torch",)))
        assert {row["left_out"] for row in rows} == {"no time was left"}


def test_rounds_stop_when_the_time_is_up():
    bench = Bench(CPU, replace(QUICK, repeats=10_000), time.monotonic() + 0.2)
    rounds = bench.time({"one": lambda: time.sleep(0.01), "other": lambda: None})
    assert 1 <= len(rounds.seconds["one"]) < 100
    assert len(rounds.seconds["other"]) == len(rounds.seconds["one"])


# What is wrong is seen.


@pytest.fixture
def few_cells(monkeypatch):
    monkeypatch.setattr(right, "HEAD_DIMS", (33,))
    monkeypatch.setattr(right, "DTYPES", {"float32": torch.float32})
    return Bench(CPU, QUICK, time.monotonic() + 600)


def spoiled(function, spoil):
    """The same function, its result spoiled."""

    def spoiled(*args, **kwargs):
        return spoil(function(*args, **kwargs))

    return spoiled


def move_one(found):
    similarity, target = found
    return similarity, (target + 1) % (target.max() + 1)


@pytest.mark.parametrize(
    ("name", "spoil", "check"),
    [
        ("nearest_survivors", lambda found: (found[0] + 1e-5, found[1]), "search"),
        ("nearest_survivors", move_one, "search"),
        ("cosine_blend", lambda blend: replace(blend, values=blend.values * (1 + 1e-4)), "merging"),
        ("cosine_blend", lambda blend: replace(blend, keys=blend.keys.nan_to_num(0)), "merging"),
        ("cosine_blend", lambda blend: replace(blend, values=blend.values * (1 + 1e-6 * torch.rand(()))), "merging"),
        ("attention_match", lambda match: replace(match, values=match.values * 1.01), "matching"),
        ("attention_match", lambda match: replace(match, is_fitted=~match.is_fitted), "matching"),
    ],
)
def test_a_kernel_that_is_wrong_is_seen(few_cells, monkeypatch, name, spoil, check):
    monkeypatch.setattr(right, name, spoiled(getattr(right, name), spoil))
    rows = list(right.check_kernels(few_cells, ("torch", "match")))
    assert len(rows) == 6
    for row in rows:
        if row["check"] == check:
            assert not row.get("right"), row
    assert has_failed({"rows": rows})


def test_a_kernel_that_is_right_is_right_in_the_same_cells(few_cells):
    rows = list(right.check_kernels(few_cells, ("torch", "match")))
    assert all(row["right"] for row in rows)


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda keys: keys.sum().item(), "_local_scalar_dense"),
        (lambda keys: bool((keys > 0).any()), "_local_scalar_dense"),
        (lambda keys: keys.sum().tolist(), "tolist"),
        (lambda keys: keys[keys > 0], "index by a mask"),
        (lambda keys: (keys > 0).nonzero(), "nonzero"),
        (lambda keys: keys.cpu(), "cpu"),
    ],
)
def test_a_press_that_reads_from_the_device_is_seen(monkeypatch, read, name):
    fold = MergingPress.fold

    def fold_and_read(self, module, hidden_states, keys, *args):
        read(keys)
        return fold(self, module, hidden_states, keys, *args)

    monkeypatch.setattr(MergingPress, "fold", fold_and_read)
    bench = Bench(CPU, QUICK, time.monotonic() + 600)
    rows = {(row["press"], row["kind"]): row for row in waits.check_waits(bench)}
    row = rows["knorm", "merging"]
    assert row["readings"] == 1
    assert not row["right"]
    assert any(line.endswith(name) for line in row["by_line"])
    assert rows["knorm", "matching"]["right"]


def test_a_gpu_would_forbid_to_wait_in_a_prefill_that_reads_nothing_itself(monkeypatch):
    """kvpress's own hook reads where the tokens stand; it is given that on the CPU."""
    seen = []
    monkeypatch.setattr(
        KnormPress, "score", lambda self, *args: seen.append(args[-1]["cache_position"]) or args[2].norm(dim=-1)
    )
    bench = Bench(CPU, QUICK, time.monotonic() + 600)
    waits._prefill(bench.model, torch.zeros(1, 80, dtype=torch.int64), KnormPress(0.5))
    assert [positions.device.type for positions in seen] == ["cpu", "cpu"]


def test_the_bars_are_those_of_an_8b_model():
    assert (FULL.shape["num_hidden_layers"], FULL.shape["hidden_size"], FULL.repeats) == (32, 4096, 5)
    assert {k_len for k_len, _ in PREFILL_BARS} < set(FULL.k_lens)
    rows = [
        {"part": "cost", "k_len": k_len, "press": "knorm", "kind": kind, "n_layers": 32, "seconds": [1.0] * 5}
        | {"median_seconds": 1.0, "over_bare": over, "over_bare_range": [0.0, 0.5]}
        for k_len, kind, over in (
            (4096, "merging", 0.05),
            (4096, "matching", 0.1),
            (32_768, "merging", 0.021),
            (32_768, "matching", -0.01),
            (131_072, "matching", 0.5),
        )
    ]
    rows.append({"part": "cost", **ROW, "left_out": "out of memory"})
    rows.append({"part": "layer", "k_len": 32_768, "subject": "search, triton", "median_seconds": 1.0, "to_torch": 1.2})
    machine = {"device": "cuda:0"}
    figures = {"machine": machine, "arguments": {"quick": False}, "rows": rows, "files_left_out": {}}
    table = lines(figures)
    assert [(line.bar, line.met) for line in table] == [
        ("at most +5%", "yes"),
        ("at most +9%", "NO"),
        ("at most +2%", "NO"),
        ("at most +4%", "yes"),
        ("", ""),
        ("", ""),
        ("faster than torch", "NO"),
    ]
    assert table[5].measured == "left out: out of memory"
    assert "out of memory" not in markdown(figures, bars_alone=True)
    assert markdown(figures, bars_alone=True).count("\n") == 2 + 5


def test_peak_memory_over_the_bare_press_is_what_the_allocator_saw(monkeypatch):
    """The part that only a GPU runs, with an allocator that says what a test wants."""
    peaks = iter([100, 130, 120, 180])
    monkeypatch.setattr("evaluation.speed.rounds._watch_peak", lambda device: 10)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    bench = Bench(CPU, QUICK, time.monotonic() + 600)
    rounds = bench.time({"bare": lambda: None, "merging": lambda: None})
    assert rounds.extra_bytes == {"bare": 110, "merging": 170}
    assert cost._figures(rounds, "merging")["bytes_over_bare"] == 60


@pytest.mark.parametrize(("free", "n_layers"), [(141e9, 32), (24e9, 22), (1e9, 1)])
def test_the_model_has_fewer_layers_where_memory_is_short(monkeypatch, free, n_layers):
    made = []
    monkeypatch.setattr(Bench, "free_bytes", lambda self: int(free))
    monkeypatch.setattr(
        "evaluation.gpu.bench.AutoModelForCausalLM.from_config",
        lambda config, **kwargs: made.append(config.num_hidden_layers) or torch.nn.Identity(),
    )
    _ = Bench(CPU, FULL, 0.0).model
    assert made == [n_layers]
