# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
import importlib
import sys
from dataclasses import dataclass, field

import pytest

from evaluation.__main__ import COMMANDS, main
from evaluation.cli import parse_config


@dataclass
class Config:
    count: int = field(default=3, metadata={"help": "how many"})
    name: str | None = None
    quiet: bool = False

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"--count must be at least 1, got {self.count}")


def parse(*argv):
    return parse_config(Config, argv, prog="prog", description="Counts.")


def test_flags_carry_the_names_and_defaults_of_the_fields():
    assert parse() == Config()
    assert parse("--count", "5", "--name=x", "--quiet") == Config(5, "x", True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param(("--cuont", "5"), "prog: unknown argument '--cuont'; did you mean --count?", id="unknown flag"),
        pytest.param(("--coun", "5"), "prog: unknown argument '--coun'; did you mean --count?", id="abbreviated flag"),
        pytest.param(("--count", "x"), "prog: argument --count: invalid int value: 'x'", id="no number"),
        pytest.param(("--count", "0"), "prog: --count must be at least 1, got 0", id="value out of range"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(*argv)
    assert exit_info.value.code == 2
    assert capsys.readouterr() == ("", message + "\n")


def test_help_explains_the_flags(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse("--help")
    assert exit_info.value.code == 0
    assert "how many (default: 3)" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_commands_are_listed_with_what_they_do(argv, capsys):
    main(argv)
    out = capsys.readouterr().out
    for command, help_text in COMMANDS.items():
        assert command in out
        assert help_text in out


def test_an_unknown_command_is_one_line_with_the_closest_and_exit_status_2(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["dmeo"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "python -m evaluation: unknown command 'dmeo'; did you mean demo?\n"


@pytest.mark.parametrize(
    "argv", [["report", "results"], ["sweep", "sweep.yaml"], ["demo"], ["run"], ["speed"], ["gpu"]]
)
def test_every_command_says_what_an_unknown_flag_may_have_meant(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([*argv, "--output_dri=x"])
    assert exit_info.value.code == 2
    unknown = f"python -m evaluation {argv[0]}: unknown argument '--output_dri=x'; did you mean --output_dir"
    assert capsys.readouterr().err.startswith(unknown)


def test_every_command_has_help(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as exit_info:
            main([command, "--help"])
        assert exit_info.value.code == 0
        assert f"python -m evaluation {command}" in capsys.readouterr().out


def test_a_python_without_what_a_command_needs_is_told_which_has_it(monkeypatch, capsys):
    def lacks_gguf(name):
        raise ModuleNotFoundError("No module named 'gguf'", name="gguf")

    monkeypatch.setattr(importlib, "import_module", lacks_gguf)
    with pytest.raises(SystemExit) as exit_info:
        main(["demo"])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{sys.executable} has no package gguf" in error
    assert ".venv" in error


def test_a_module_of_ours_that_is_missing_is_no_mistake_of_the_user(monkeypatch):
    def lacks_ours(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", lacks_ours)
    with pytest.raises(ModuleNotFoundError, match=r"evaluation\.demo"):
        main(["demo"])
