# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
import builtins
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from filelock import FileLock

from evaluation.__main__ import main
from evaluation.config import EvaluationConfig
from evaluation.evaluate import prepare
from evaluation.report.runs import read_results
from evaluation.sweep import here, on_ray, outcomes
from evaluation.text import built_in_text

pytestmark = pytest.mark.usefixtures("one_thread")

SECONDS = ["seconds", "prefill_seconds", "press_seconds", "answer_seconds", "prefill_seconds_full"]


@pytest.fixture(scope="module")
def model(checkpoint) -> Path:
    return checkpoint


def write_grid(folder: Path, model_folder: Path, **settings) -> Path:
    file = folder / "grid.yaml"
    small = {"model": str(model_folder), "data_dir": 300, "n_samples": 1, "tasks": "niah_single_1", "max_new_tokens": 2}
    file.write_text(yaml.safe_dump({**small, "device": "cpu", **settings}))
    return file


def sweep(file: Path, folder: Path, *flags: str) -> int:
    """The exit status."""
    with pytest.raises(SystemExit) as exit_info:
        main(["sweep", str(file), "--output_dir", str(folder), "--threads", "1", "--quiet", *flags])
    return int(exit_info.value.code or 0)


def results(folder: Path) -> dict[str, tuple]:
    """What each cell holds, but for times."""
    cells = {}
    for place in folder.glob("[!.]*"):
        if place.is_dir() and place.name not in ("errors", "unfinished"):
            predictions = pd.read_csv(place / "predictions.csv", dtype=str)
            config = yaml.safe_load((place / "config.yaml").read_text())
            assert config["versions"]["threads"] == "1"
            del config["output_dir"], config["quiet"]
            cells[place.name] = (
                (place / "metrics.json").read_bytes(),
                predictions.drop(columns=SECONDS, errors="ignore").to_csv(),
                config,
            )
    return cells


def appeared(folder: Path) -> dict[str, int]:
    return {file.parent.name: file.stat().st_mtime_ns for file in folder.glob("*/metrics.json")}


def test_each_cell_has_its_folder_and_the_report_reads_them(model, tmp_path, capsys):
    reference = {"press_name": "knorm", "dataset": "ruler-synthetic", "compression_ratio": 0.5, "score": 1}
    grid = write_grid(
        tmp_path, model, press_name=["no_press", "knorm", "merging_knorm"], reference=[{**reference, "source": "here"}]
    )
    folder = tmp_path / "results"
    assert sweep(grid, folder) == 0
    out, err = capsys.readouterr()
    assert "3 of 3 cells are in" in out
    assert err == ""
    collected = read_results(folder)
    assert [run.press_name for run in collected.runs] == ["knorm", "merging_knorm", "no_press"]
    assert collected.references == [{**reference, "source": "here"}]
    assert all((run.predictions["seconds"] > 0).all() for run in collected.runs)
    assert (folder / "sweep.yaml").read_bytes() == grid.read_bytes()
    leftovers = [place.name for place in folder.glob(".*") if place.name != ".sweep.lock"]
    assert leftovers == []


def test_finished_cells_are_known_by_their_configuration(model, tmp_path, capsys):
    grid = write_grid(tmp_path, model, press_name=["knorm", "merging_knorm"])
    folder = tmp_path / "results"
    assert sweep(grid, folder) == 0
    before = appeared(folder)
    # Fields that are given their defaults, and how it is run, change nothing.
    grid = write_grid(
        tmp_path, model, press_name=["knorm", "merging_knorm", "snapkv"], merge_fraction=1, compression_ratio=[0.5, 0.2]
    )
    main(["sweep", str(grid), "--output_dir", str(folder), "--dry_run"])
    assert "6 cells, 2 done" in capsys.readouterr().out
    assert sweep(grid, folder) == 0
    after = appeared(folder)
    assert len(after) == 6
    assert before.items() <= after.items()


def test_another_configurations_results_in_a_cells_folder_are_kept_and_not_taken_for_its_own(model, tmp_path):
    grid = write_grid(tmp_path, model, compression_ratio=0.5)
    folder = tmp_path / "results"
    assert sweep(grid, folder) == 0
    (first,) = [file.parent for file in folder.glob("*/metrics.json")]
    before = (first / "config.yaml").read_bytes()
    grid = write_grid(tmp_path, model, compression_ratio=0.501)
    assert sweep(grid, folder) == 0
    assert (first / "config.yaml").read_bytes() == before
    assert yaml.safe_load((first / "1" / "config.yaml").read_text())["compression_ratio"] == 0.501
    assert sweep(grid, folder) == 0
    assert not (first / "2").exists()


