# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What is installed beside this package, and whether it was tested with that: as the package's own metadata says."""

from __future__ import annotations

import platform
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

PROJECT = "kvpress-merging"


@dataclass(frozen=True)
class Package:
    """
    A package that this one needs, as it was found.

    Parameters
    ----------
    name, version : str
        What is installed.
    allowed, tested : SpecifierSet
        The versions that pip installs beside this package, and those of them that its tests were run with.
    """

    name: str
    version: str
    allowed: SpecifierSet
    tested: SpecifierSet

    @property
    def is_allowed(self) -> bool:
        """Whether pip would have installed it."""
        return _is_in(self.version, self.allowed)

    @property
    def is_tested(self) -> bool:
        """Whether it lies in the range that the tests were run with, ends included."""
        return self.is_allowed and _is_in(self.version, self.tested)


def _is_in(found: str, versions: SpecifierSet) -> bool:
    try:
        return versions.contains(Version(found).public, prereleases=True)
    except InvalidVersion:
        return False


def installed_packages() -> list[Package]:
    """
    What this package needs and finds, in the order of its dependencies.

    Nothing that a package manager other than pip has installed under another name; nothing at all where this package
    was not installed, but runs from its source.
    """
    try:
        requirements = [Requirement(line) for line in requires(PROJECT) or ()]
    except PackageNotFoundError:
        return []
    tested = {
        requirement.name: requirement.specifier
        for requirement in requirements
        if requirement.marker and requirement.marker.evaluate({"extra": "tested"})
    }
    packages = []
    for requirement in requirements:
        if requirement.marker is None:
            try:
                found = version(requirement.name)
            except PackageNotFoundError:
                continue
            of_tests = tested.get(requirement.name, SpecifierSet())
            packages.append(Package(requirement.name, found, requirement.specifier, of_tests))
    return packages


def is_python_tested() -> bool:
    """Whether the tests were run with this release of Python, as the package's classifiers have it."""
    release = ".".join(platform.python_version_tuple()[:2])
    return f"Programming Language :: Python :: {release}" in metadata(PROJECT).get_all("Classifier", ())


def warn_of_what_is_not_allowed() -> None:
    """Warn once of packages that pip would not have installed beside this one."""
    others = [package for package in installed_packages() if not package.is_allowed]
    if others:
        found = ", ".join(f"{package.name} {package.version} (it allows {package.allowed})" for package in others)
        warnings.warn(
            f"kvpress-merging was not tested with {found}: `python -m kvpress_merging` checks whether it works here",
            RuntimeWarning,
            stacklevel=3,
        )
