# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import os
import sys

import pytest
from hypothesis import settings

# Triton decides at import whether its kernels run in its interpreter, which needs no GPU.
os.environ["TRITON_INTERPRET"] = "1"

# The same cases on every run. `make test-long` draws thousands from a seed that it is given and that pytest prints.
settings.register_profile("ci", max_examples=100, derandomize=True, deadline=None)
settings.register_profile("long", max_examples=5000, derandomize=False, database=None, deadline=None, print_blob=True)
settings.load_profile("ci")


class FailuresAtOnce:
    """Prints a failure when it happens, where xdist's dots do not: a run that is stopped has said what failed."""

    def __init__(self, config: pytest.Config):
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.write_line("")
            terminal.write_sep("_", f"{report.nodeid} ({report.when})", red=True)
            terminal.write_line(report.longreprtext)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # of xdist's processes, the one that hears of all and prints
        config.pluginmanager.register(FailuresAtOnce(config))


# Fixtures import what they need when they are asked for: torch may bring Triton along, before that is set.


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama of each file's own; it and its tokenizer also lie where ``config.name_or_path`` says."""
    from tiny import tiny_checkpoint

    model, _ = tiny_checkpoint(tmp_path_factory.mktemp("llama"))
    return model


@pytest.fixture(scope="module")
def input_ids(request):
    """Tokens that all differ, so that values do: 96, or as many as the file's ``N_CONTEXT`` says."""
    import torch

    n_context = getattr(request.module, "N_CONTEXT", 96)
    return torch.randperm(240, generator=torch.Generator().manual_seed(3))[None, :n_context] + 10


@pytest.fixture(autouse=True)
def layers_are_asked_as_if_never_before():
    """What matching asks of a layer once in a process, it asks in each test: none depends on those before it."""
    if press := sys.modules.get("kvpress_merging.attention_matching_press"):
        press._SERVED.clear()


@pytest.fixture(autouse=True)
def log_level_as_before():
    """Commands of the evaluation, called as functions, set how much their logger says, in the whole process."""
    logger = logging.getLogger("evaluation")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def one_thread():
    """PyTorch on one thread, and afterwards on as many as before, whatever the test has set."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