def test_a_cell_that_fails_is_recorded_and_tried_again_and_the_rest_goes_on(model, tmp_path, monkeypatch, capsys):
    grid = write_grid(tmp_path, model, press_name=["knorm", "snapkv", "keydiff"])
    folder = tmp_path / "results"

    def break_snapkv(config, *loaded):
        if config.press_name == "snapkv":
            raise RuntimeError("it broke\nin two")
        return prepare(config, *loaded)

    monkeypatch.setattr(here, "prepare", break_snapkv)
    assert sweep(grid, folder) == 1
    out, err = capsys.readouterr()
    assert "1 failed" in out
    assert err.count("\n") == 1
    assert "RuntimeError: it broke in two" in err
    assert len(appeared(folder)) == 2
    (error,) = read_results(folder).errors
    assert (error["error"], error["config"]["press_name"]) == ("RuntimeError: it broke\nin two", "snapkv")
    assert "break_snapkv" in error["traceback"]
    main(["sweep", str(grid), "--output_dir", str(folder), "--dry_run"])
    assert f"failed  {error['cell']}" in capsys.readouterr().out
    monkeypatch.undo()
    assert sweep(grid, folder) == 0
    assert len(appeared(folder)) == 3
    assert read_results(folder).errors == []


def test_a_model_that_is_not_there_fails_its_cells_only(model, tmp_path):
    grid = write_grid(tmp_path, model, model=[str(tmp_path / "nowhere"), str(model)])
    assert sweep(grid, tmp_path / "results") == 1
    collected = read_results(tmp_path / "results")
    assert len(collected.runs) == len(collected.errors) == 1
    assert "There is no folder" in collected.errors[0]["error"]


def test_a_model_is_loaded_once_for_all_cells_that_share_it(model, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "other")
    loaded = []

    def load(config):
        loaded.append(config.model)
        return original(config)

    original = here.load
    monkeypatch.setattr(here, "load", load)
    models = [str(model), str(tmp_path / "other")]
    grid = write_grid(tmp_path, model, press_name=["knorm", "merging_knorm"], model=models)
    assert sweep(grid, tmp_path / "results") == 0
    assert loaded == models


def test_what_killed_sweeps_left_is_removed_and_nothing_else(model, tmp_path):
    grid = write_grid(tmp_path, model)
    folder = tmp_path / "results"
    assert sweep(grid, folder) == 0
    (cell,) = appeared(folder)
    (folder / f".{cell}.{'0a' * 16}").mkdir()
    (folder / f".sweep.yaml.{'0a' * 16}").touch()
    (folder / "errors").mkdir()
    (folder / "errors" / f".{cell}.json.{'0a' * 16}").touch()
    (folder / ".mine").mkdir()
    assert sweep(grid, folder) == 0
    assert {place.name for place in folder.glob(".*")} - {".sweep.lock"} == {".mine"}
    assert list((folder / "errors").iterdir()) == []


def test_two_sweeps_do_not_write_to_the_same_folder(model, tmp_path, capsys):
    grid = write_grid(tmp_path, model)
    folder = tmp_path / "results"
    folder.mkdir()
    with FileLock(folder / ".sweep.lock"):
        assert sweep(grid, folder) == 2
    assert "another sweep is writing to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("nowhere.yaml", "cannot read 'nowhere.yaml': No such file"),
        ("grid.yaml", "grid.yaml: cells, knrm: --press_name: there is no 'knrm'; did you mean knorm"),
        ("grid.yaml --thraeds 1", "unknown argument '--thraeds'; did you mean --threads"),
        ("grid.yaml --runner rya", "argument --runner: invalid choice: 'rya'"),
        ("grid.yaml --threads 0", "--threads must be at least 1, got 0"),
        ("grid.yaml --num_workers 2", "--num_workers is of use with --runner ray only"),
        ("grid.yaml --address auto", "--address is of use with --runner ray only"),
        ("", "the following arguments are required: file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2_and_nothing_is_run(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("grid.yaml").write_text("press_name: [knorm, knrm]")
    with pytest.raises(SystemExit) as exit_info:
        main(["sweep", *flags.split()])
    assert exit_info.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"python -m evaluation sweep: {message}")
    assert err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["grid.yaml"]


