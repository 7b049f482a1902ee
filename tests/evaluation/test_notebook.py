# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""The notebook runs as it stands, and shows what was committed with it."""

import copy
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from evaluation.models import built_in_model_folder

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "evaluation" / "notebooks" / "merging_demo.ipynb"


def outputs(notebook) -> list[list[str]]:
    """Of each code cell, what kinds of output it has: names of streams, and the richest form of each result."""
    return [
        [output.get("name") or sorted(output["data"])[0] for output in cell["outputs"]]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_committed_as_it_was_executed_and_small(committed):
    nbformat.validate(committed)
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(
        output["output_type"] == "error" or output.get("name") == "stderr" for cell in code for output in cell.outputs
    )
    assert NOTEBOOK.stat().st_size < 500_000


@pytest.mark.real_model
@pytest.mark.long
def test_the_notebook_runs_on_the_built_in_model_and_gives_such_outputs_again(committed, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    built_in_model_folder()  # fetched and converted once for all, with a progress bar that is no output of the notebook
    executed = copy.deepcopy(committed)
    NotebookClient(
        executed, timeout=None, startup_timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    assert outputs(executed) == outputs(committed)
    assert sum("image/png" in kinds for kinds in outputs(executed)) == 4
