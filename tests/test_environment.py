# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What ``python -m kvpress_merging`` and one warning at import tell of the environment."""

from __future__ import annotations

import importlib
import runpy
import warnings
from importlib.metadata import version

import pytest

import kvpress_merging
from kvpress_merging import AttentionMatchingPress, MergingPress, environment

COMMAND = "kvpress_merging.__main__"


@pytest.fixture
def installed(monkeypatch):
    """Have other versions be installed than there are."""

    def install(**versions: str) -> None:
        monkeypatch.setattr(environment, "version", lambda name: versions.get(name, version(name)))

    return install


def run_command() -> int:
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_module(COMMAND, run_name="__main__")
    return exit_info.value.code


def lines_of(capsys) -> dict[str, str]:
    """What was printed of each package, by its name."""
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line.startswith("  ")}


@pytest.mark.parametrize(
    "versions",
    [
        {"torch": "2.6.0+cu124", "transformers": "4.56.0", "kvpress": "0.5.4"},
        {"torch": "2.14.1+cu130", "transformers": "5.2.0", "kvpress": "0.5.5"},
        {"torch": "2.8.0a0+git1234.nv25.06", "transformers": "4.57.6"},
        {"torch": "2.99"},  # newer than what was tested, but allowed
    ],
)
def test_an_allowed_environment_is_imported_without_a_word(versions, installed):
    installed(**versions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(kvpress_merging)


def test_one_warning_names_all_that_is_not_allowed_and_the_command_that_checks_it(installed):
    installed(torch="2.5.1+cu121", transformers="4.55.4", kvpress="0.6.0.dev1")
    with pytest.warns(RuntimeWarning, match="was not tested with") as caught:
        importlib.reload(kvpress_merging)
    assert len(caught) == 1
    message = str(caught[0].message)
    for named in ("torch 2.5.1+cu121", "transformers 4.55.4", "kvpress 0.6.0.dev1", "`python -m kvpress_merging`"):
        assert named in message
    assert "packaging" not in message


def test_packages_without_metadata_are_passed_over(monkeypatch):
    def nothing(name):
        raise environment.PackageNotFoundError(name)

    monkeypatch.setattr(environment, "version", nothing)
    assert environment.installed_packages() == []
    monkeypatch.setattr(environment, "requires", nothing)
    assert environment.installed_packages() == []
    environment.warn_of_what_is_not_allowed()


def test_the_command_passes_here_and_says_what_was_tested(installed, capsys):
    installed(torch="2.99", transformers="5.2.0", kvpress="0.5.4")
    assert run_command() == 0
    captured = capsys.readouterr().out
    assert "The self-test passed" in captured
    assert "searched by the kernel 'torch' (float32 on cpu)" in captured or "on cuda" in captured
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in captured.splitlines() if line.startswith("  ")}
    assert rows["kvpress"] == "0.5.4 tested"
    assert rows["transformers"] == "5.2.0 tested"
    assert rows["torch"].startswith("2.99 not tested; tested are <=")
    assert {"python", "triton", "GPU"} <= set(rows)


def test_what_is_not_allowed_is_told_with_what_is(installed, capsys):
    installed(transformers="4.55.4")
    run_command()
    assert lines_of(capsys)["transformers"].startswith("4.55.4 not tested; allowed are ")


def keep(self, module, hidden_states, keys, values, kept_keys, kept_values, eviction, kwargs):
    return kept_keys, kept_values


def move_keys(self, module, hidden_states, keys, values, kept_keys, kept_values, eviction, kwargs):
    return kept_keys + 1, kept_values


def fail(self, *args):
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("press_class", "fold", "message"),
    [
        (MergingPress, keep, "merged values are off by"),
        (MergingPress, move_keys, "the survivors' keys are not those that the press left"),
        (MergingPress, fail, "RuntimeError: no kernel image is available"),
        (AttentionMatchingPress, keep, "matching leaves the error of eviction"),
    ],
)
def test_the_command_fails_where_merging_does(press_class, fold, message, capsys, monkeypatch):
    monkeypatch.setattr(press_class, "fold", fold)
    assert run_command() == 1
    printed = capsys.readouterr().out
    assert message in printed
    assert "The self-test failed" in printed.splitlines()[-1]
