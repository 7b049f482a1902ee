# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
Measure a grid of presses, ratios, datasets and seeds from one YAML file.

The file has any of run's settings, by the same names: one value for all cells, or a list for a cell each. What only
some cells have goes into blocks under "cells"; evaluation/sweeps/ has examples. Each cell's results appear in a folder
of their own, whole or not at all. A sweep that broke off, or whose file has grown, goes on with the same command, from
the sample that it was at (unfinished/ beside the results has those before it). Exit status: 0 if all cells are there, 1
if some failed (see errors/), 2 for a mistake.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from filelock import FileLock, Timeout
from tqdm import tqdm

from evaluation.cli import Parser, fail
from evaluation.config import EvaluationConfig
from evaluation.files import remove_leftovers, write_file
from evaluation.results import find_results, write_files
from evaluation.sweep.grid import group_cells, read_grid
from evaluation.sweep.here import run_here
from evaluation.sweep.on_ray import run_on_ray
from evaluation.sweep.outcomes import Alone, Failed, Finished, Outcomes, RunnerError
from evaluation.sweep.unfinished import UnfinishedCell

logger = logging.getLogger(__name__)

PROG = "python -m evaluation sweep"


def main(argv: Sequence[str]) -> None:
    """Run the sweep that the command-line arguments name. Exit status: 1 if a cell failed, 2 for a mistake."""
    arguments = _parse(argv)
    try:
        cells = read_grid(arguments.file, arguments.output_dir)
    except (ValueError, OSError) as error:
        fail(f"{PROG}: {error}")
    folder = Path(cells[0].output_dir).expanduser()
    if arguments.dry_run:
        _list(cells, folder)
        return
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("evaluation").setLevel(logging.WARNING)
    quiet = arguments.quiet or any(config.quiet for config in cells)
    if quiet:
        transformers.utils.logging.disable_progress_bar()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The operating system takes it back from a process that was killed.
        with FileLock(folder / ".sweep.lock", timeout=0):
            n_failed = sweep(arguments.file, cells, folder, arguments, quiet=quiet)
    except Timeout:
        fail(f"{PROG}: another sweep is writing to {folder}")
    except (RunnerError, OSError) as error:
        fail(f"{PROG}: {error}")
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on where this stopped.", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(1 if n_failed else 0)


