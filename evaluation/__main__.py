# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m evaluation COMMAND``: one sub-command for each thing that can be measured."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from evaluation.cli import closest, fail

COMMANDS = {
    "demo": "compare full cache, eviction, merging and matching on a real text, in about 3 minutes on 2 idle cores",
    "run": "measure one press on one dataset, with kvpress's flags, into config.yaml, predictions.csv and metrics.json",
    "sweep": "measure a grid of presses, ratios, datasets and seeds from one YAML file, here or on a Ray cluster",
    "compare": "compare two runs, or two folders of runs, on the same samples",
    "report": "compare all runs of a folder, merged against bare, as tables, plots and one HTML page",
    "speed": "time the merge against kvpress's own and against the matrix product alone, in pairs",
    "gpu": "what it does on a GPU: right or not, what prefills cost, where time goes, and decoding, in ten minutes",
}
"""Sub-command to what it does. Each is a module or package of that name with a ``main(argv)``, but for ``_MODULES``."""

_MODULES = {"compare": "report.compare", "report": "report.write"}


def main(argv: Sequence[str]) -> None:
    """Hand the arguments, without the program's name, to the sub-command that the first one names."""
    command, *rest = argv or ["--help"]
    if command in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:{width}}  {help_text}" for name, help_text in COMMANDS.items()]
        print("usage: python -m evaluation COMMAND [--help] [flags]\n\ncommands:", *lines, sep="\n")
        return
    if command not in COMMANDS:
        fail(f"python -m evaluation: unknown command {command!r}{closest(command, COMMANDS)}")
    try:
        module = importlib.import_module(f"evaluation.{_MODULES.get(command, command)}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("evaluation.", "kvpress_merging.")):  # a mistake of ours
            raise
        fail(
            f"python -m evaluation {command}: {sys.executable} has no package {error.name}. `make venv` makes .venv, "
            "whose python has all; pip install -e '.[eval]' adds them to this one"
        )
    module.main(rest)


if __name__ == "__main__":
    main(sys.argv[1:])
