# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Files and folders that appear whole or not at all, and YAML that is read."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml


def read_mapping(file: Path) -> dict[Any, Any]:
    """Read a YAML file of settings; a ValueError says what is wrong with it."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {str(file)!r}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a mapping of settings to values")
    return content


def write_file(file: Path, text: str) -> None:
    """Write UTF-8 text to a file, in place of what was there."""
    with _beside(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)


def write_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """
    Have ``write`` fill a new folder, given the path to write to.

    Out comes the folder that appeared: ``folder``, or where that is there and not empty, its sub-folder ``1``, ``2``...
    """
    with _beside(folder) as temporary:
        temporary.mkdir()
        write(temporary)
        return _place(temporary, folder)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` fill a folder that takes the place of the one that is there, if there is one."""
    with _beside(folder) as temporary:
        temporary.mkdir()
        write(temporary)
        if folder.exists():
            before = temporary.with_name(f"{temporary.name}.before")
            os.rename(folder, before)
            temporary.rename(folder)
            shutil.rmtree(before)
        else:
            temporary.rename(folder)


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove what processes that were killed while they wrote ``names`` into a folder have left there."""
    for name in names:
        for leftover in folder.glob(f".{glob.escape(name)}.{'[0-9a-f]' * 32}"):
            _remove(leftover)


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A path that nobody else writes to, beside the target and so on the same disk; removed if it is still there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
    finally:
        _remove(temporary)


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def _place(temporary: Path, folder: Path) -> Path:
    """Rename a folder to the first of ``folder``, ``folder/1``, ``folder/2`` ... that is not there, or is empty."""
    number = 0
    while True:
        target = folder / str(number) if number else folder
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            try:
                return temporary.rename(target)
            except OSError:
                # Another process was faster, unless the folder is still not there.
                if not target.exists():
                    raise
        number += 1
