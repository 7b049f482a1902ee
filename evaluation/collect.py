# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Read a folder of results: runs, published references, and runs that failed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evaluation.results import FILES
from evaluation.runs import Run, read_run


@dataclass(frozen=True)
class Results:
    """
    All that a folder of results holds.

    Parameters
    ----------
    runs : list of Run
        The newest of each, in the order of their paths.
    references : list of dict
        Published scores, from ``sweep.yaml``.
    errors : list of dict
        Runs that failed: ``cell``, ``config``, ``error`` and ``traceback``.
    notes : list of str
        What a reader should know: runs that were passed over.
    """

    runs: list[Run]
    references: list[dict[str, Any]]
    errors: list[dict[str, Any]]
    notes: list[str]


def read_results(folder: Path) -> Results:
    """
    Read a folder, and all folders inside.

    Raises
    ------
    ValueError
        If there is no run, or a file is not what it should be; the message names it.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}")
    found: dict[Path, list[Path]] = {}
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if set(FILES) <= set(files):
            place = Path(path)
            # A repeat stands in a numbered folder inside the first run's.
            first = place.parent if place.name.isdecimal() and place.parent in found else place
            found.setdefault(first, []).append(place)
    if not found:
        raise ValueError(f"there are no results in {str(folder)!r}: no folder with {', '.join(FILES)}")
    notes: list[str] = []
    newest: list[Path] = []
    for first, repeats in found.items():
        newest.append(max(repeats, key=lambda place: _repeat(place, first)))
        if len(repeats) > 1:
            name = first.name if first == folder else first.relative_to(folder).as_posix()
            notes.append(f"{name} was run {len(repeats)} times: the newest, {newest[-1].name}, is shown")
    runs: dict[str, Run] = {}
    for place in newest:
        run = read_run(place)
        key = repr((run.shared, run.kind, run.variant, run.config["press_init_command"]))
        if key in runs:
            notes.append(f"{runs[key].folder.name} is there more than once: the last by path, {run.folder}, is shown")
        runs[key] = run
    return Results(
        _named(list(runs.values())), read_references(folder / "sweep.yaml"), _read_errors(folder / "errors"), notes
    )


def _named(runs: list[Run]) -> list[Run]:
    """The same runs, each bare press by one name, and no two by the same."""
    names: dict[str, str] = {}
    for run in sorted(runs, key=lambda run: run.kind != "bare"):
        if run.family not in names:
            taken = run.bare_name in names.values()
            names[run.family] = f"{run.bare_name} ({run.family.split('(')[0]})" if taken else run.bare_name
    return [dataclasses.replace(run, press=names[run.family]) for run in runs]


def _repeat(place: Path, first: Path) -> int:
    return 0 if place == first else int(place.name)


def read_references(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        rows = (content or {}).get("reference") or []
        for row in rows:
            if not all(math.isfinite(float(row[name])) for name in ("compression_ratio", "score")):
                raise ValueError("compression_ratio and score of a reference must be finite")
            if missing := {"press_name", "dataset", "source"} - set(row):
                raise ValueError(f"a reference lacks {', '.join(sorted(missing))}")
    except (KeyError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: cannot read its references: {type(error).__name__}: {error}") from error
    return rows


def _read_errors(folder: Path) -> list[dict[str, Any]]:
    errors = []
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            errors.append({name: record.get(name) for name in ("cell", "config", "error", "traceback")})
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file} is not the record of a failed run: {error}") from error
    return errors
