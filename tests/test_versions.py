# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""The ranges of versions in pyproject.toml, and what `make test-lowest` installs."""

from __future__ import annotations

import re
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[1]
# Those of the library, of the evaluation and of its cluster; tests' own tools may be the newest.
SECTIONS = ("dependencies", "eval", "ray")


def requirements(sections: tuple[str, ...] = SECTIONS) -> dict[str, Requirement]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = {}
    for section in sections:
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


def cells() -> list[dict[str, str]]:
    """The table of docs/testing.md that says which versions were run together."""
    page = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    lines = re.search(r"^\| torch \|.*?(?=\n\n)", page, flags=re.DOTALL | re.MULTILINE)[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_table_of_what_was_run_reaches_both_ends_of_what_is_promised_and_no_further():
    allowed, tested = requirements(("dependencies",)), requirements(("tested",))
    for name in tested:
        run = [Version(cell[name]) for cell in cells()]
        assert [min(run)] == bounds(allowed[name], ">=")
        assert [max(run)] == bounds(tested[name], "<=")
        assert all(version in allowed[name].specifier for version in run)


def test_the_pythons_that_are_named_are_those_that_were_run():
    classifiers = re.findall(r'"Programming Language :: Python :: ([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert set(classifiers) == {".".join(cell["Python"].split(".")[:2]) for cell in cells()}


def test_python_ends_where_what_kvpress_needs_does():
    fire = next(r for r in map(Requirement, requires("kvpress")) if r.name == "fire")
    assert bounds(fire, "<") == [Version("0.7")]  # 0.7 is the first that does without pipes, which Python 3.13 lacks
    requires_python = re.search(r'^requires-python = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert "3.12" in SpecifierSet(requires_python)
    assert "3.13" not in SpecifierSet(requires_python)
