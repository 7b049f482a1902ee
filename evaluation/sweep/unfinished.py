# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
The samples of a cell that are measured while others are not: a file that survives the sweep being killed.

Its first line says what is measured, by what: results of other settings or versions are not mixed. Each other line is a
sample, in JSON. The one that was being written when the sweep was killed has no end, and is cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.config import EvaluationConfig, measured_settings
from evaluation.results import package_versions

FOLDER = "unfinished"
"""Where these files lie, beside the results."""


class UnfinishedCell:
    """
    The file of one cell.

    Parameters
    ----------
    folder : Path
        The sweep's results.
    config : EvaluationConfig
        The cell.
    threads : int
        Threads that torch uses, which results depend on.
    """

    def __init__(self, folder: Path, config: EvaluationConfig, threads: int):
        self.file = folder / FOLDER / f"{config.folder_name()}.jsonl"
        about = {"settings": measured_settings(config.record()), **package_versions(), "threads": threads}
        self._about = _line(json.loads(json.dumps(about, default=str)))

    def read(self) -> dict[int, dict[str, Any]]:
        """What is there of this very cell, by numbers of samples; anything else is removed."""
        try:
            content = self.file.read_bytes()
        except OSError:
            return {}
        whole = content[: content.rfind(b"\n") + 1]
        about, *lines = whole.splitlines(keepends=True) or [b""]
        if about != self._about:
            self.remove()
            return {}
        if len(whole) < len(content):
            os.truncate(self.file, len(whole))
        rows = [json.loads(line) for line in lines]
        return {row.pop("sample"): row for row in rows}

    def append(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Add samples, and return when they are on the disk."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab") as stream:
            if stream.tell() == 0:
                stream.write(self._about)
            stream.write(b"".join(_line({"sample": sample, **row}) for sample, row in rows.items()))
            stream.flush()
            os.fsync(stream.fileno())

    def remove(self) -> None:
        """Remove the file, and its folder with the last of them."""
        self.file.unlink(missing_ok=True)
        if self.file.parent.is_dir() and not any(self.file.parent.iterdir()):
            self.file.parent.rmdir()


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"