def test_without_ray_its_runner_says_what_to_install(model, tmp_path, monkeypatch, capsys):
    def without_ray(name, *rest):
        if name == "ray":
            raise ImportError(name)
        return original(name, *rest)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without_ray)
    assert sweep(write_grid(tmp_path, model), tmp_path / "results", "--runner", "ray") == 2
    assert capsys.readouterr().err == (
        "python -m evaluation sweep: --runner ray needs ray: pip install 'kvpress-merging[ray]'\n"
    )


@pytest.mark.parametrize(
    ("nodes", "n_cells", "threads", "num_workers", "expected"),
    [
        ([{"CPU": 8}], 99, 2, None, (4, {"num_cpus": 2})),
        ([{"CPU": 3}, {"CPU": 3}], 99, 2, None, (2, {"num_cpus": 2})),
        ([{"CPU": 2}], 99, 1, 2, (2, {"num_cpus": 1})),
        ([{"CPU": 2}], 99, 2, 3, (3, {"num_cpus": 0.666})),
        ([{"CPU": 2}], 1, 1, None, (1, {"num_cpus": 1})),
        ([{"CPU": 2}], 99, 4, None, (1, {"num_cpus": 2})),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 1}], 99, 8, None, (3, {"num_gpus": 1, "num_cpus": 1})),
        ([{"CPU": 8, "GPU": 4}], 99, 8, 2, (2, {"num_gpus": 1, "num_cpus": 1})),
    ],
)
def test_workers_share_out_the_cluster(nodes, n_cells, threads, num_workers, expected):
    assert on_ray._share_out(nodes, n_cells, threads, num_workers) == expected


def test_more_workers_than_gpus_are_refused():
    with pytest.raises(outcomes.RunnerError, match="--num_workers must be at most 1, one for each GPU, got 2"):
        on_ray._share_out([{"CPU": 8, "GPU": 1}], 9, 1, 2)


class RayOfOneProcess:
    """As much of Ray as hands out cells. A reference is a function that gives the result."""

    class exceptions:
        class RayError(Exception):
            pass

    @staticmethod
    def wait(references, num_returns):
        return references[:1], references[1:]

    @staticmethod
    def get(reference):
        return reference()


class RemoteWorker:
    """An actor that dies of what it is made to, after a sample of each cell before that."""

    def __init__(self, deadly=(), starts=True):
        self.deadly, self.starts, self.units = deadly, starts, []
        self.start = Remote(lambda: (lambda: None) if starts else die)
        self.measure = Remote(self._measure)

    def _measure(self, cells, finished):
        self.units.append([(config.folder_name(), finished[config.folder_name()]) for config in cells])
        for config in cells:
            if config.press_name in self.deadly:
                yield die
                return
            yield lambda config=config: (config, outcomes.Finished({0: {"kl": 1}}))
        for config in cells:
            yield lambda config=config: (config, outcomes.Measured(config, {}, pd.DataFrame(), {}))


class Remote:
    """A method of an actor."""

    def __init__(self, method):
        self.remote = method

    def options(self, num_returns):
        assert num_returns == "streaming"
        return self


def die():
    raise RayOfOneProcess.exceptions.RayError("died")


def spread(units, make_worker, count) -> dict[str, list]:
    """What comes of each cell, while finished samples are noted as a sweep does."""
    configs = [[EvaluationConfig(press_name=name) for name in unit] for unit in units]
    finished: dict = {config.folder_name(): {} for unit in configs for config in unit}
    came: dict[str, list] = {}
    for config, outcome in on_ray._spread(configs, make_worker, count, finished):
        came.setdefault(config.press_name, []).append(outcome)
        if isinstance(outcome, outcomes.Finished):
            finished[config.folder_name()] |= outcome.rows
    return came


def kinds(came) -> list[type]:
    return [type(outcome) for outcome in came]


