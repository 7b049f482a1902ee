# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What the docstrings of the public names promise, and the pages that are made of them."""

import doctest
import inspect
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from extras import needs_extra

import kvpress_merging

ROOT = Path(__file__).parents[1]
PUBLIC_CLASSES = [name for name in kvpress_merging.__all__ if inspect.isclass(getattr(kvpress_merging, name))]


def public_methods(cls: type) -> list[tuple[str, object]]:
    """Methods that a class has of its own, or writes anew."""
    found = []
    for name, member in vars(cls).items():
        function = getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(function):
            found.append((name, function))
    return found


def documented_parameters(docstring: str) -> list[str] | None:
    """The names in the Parameters section of a NumPy docstring; None if it has no such section."""
    section = re.search(r"^Parameters\n-+\n(.*?)(?=\n\n\w[\w ]*\n-+\n|\Z)", inspect.cleandoc(docstring), re.M | re.S)
    if section is None:
        return None
    heads = re.findall(r"^(\w[^:\n]*) : ", section.group(1), re.M)
    return [name.strip() for head in heads for name in head.split(",")]


@pytest.mark.parametrize("name", kvpress_merging.__all__)
def test_each_public_name_has_an_example_that_runs_as_written(name):
    if inspect.isclass(getattr(kvpress_merging, name)):
        examples = doctest.DocTestFinder(recurse=False).find(getattr(kvpress_merging, name), name)
        text = examples[0].docstring
    else:
        # What stands behind the assignment, which Python itself does not keep.
        module = inspect.getsource(kvpress_merging.registry)
        text = re.search(rf'^{name} = .*?^"""\n(.*?)^"""', module, re.M | re.S).group(1)
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    assert example.examples
    report: list[str] = []
    doctest.DocTestRunner().run(example, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize("class_name", PUBLIC_CLASSES)
def test_what_a_public_method_takes_is_what_its_docstring_tells(class_name):
    cls = getattr(kvpress_merging, class_name)
    for name, function, docstring in [
        (class_name, cls.__init__, cls.__doc__),
        *((name, function, function.__doc__) for name, function in public_methods(cls)),
    ]:
        assert docstring, f"{class_name}.{name}"
        documented = documented_parameters(docstring)
        taken = [parameter for parameter in inspect.signature(function).parameters if parameter not in ("self", "cls")]
        # What is written anew in a subclass is told where it was first written.
        is_told_above = any(name in vars(base) for base in cls.__mro__[1:])
        if documented is not None or (taken and not is_told_above):
            assert documented == taken, f"{class_name}.{name}"


@needs_extra("docs")
def test_make_docs_writes_a_page_with_each_public_name_and_its_example(tmp_path):
    from pdoc.__main__ import cli

    makefile = subprocess.run(["make", "-n", "docs"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = makefile.replace("\\\n", " ").splitlines()
    command = next(shlex.split(line) for line in lines if " -m pdoc " in line)
    arguments = command[command.index("pdoc") + 1 :]
    arguments[arguments.index("-o") + 1] = str(tmp_path)
    cli(arguments)
    page = (tmp_path / "kvpress_merging.html").read_text(encoding="utf-8")
    for name in PUBLIC_CLASSES:
        section = page[page.index(f'<section id="{name}">') :].split("<section id=", 2)[1]
        assert "Examples" in section, name
        for method, _ in public_methods(getattr(kvpress_merging, name)):
            assert f'id="{name}.{method}"' in page
    assert "merging_adakv_snapkv" in (tmp_path / "kvpress_merging" / "registry.html").read_text(encoding="utf-8")
    for kernel, function in (("blend", "cosine_blend"), ("match", "attention_match"), ("nearest", "nearest_survivors")):
        assert f'id="{function}"' in (tmp_path / "kvpress_merging" / "kernels" / f"{kernel}.html").read_text()
