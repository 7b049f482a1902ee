# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What was measured so far, in files: killed at any moment, what was done is there."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import kvpress_merging
from evaluation.files import write_file, write_folder
from evaluation.gpu.show import markdown

_FILE = "gpu.json"
_PACKAGES = ("transformers", "kvpress", "triton", "numpy")


@dataclass
class Record:
    """
    The figures of one run, and the folder in which gpu.json always has all of them.

    Parameters
    ----------
    folder : Path
        Where.
    figures : dict
        ``arguments``, ``machine``, ``rows``, ``status`` ("running", "complete" or "interrupted"), ``seconds``, and
        ``files_left_out``, file to reason.
    started : float
        When, by ``time.monotonic()``.
    """

    folder: Path
    figures: dict[str, Any]
    started: float
    _encoded: list[str] = field(default_factory=list, init=False)

    @classmethod
    def start(cls, folder: Path, arguments: Any, device: torch.device) -> Record:
        """In a new folder, or a new one inside it."""
        figures: dict[str, Any] = {
            "machine": describe_machine(device),
            "arguments": dataclasses.asdict(arguments),
            "status": "running",
            "seconds": 0.0,
            "files_left_out": {},
            "rows": [],
        }
        record = cls(folder, figures, time.monotonic())
        record.folder = write_folder(folder, record._write_json)
        return record

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, and write."""
        self.figures["rows"].append(row)
        self._encoded.append(json.dumps(row, allow_nan=False))
        self._write_json(self.folder)

    def end(self, status: str) -> None:
        """Write everything for the last time."""
        self.figures["status"] = status
        try:
            from evaluation.gpu.plot import plot

            plot(self.figures).savefig(self.folder / "gpu.png", dpi=150)
        except ModuleNotFoundError as error:
            self.figures["files_left_out"]["gpu.png"] = (
                f"there is no package {(error.name or 'that').partition('.')[0]}"
            )
        self._write_json(self.folder)
        self.write_table()

    def write_table(self) -> None:
        """Write the table of what is there."""
        write_file(self.folder / "gpu.md", markdown(self.figures))

    def _write_json(self, folder: Path) -> None:
        self.figures["seconds"] = round(time.monotonic() - self.started, 1)
        *others, last = json.dumps({**self.figures, "rows": []}, indent=1).splitlines()
        rows = ",\n".join(f"  {row}" for row in self._encoded)
        before = "\n".join(others).removesuffix("]")
        write_file(folder / _FILE, f"{before}\n{rows}\n ]\n{last}\n")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The device and the versions of what matters."""
    versions = {name: _version(name) for name in _PACKAGES}
    machine: dict[str, Any] = {
        "device": str(device),
        "name": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **versions,
        "kvpress_merging": kvpress_merging.__version__,
        "commit": _commit(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["name"] = properties.name
        machine["memory_bytes"] = properties.total_memory
        machine["compute_capability"] = f"{properties.major}.{properties.minor}"
    return machine


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with a plus where files differ from it; None without git or a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes.strip() else "")
