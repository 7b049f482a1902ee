# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""The ranges of versions in pyproject.toml, and what `make test-lowest` installs."""

from __future__ import annotations

import re
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
# Those of the library, of the evaluation and of its cluster; tests' own tools may be the newest.
SECTIONS = ("dependencies", "eval", "ray")


def requirements() -> dict[str, Requirement]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = {}
    for section in SECTIONS:
        for line in re.search(rf"^{section} = \[(.*?)\]", text, flags=re.DOTALL | re.MULTILINE)[1].split('"')[1::2]:
            requirement = Requirement(line)
            found[requirement.name] = requirement
    return found


def bounds(requirement: Requirement, operator: str) -> list[Version]:
    return [Version(bound.version) for bound in requirement.specifier if bound.operator == operator]


def test_the_lowest_packages_are_the_lower_ends_of_the_ranges():
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    lowest = {pin.name: bounds(pin, "==") for pin in pinned}
    assert lowest == {name: bounds(requirement, ">=") for name, requirement in requirements().items()}


def test_the_pinned_packages_lie_in_the_ranges():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    ranges = {name.lower(): requirement.specifier for name, requirement in requirements().items()}
    versions = {pin.name.lower(): bounds(pin, "==")[0] for pin in pinned if pin.name.lower() in ranges}
    assert set(versions) == set(ranges)
    assert all(version in ranges[name] for name, version in versions.items())


def test_transformers_ends_where_kvpresss_does():
    theirs = next(r for r in map(Requirement, requires("kvpress")) if r.name == "transformers")
    assert bounds(requirements()["transformers"], "<") == bounds(theirs, "<") != []
