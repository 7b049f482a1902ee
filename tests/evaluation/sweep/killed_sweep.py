# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
Run a sweep again and again, kill it at random moments, and let the last one end.

A program of its own: what is imported is there for all sweeps, each of which is a fork that can be killed. It prints,
as JSON, how many cells had landed at each kill, and how many samples of others were there.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from evaluation import sweep


def start(argv: list[str], log: Path) -> int:
    """The process id of a sweep that has just begun, and writes what it says to a file."""
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        # A file, not our pipes: what a killed sweep leaves behind for a moment would keep these open.
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sweep.main(argv)
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        os._exit(status)


def ends(process: int, seconds: float, is_working: Callable[[], bool] = lambda: True) -> bool:
    """Whether a process ends by itself, and well, within so many seconds from when it is at work."""
    deadline = None
    while deadline is None or time.monotonic() < deadline:
        if deadline is None and is_working():
            deadline = time.monotonic() + seconds
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            assert os.waitstatus_to_exitcode(status) == 0, status
            return True
        time.sleep(0.005)
    return False


def landed(folder: Path) -> dict[str, int]:
    """The cells that are there, and when they appeared."""
    return {file.parent.name: file.stat().st_mtime_ns for file in folder.glob("[!.]*/metrics.json")}


def written(folder: Path) -> dict[str, list[str]]:
    """The samples of cells that are not there, without one that was being written."""
    files = folder.glob("unfinished/*.jsonl")
    return {file.stem: [line for line in file.read_text().splitlines(True) if line.endswith("\n")] for file in files}


def count(folder: Path) -> int:
    """A number that grows with all that is on the disk."""
    return 1000 * len(landed(folder)) + sum(map(len, written(folder).values()))


def assert_kept(cells: dict[str, int], samples: dict[str, list[str]], folder: Path) -> None:
    """Whatever was there is there still: cells, and samples or the cell that they became."""
    assert cells.items() <= landed(folder).items(), "a cell was lost or run again"
    now = written(folder)
    for name, lines in samples.items():
        assert name in landed(folder) or now.get(name, [])[: len(lines)] == lines, "a sample was lost"


def main(output_dir: str, kills: int, longest: float, argv: list[str]) -> None:
    """
    Kill so many sweeps, each within ``longest`` seconds from when there is more on the disk than before.

    One in four is killed within as many seconds of its start instead: workers may take longer than all the cells.
    """
    folder = Path(output_dir)
    log = folder.with_suffix(".log")
    moments = random.Random(7)
    progress: list[tuple[int, int]] = []
    while len(progress) < kills:
        cells, samples = landed(folder), written(folder)
        process = start(argv, log)
        n_before = -1 if len(progress) % 4 == 3 else count(folder)
        if ends(process, moments.uniform(0, longest), lambda n=n_before: count(folder) > n):
            # Nothing is left to kill: once more from the beginning.
            shutil.rmtree(folder)
            continue
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert_kept(cells, samples, folder)
        progress.append((len(landed(folder)), sum(len(lines) - 1 for lines in written(folder).values())))
    cells = landed(folder)
    assert ends(start(argv, log), math.inf)  # however busy the machine is
    assert_kept(cells, {}, folder)
    print(json.dumps(progress))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
