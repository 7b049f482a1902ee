# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What there is to know of a setting beside its name, type and default: metadata of a dataclass's field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from kvpress import BasePress

Allowed = tuple[str, Callable[[Any], bool]]
"""What a number may be, in words, and whether one is that."""

Part = tuple[int, "str | Callable[[Any], str]"]
"""A part of a folder's name: its place among the others, and a format string or a function of the value."""


@dataclass(frozen=True)
class Setting:
    """
    One setting, as ``"setting"`` in its field's metadata.

    Parameters
    ----------
    allowed : Allowed, optional
        What a number may be.
    folder : Part, optional
        What the name of the results' folder says of it where it is not default.
    datasets : tuple of str, optional
        The datasets that have a use for it; by default all.
    press : type, optional
        The kind of press that it is a field of.
    is_needed : bool
        Whether such a press cannot do without it.
    eviction : {"amount", "moment"}, optional
        What it decides of an eviction: how much is evicted, or when.
    is_shared : bool
        Whether a run and its twin, the run of the bare press, have the same.
    is_measured : bool
        Whether it changes what is measured. What does not is the same for a whole sweep.
    """

    allowed: Allowed | None = None
    folder: Part | None = None
    datasets: tuple[str, ...] | None = None
    press: type[BasePress] | None = None
    is_needed: bool = False
    eviction: Literal["amount", "moment"] | None = None
    is_shared: bool = True
    is_measured: bool = True


def setting(default: Any, help: str, allowed: Allowed | None = None, folder: Part | None = None, **about: Any) -> Any:
    """A dataclass's field with what ``--help`` says of it and a ``Setting`` of the other arguments."""
    return field(default=default, metadata={"help": help, "setting": Setting(allowed, folder, **about)})


def integer(low: int, high: float = float("inf"), words: str = "") -> Allowed:
    """Whole numbers in a range."""
    words = words or (f"an integer of at least {low}" if high == float("inf") else f"an integer from {low} to {high}")
    return words, lambda number: isinstance(number, int) and low <= number <= high


POSITIVE = integer(1, words="a positive integer")
BELOW_1: Allowed = ("in [0, 1)", lambda number: 0 <= number < 1)
UP_TO_1: Allowed = ("in [0, 1]", lambda number: 0 <= number <= 1)
ABOVE_0: Allowed = ("in (0, 1]", lambda number: 0 < number <= 1)
