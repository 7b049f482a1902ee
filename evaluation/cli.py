# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What the sub-commands of ``python -m evaluation`` share: flags from a dataclass, and mistakes told in one line."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, TypeVar

from transformers import HfArgumentParser

Config = TypeVar("Config")


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, without the list of all flags before it, and what an unknown flag may have meant."""

    def error(self, message: str) -> NoReturn:
        fail(f"{self.prog}: {message}")

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        arguments, unknown = self.parse_known_args(*args, **kwargs)
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown argument {unknown[0]!r}{closest(unknown[0].split('=')[0], flags)}")
        return arguments


class _ConfigParser(Parser, HfArgumentParser):
    """The same, with flags from a dataclass."""

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        """Of a field's metadata, argparse knows what to do with the help alone."""
        field = copy.copy(field)
        options = {"help": field.metadata["help"]} if "help" in field.metadata else {}
        if field.type == bool | None:
            options |= {"nargs": "?", "const": True}
        field.metadata = options  # type: ignore[assignment]
        HfArgumentParser._parse_dataclass_field(parser, field)


def parse_config(config_class: type[Config], argv: Sequence[str], *, prog: str, description: str) -> Config:
    """
    Read a dataclass's fields from command-line flags of the same names.

    A mistake ends the process with one line on stderr and exit status 2: a ``ValueError`` that ``config_class`` raises
    for values that make no sense is one too.
    """
    parser = _ConfigParser(config_class, prog=prog, description=description, allow_abbrev=False)  # type: ignore[arg-type]
    namespace = parser.parse_args(list(argv))
    try:
        return config_class(**vars(namespace))
    except ValueError as error:
        parser.error(str(error))


def closest(name: str, valid: Iterable[str]) -> str:
    """The end of a sentence about a wrong name: the valid names most like it, or all where none is."""
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else f"; valid are {', '.join(valid)}"


def fail(message: str) -> NoReturn:
    """Tell a user's mistake in one line on stderr and end the process with exit status 2."""
    print(" ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)
