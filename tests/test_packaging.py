# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What the package says of itself, and what importing it costs."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import yaml

import kvpress_merging

ROOT = Path(__file__).parents[1]

IMPORT = """
import json, sys
import kvpress
before = set(sys.modules)
import kvpress_merging
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_importing_it_loads_little_that_kvpress_has_not_loaded_and_of_its_own_no_plots_and_no_triton():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    modules = json.loads(done.stdout)
    # packaging reads the ranges of versions.
    assert {name.split(".")[0] for name in modules} <= {"kvpress_merging", "packaging"}
    assert "kvpress_merging" in modules
    assert not {"kvpress_merging.plots", "kvpress_merging.kernels.nearest_triton"}.intersection(modules)


def test_the_version_is_told_in_one_place():
    assert kvpress_merging.__version__ == version("kvpress-merging")
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M).group(1)
    assert newest == kvpress_merging.__version__
    for file in ("pyproject.toml", "CITATION.cff"):
        assert not re.search(r'^version\b\s*[:=]\s*"?\d', (ROOT / file).read_text(), re.M)


def test_the_citation_names_the_works_that_the_docstrings_build_on():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)
    assert all({"type", "title", "authors"} <= set(work) for work in citation["references"])
    cited = {work["url"] for work in citation["references"]}
    links = r"https://(?:arxiv\.org/abs/|openreview\.net/forum\?id=)[\w.]+\w"
    named = {link for file in (ROOT / "src").rglob("*.py") for link in re.findall(links, file.read_text())}
    assert named
    assert named <= cited
