# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml's extras bring, for tests that are to be skipped where one is not installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

import pytest
from packaging.requirements import Requirement


def missing_from(extra: str) -> list[str]:
    """The packages of an extra that are not there."""
    missing = []
    for requirement in map(Requirement, requires("kvpress-merging") or ()):
        if "extra" in str(requirement.marker) and requirement.marker.evaluate({"extra": extra}):
            try:
                version(requirement.name)
            except PackageNotFoundError:
                missing.append(requirement.name)
    return missing


def needs_extra(extra: str) -> pytest.MarkDecorator:
    """Skips a test, or a file's, where packages of the extra are not installed, and names them."""
    missing = missing_from(extra)
    return pytest.mark.skipif(bool(missing), reason=f"needs the extra {extra!r}: there is no {', '.join(missing)}")