def sweep(
    file: Path, cells: Sequence[EvaluationConfig], folder: Path, arguments: argparse.Namespace, *, quiet: bool
) -> int:
    """
    Measure what is not there yet, and write it, with a copy of the sweep's file beside it.

    What is there stays: a ``sweep.yaml`` that says something else is kept as ``sweep-1.yaml``, or ``sweep-2.yaml`` ...
    Out comes how many cells failed; a RunnerError says that nothing can be run.
    """
    errors = folder / "errors"
    names = [config.folder_name() for config in cells]
    threads = arguments.threads or torch.get_num_threads()
    remove_leftovers(folder, [*names, "sweep.yaml"])
    remove_leftovers(errors, [_error_file(folder, config).name for config in cells])
    _write_copy(folder / "sweep.yaml", file.read_text(encoding="utf-8"))
    to_do = []
    unfinished = {config.folder_name(): UnfinishedCell(folder, config, threads) for config in cells}
    for config in cells:
        if find_results(config) is None:
            # Workers' bars would run into each other.
            to_do.append(dataclasses.replace(config, quiet=quiet or arguments.runner == "ray"))
        else:
            _error_file(folder, config).unlink(missing_ok=True)
            unfinished[config.folder_name()].remove()
    finished = {config.folder_name(): unfinished[config.folder_name()].read() for config in to_do}
    units: list[list[EvaluationConfig]] = group_cells(to_do) if arguments.share_prefill else [[c] for c in to_do]
    outcomes: Outcomes
    if to_do and arguments.runner == "ray":
        outcomes = run_on_ray(units, threads, finished, arguments.address, arguments.num_workers)
    else:
        outcomes = run_here(units, threads, finished)
    n_failed = 0
    n_before = len(cells) - len(to_do)
    with tqdm(total=len(cells), initial=n_before, desc="sweep", unit="cell", disable=quiet) as progress:
        for config, outcome in outcomes:
            name = config.folder_name()
            if isinstance(outcome, Finished):
                unfinished[name].append(outcome.rows)
                finished[name] |= outcome.rows
                continue
            if isinstance(outcome, Alone):
                if outcome.reason:
                    logger.warning("Measured alone: %s: %s", name, " ".join(outcome.reason.split()))
                continue
            if isinstance(outcome, Failed):
                n_failed += 1
                record = {"cell": name, "config": config.record(), **dataclasses.asdict(outcome)}
                write_file(_error_file(folder, config), json.dumps(record, indent=4, default=str) + "\n")
                line = f"Failed: {name}: {' '.join(outcome.error.split())}"
                progress.write(line, file=sys.stderr)
            else:
                write_files(outcome.config, outcome.versions, outcome.predictions, outcome.metrics)
                _error_file(folder, config).unlink(missing_ok=True)
                unfinished[name].remove()
            progress.update()
    n_done = len(cells) - n_failed
    print(f"{n_done} of {len(cells)} cells are in {folder}, {n_before} of them from before")
    if n_failed:
        print(f"{n_failed} failed: see {errors}; the same command tries them again")
    if n_done:
        print(f"Compare them: python -m evaluation report {folder}")
    return n_failed


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=PROG, description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("file", type=Path, help="the YAML file, for instance evaluation/sweeps/text-1024.yaml")
    for name, options in {
        "output_dir": {"help": "where the results go; by default what the file says, or results/ and its name"},
        "runner": {
            "choices": ("local", "ray"),
            "default": "local",
            "help": "local: in this process; ray: on the workers of a Ray cluster (pip install 'kvpress-merging[ray]')",
        },
        "address": {"help": "ray: join the cluster at this address ('auto': on this machine) instead of starting one"},
        "num_workers": {
            "type": int,
            "help": "ray: cells at the same time; by default one a GPU, or as many as have cores for their threads",
        },
        "threads": {
            "type": int,
            "help": "threads that torch uses in each worker; by default its own number here. Results repeat to the bit "
            "with the same number only, which config.yaml notes",
        },
        "share_prefill": {
            "type": _switch,
            "default": True,
            "help": "True: cells that differ in the press alone share prefills, where the press lets them, which gives "
            "the same results; False: each cell prefills by itself",
        },
        "quiet": {"action": "store_true", "help": "no progress bars, for logs"},
        "dry_run": {"action": "store_true", "help": "list the cells and whether they are done, and run nothing"},
    }.items():
        parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **options)  # type: ignore[arg-type]
    arguments = parser.parse_args(list(argv))
    for name in ("num_workers", "threads"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    for name in ("num_workers", "address"):
        if getattr(arguments, name) is not None and arguments.runner != "ray":
            parser.error(f"--{name} is of use with --runner ray only")
    arguments.file = arguments.file.expanduser()
    return arguments


def _switch(value: str) -> bool:
    if value not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"must be True or False, got {value!r}")
    return value == "True"


def _list(cells: Sequence[EvaluationConfig], folder: Path) -> None:
    n_done = 0
    for config in cells:
        state = "to do"
        if find_results(config) is not None:
            state = "done"
            n_done += 1
        elif _error_file(folder, config).is_file():
            state = "failed"
        print(f"{state:6}  {config.folder_name()}")
    print(f"{len(cells)} cells, {n_done} done, in {folder}")


def _error_file(folder: Path, config: EvaluationConfig) -> Path:
    return folder / "errors" / f"{config.folder_name()}.json"


def _write_copy(file: Path, text: str) -> None:
    if file.exists():
        if file.read_bytes() == text.encode():
            return
        earlier = (file.with_name(f"{file.stem}-{number}{file.suffix}") for number in itertools.count(1))
        os.rename(file, next(place for place in earlier if not place.exists()))
    write_file(file, text)