def test_a_worker_that_dies_fails_its_cell_and_another_takes_its_place(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", RayOfOneProcess)
    made = []

    def make_worker():
        made.append(RemoteWorker(deadly={"snapkv"}))
        return made[-1]

    came = spread([["knorm"], ["snapkv"], ["keydiff"]], make_worker, 1)
    assert kinds(came["knorm"]) == kinds(came["keydiff"]) == [outcomes.Finished, outcomes.Measured]
    (failed,) = came["snapkv"]
    assert failed.error == "the worker died: RayError: died"
    assert len(made) == 2


def test_cells_that_shared_a_worker_that_died_are_measured_one_by_one_from_where_they_were(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", RayOfOneProcess)
    made = []

    def make_worker():
        made.append(RemoteWorker(deadly={"snapkv"}))
        return made[-1]

    came = spread([["knorm", "snapkv", "keydiff"]], make_worker, 1)
    assert kinds(came["knorm"]) == [outcomes.Finished, outcomes.Finished, outcomes.Measured]
    assert kinds(came["snapkv"]) == [outcomes.Failed]
    assert kinds(came["keydiff"]) == [outcomes.Finished, outcomes.Measured]
    assert [len(unit) for worker in made for unit in worker.units] == [3, 1, 1, 1]
    ((_, so_far),) = made[1].units[0]
    assert so_far == {0: {"kl": 1}}


def test_workers_that_do_not_start_end_the_sweep_only_if_none_does(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", RayOfOneProcess)
    workers = iter([RemoteWorker(starts=False), RemoteWorker()])
    came = spread([["knorm"], ["snapkv"]], lambda: next(workers), 2)
    assert kinds(came["knorm"]) == kinds(came["snapkv"]) == [outcomes.Finished, outcomes.Measured]
    with pytest.raises(outcomes.RunnerError, match="no worker starts on the Ray cluster: died"):
        spread([["knorm"], ["snapkv"]], lambda: RemoteWorker(starts=False), 2)


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [([5], 1, [5]), ([5], 3, [1, 2, 2]), ([4, 1], 3, [1, 2, 2]), ([1, 1], 9, [1, 1]), ([8], 4, [2, 2, 2, 2])],
)
def test_units_are_halved_until_each_worker_has_one(sizes, count, expected):
    units = [[EvaluationConfig(seed=seed) for seed in range(size)] for size in sizes]
    parts = here.split(units, count)
    assert sorted(map(len, parts)) == expected
    assert [config for part in parts for config in part] == [config for unit in units for config in unit]


def in_another_process(*arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment)


def test_a_sweep_on_ray_has_the_results_of_one_in_this_process(model, tmp_path):
    grid = write_grid(tmp_path, model, press_name=["no_press", "knorm", "merging_knorm"], seed=[1, 2])
    assert sweep(grid, tmp_path / "here") == 0
    flags = ["--threads", 1, "--quiet", "--runner", "ray", "--num_workers", 1]
    finished = in_another_process("-m", "evaluation", "sweep", grid, "--output_dir", tmp_path / "ray", *flags)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert len(results(tmp_path / "ray")) == 6
    assert results(tmp_path / "ray") == results(tmp_path / "here")


@pytest.mark.parametrize(
    ("runner", "kills"),
    [
        ("local", 2),
        pytest.param("local", 20, marks=pytest.mark.long),
        pytest.param("ray", 20, marks=pytest.mark.long),
    ],
)
def test_a_sweep_that_is_killed_again_and_again_ends_as_one_that_is_left_alone(runner, kills, model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(built_in_text()[:3000])
    presses = ["no_press", "random", "merging_knorm"]
    blocks = [
        {"press_name": presses},
        {"press_name": presses, "dataset": "fidelity", "text_file": str(text), "continuation_length": 9},
    ]
    grid = write_grid(tmp_path, model, compression_ratio=[0.25, 0.75], seed=[1, 2], n_samples=3, cells=blocks)
    assert sweep(grid, tmp_path / "alone") == 0
    alone = results(tmp_path / "alone")
    assert len(alone) == 2 * 2 * (1 + 2 * 2)

    flags = ["--threads", "1", "--quiet", "--runner", runner]
    if runner == "ray":
        flags += ["--num_workers", "2"]
    folder = tmp_path / "killed"
    script = Path(__file__).with_name("killed_sweep.py")
    finished = in_another_process(script, folder, kills, 0.5, grid, "--output_dir", folder, *flags)
    assert finished.returncode == 0, finished.stderr[-3000:] + folder.with_suffix(".log").read_text()[-3000:]
    print("cells, and samples of others, that were there at each kill:", finished.stdout)
    assert len(progress := json.loads(finished.stdout)) == kills
    assert any(
        n_cells < len(alone) and n_cells + n_samples > 0 for n_cells, n_samples in progress
    )  # in the midst of it
    assert results(folder) == alone
    assert {place.name for place in folder.glob(".*")} <= {".sweep.lock"}
