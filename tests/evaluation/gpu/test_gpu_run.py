# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m evaluation gpu``: mistakes, what goes wrong on the way, what is left out, and what the table says."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace

import pytest
import torch

from evaluation import gpu
from evaluation.gpu import cost, right
from evaluation.gpu.bench import FULL, QUICK, Bench
from evaluation.gpu.show import PREFILL_BARS, lines, markdown

CPU = torch.device("cpu")


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


@pytest.mark.parametrize(("asked", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_is_taken_by_its_number(monkeypatch, asked, index):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert gpu._device(gpu.GpuArguments(device=asked)) == torch.device("cuda", index)
    assert taken == [torch.device("cuda", index)]


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
            why = "no time was left" if rate is None else r"it would have taken some \d+ s, and \d+ s were left"
            assert all(re.fullmatch(why, row["left_out"]) for row in rows), rows
    if rate is None:
        rows = list(right.check_kernels(bench, ("torch",)))
        assert {row["left_out"] for row in rows} == {"no time was left"}


def test_rounds_stop_when_the_time_is_up():
    bench = Bench(CPU, replace(QUICK, repeats=10_000), time.monotonic() + 0.2)
    rounds = bench.time({"one": lambda: time.sleep(0.01), "other": lambda: None})
    assert 1 <= len(rounds.seconds["one"]) < 100
    assert len(rounds.seconds["other"]) == len(rounds.seconds["one"])


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
        ("below 1, to be the default", "NO"),
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
