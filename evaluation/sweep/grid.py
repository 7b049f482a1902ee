# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""A grid of evaluations from one YAML file: read, checked whole, and laid out as one configuration for each cell."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.cli import closest
from evaluation.config import (
    DATASETS,
    EVICTION_SETTINGS,
    FIELDS,
    PRESS_FIELDS,
    SETTINGS,
    EvaluationConfig,
    measured_settings,
    settings_that,
)
from evaluation.evaluate_registry import PRESS_REGISTRY, unused_presses
from evaluation.files import read_mapping
from evaluation.presses import configure_press, usable_settings
from evaluation.report.runs import read_references

# What a file may say beside settings.
_SECTIONS = ("cells", "reference")

# Settings that are the same for the whole sweep.
_ONE_VALUE = settings_that(lambda about: not about.is_measured)

_NAMES = tuple(name for name, field in FIELDS.items() if field.init)


def read_grid(file: Path, output_dir: str | None = None) -> list[EvaluationConfig]:
    """
    Read a sweep's file and check all that it asks for.

    It is a mapping of settings to values, for all cells; ``cells``, a list of such mappings for some; ``reference``,
    published scores. Where a setting has a list of values, there is a cell for each, and for each combination of them.
    A setting is left out of cells whose press or dataset has no use for it. Results go to ``output_dir``; by default
    where the file says, or else to a folder of its name in ``results``. Out comes a configuration for each cell, each
    once, those that share a model one after the other.

    A ValueError says where the file cannot be read, names something that does not exist, or asks for a cell that cannot
    be run.
    """
    shared, blocks = _read(file)
    if output_dir is None:
        output_dir = str(shared.get("output_dir") or Path("results") / file.stem)
    with unused_presses():
        configs = _configs(file, shared, blocks, output_dir)
        _check_folders(file, configs)
    models = list(dict.fromkeys(map(model_settings, configs)))
    return sorted(configs, key=lambda config: models.index(model_settings(config)))


def model_settings(config: EvaluationConfig) -> str:
    """The settings that a model is loaded with, as text: equal for configurations that can share it."""
    return repr([config.model, config.model_kwargs, config.fp8, config.device, config.trust_remote_code])


def group_cells(configs: Sequence[EvaluationConfig]) -> list[list[EvaluationConfig]]:
    """Cells that differ in the press alone, together: these can share prefills."""
    names = settings_that(lambda about: about.press is None and about.is_measured)
    groups: dict[str, list[EvaluationConfig]] = {}
    for config in configs:
        told = [getattr(config, name) for name in names if name != "press_name"]
        groups.setdefault(repr([model_settings(config), *told]), []).append(config)
    return list(groups.values())


def _configs(
    file: Path, shared: dict[str, Any], blocks: list[dict[str, Any]], output_dir: str
) -> list[EvaluationConfig]:
    """A checked configuration for each cell, each once."""
    cells: dict[str, EvaluationConfig] = {}
    used: dict[tuple[str, str], bool] = {}
    for number, block in enumerate(blocks, start=1):
        place = f"block {number} of cells" if len(blocks) > 1 else "cells"
        for settings in _combinations({**shared, **block, "output_dir": output_dir}, f"{file}: {place}"):
            useless = _useless(settings)
            for name in settings:
                origin = f"{file}: {place}" if name in block else str(file)
                is_used = name not in useless or settings[name] in (None, FIELDS[name].default)
                used[origin, name] = used.get((origin, name), False) or is_used
            settings = {name: value for name, value in settings.items() if name not in useless}
            try:
                config = EvaluationConfig(**settings)
                configure_press(config)
            except (ValueError, TypeError) as error:
                named = "".join(f", {settings[name]}" for name in ("press_name", "dataset") if name in settings)
                raise ValueError(f"{file}: {place}{named}: {error}") from error
            cells.setdefault(json.dumps(measured_settings(config.record()), sort_keys=True, default=str), config)
    for (origin, name), is_used in used.items():
        if not is_used:
            raise ValueError(f"{origin}: {name} is of no use for any press or dataset there")
    return list(cells.values())


def _read(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings of all cells, and those of each block."""
    content = read_mapping(file)
    read_references(file)
    _check_names(content, f"{file}:", (*_NAMES, *_SECTIONS))
    shared = {name: value for name, value in content.items() if name not in _SECTIONS}
    for name in _ONE_VALUE:
        if isinstance(shared.get(name), list):
            raise ValueError(f"{file}: {name} must be one value for the whole sweep, got {shared[name]!r}")
    blocks = content.get("cells", [{}])
    if not isinstance(blocks, list) or not blocks or not all(isinstance(block, dict) for block in blocks):
        raise ValueError(f"{file}: cells must be a list of mappings of settings to values")
    for number, block in enumerate(blocks, start=1):
        _check_names(block, f"{file}: block {number} of cells:", _NAMES)
        if fixed := set(block) & set(_ONE_VALUE):
            raise ValueError(f"{file}: {min(fixed)} is the same for all cells: it belongs above them")
    return shared, blocks


def _check_names(names: Mapping[Any, Any], where: str, valid: tuple[str, ...]) -> None:
    for name in names:
        if name not in valid:
            raise ValueError(f"{where} unknown setting {name!r}{closest(str(name), valid)}")


def _combinations(settings: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    axes = {}
    for name, value in settings.items():
        takes_list = "list" in str(FIELDS[name].type)
        is_axis = isinstance(value, list) and (not takes_list or any(isinstance(item, list) for item in value))
        axes[name] = [_as_declared(name, item) for item in value] if is_axis else [_as_declared(name, value)]
        if value == []:
            raise ValueError(f"{where}: {name} has no values")
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values))


def _as_declared(name: str, value: Any) -> Any:
    """A number as a flag would give it: presses are compared as text, where -3 is not -3.0."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_int and "float" in str(FIELDS[name].type) else value


def _useless(settings: Mapping[str, Any]) -> set[str]:
    """Settings that the dataset or the press has no use for; none where these do not exist."""
    dataset, press_name = (settings.get(name, FIELDS[name].default) for name in ("dataset", "press_name"))
    useless: set[str] = set()
    if dataset in DATASETS:
        useless |= {name for name, about in SETTINGS.items() if about.datasets and dataset not in about.datasets}
    if isinstance(press_name, str) and press_name in PRESS_REGISTRY:
        useless |= {*EVICTION_SETTINGS, *PRESS_FIELDS} - usable_settings(PRESS_REGISTRY[press_name])
    return useless & set(settings)


def _check_folders(file: Path, configs: list[EvaluationConfig]) -> None:
    """Each cell has a folder of its own."""
    by_folder: dict[str, EvaluationConfig] = {}
    for config in configs:
        other = by_folder.setdefault(config.folder_name(), config)
        if other is not config:
            first, second = (measured_settings(each.record()) for each in (other, config))
            name = next(name for name in {**first, **second} if first.get(name) != second.get(name))
            raise ValueError(
                f"{file}: two cells would share the folder {config.folder_name()}: {name} {first.get(name)!r} and "
                f"{second.get(name)!r} are written alike there; put one into another file"
            )
