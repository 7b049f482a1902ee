# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
Break the kernels and ``merge_on_evict_press.py`` a little, in one place at a time, and see whether a test notices.

    python tests/mutate.py --sample 300 --report evaluation/results/trust/mutation.md

mutmut makes the mutants and runs those tests on each that reach its function. It works on a copy in ``build/mutation``.
There the decorated functions that it would pass by are decorated where the file ends; functions that serve tests alone
are left as they are. Of each group of files a sample is drawn, by a seed. Survivors that are known to behave as the
original are explained in ``tests/mutants.yaml``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from mutmut.mutation.file_mutation import mutate_file_contents

ROOT = Path(__file__).parents[1]
PACKAGE = Path("src/kvpress_merging")
EXPLAINED = Path(__file__).with_name("mutants.yaml")
KILLED_BY_TESTS, SURVIVED, NO_TESTS = {1, 3}, 0, 33


@dataclass(frozen=True)
class Group:
    """Files to mutate, and the tests that have to notice: few and fast ones, as pytest's ``-k`` picks them."""

    name: str
    files: tuple[str, ...]
    tests: tuple[str, ...]
    keywords: str = ""


GROUPS = (
    Group("blend", ("kernels/blend.py",), ("test_blend",)),
    Group("match", ("kernels/match.py", "kernels/nearby.py"), ("test_match", "test_nearby")),
    Group("nearest", ("kernels/nearest.py", "kernels/products.py"), ("test_nearest", "test_products")),
    Group("rows", ("kernels/rows.py",), ("test_rows", "test_nearest")),
    Group("trial", ("kernels/trial.py",), ("test_nearest_triton",), "trial or auto or serves"),
    Group(
        "press",
        ("merge_on_evict_press.py",),
        ("test_merging_press", "test_wrapping", "test_faults", "test_decoding", "test_caches"),
        "not leaves_no_tracks and (not an_exception_inside or AdaKV or KVzip or Composed or third)",
    ),
)


@dataclass
class Outcome:
    """What became of the mutants of a group."""

    made: Counter = field(default_factory=Counter)
    tried: Counter = field(default_factory=Counter)
    killed: Counter = field(default_factory=Counter)
    survivors: dict[str, str] = field(default_factory=dict)


def with_late_decorators(source: str) -> str:
    """mutmut passes by functions with decorators, so the one that kernels have is put on where the file ends."""
    decorated = re.compile(r"^@torch\.no_grad\(\)\n(?=def (\w+))", flags=re.MULTILINE)
    late = [f"{name} = torch.no_grad()({name})\n" for name in decorated.findall(source)]
    return decorated.sub("", source) + "\n\n" * bool(late) + "".join(late)


def run_group(group: Group, sample: int, seed: int, work: Path) -> Outcome:
    """Mutate a group of files on a copy in ``work`` and run its tests."""
    shutil.rmtree(work, ignore_errors=True)
    for folder in ("src", "tests", "evaluation"):
        shutil.copytree(ROOT / folder, work / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    folder = "tests" if group.name == "press" else "tests/kernels"
    arguments = ["-p", "no:xdist", "-p", "no:cacheprovider"]
    if group.keywords:
        arguments += ["-k", group.keywords]
    settings = {
        "source_paths": ["src"],
        "only_mutate": [str(PACKAGE / file) for file in group.files],
        "also_copy": ["evaluation"],
        "pytest_add_cli_args": arguments,
        "pytest_add_cli_args_test_selection": [f"{folder}/{name}.py" for name in group.tests],
        # Only what runs on and on is out of time: where other work shares the machine, tests take their time.
        "timeout_multiplier": 30.0,
        "timeout_constant": 20.0,
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (work / "pyproject.toml").write_text(text + "\n[tool.mutmut]\n" + "\n".join(lines) + "\n", encoding="utf-8")

    outcome, names = Outcome(), {}
    for file in group.files:
        place = work / PACKAGE / file
        place.write_text(with_late_decorators(place.read_text(encoding="utf-8")), encoding="utf-8")
        module = ".".join((PACKAGE / file).with_suffix("").parts[1:])
        mutated = mutate_file_contents(str(place), place.read_text(encoding="utf-8"))
        here = [f"{module}.{name}" for name in mutated.mutant_names if not name.startswith("x_naive_")]
        here = [name for name in here if "__naive_" not in name]
        outcome.made[file] = len(here)
        names |= dict.fromkeys(here, file)
    drawn = sorted(random.Random(seed).sample(sorted(names), min(sample, len(names))))

    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", "1", *drawn]
    subprocess.run(command, cwd=work, env=environment, check=True, stdout=subprocess.DEVNULL)
    for meta in (work / "mutants").rglob("*.meta"):
        for name, code in json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"].items():
            if name not in drawn:
                continue
            outcome.tried[names[name]] += 1
            if code in (SURVIVED, NO_TESTS):
                show = [sys.executable, "-m", "mutmut", "show", name]
                diff = subprocess.run(
                    show, cwd=work, env=environment, check=True, capture_output=True, text=True
                ).stdout
                outcome.survivors[name] = diff
            else:  # a test failed, or the mutant ran on and on, or died
                outcome.killed[names[name]] += 1
    return outcome


def change_of(diff: str) -> str:
    """The lines that a mutant takes away and puts in, in one line of text."""
    changed = [line for line in diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return " → ".join(" ".join(line[1:].split()) for line in changed)


def report(outcomes: list[Outcome], sample: int, seed: int, seconds: float) -> str:
    """Figures and survivors, as Markdown."""
    reasons = yaml.safe_load(EXPLAINED.read_text(encoding="utf-8")) if EXPLAINED.exists() else {}
    made, tried, killed = (sum((getattr(o, name) for o in outcomes), Counter()) for name in ("made", "tried", "killed"))
    lines = [
        "# Mutation testing",
        "",
        f"`make mutation`: mutmut, at most {sample} mutants of each of {len(GROUPS)} groups of files, drawn with seed "
        f"{seed}; {seconds / 60:.0f} minutes in one process. Naive forms, which only tests use, and the Triton kernel "
        "are left out.",
        "",
        "| file | mutants | tried | killed | share |",
        "| --- | --- | --- | --- | --- |",
    ]
    for file in sorted(made):
        share = f"{killed[file] / tried[file]:.1%}" if tried[file] else "-"
        lines.append(f"| {file} | {made[file]} | {tried[file]} | {killed[file]} | {share} |")
    total = f"{sum(killed.values()) / sum(tried.values()):.1%}"
    lines.append(f"| all | {sum(made.values())} | {sum(tried.values())} | {sum(killed.values())} | {total} |")
    lines += ["", "## Survivors", "", "| mutant | change | why no test notices |", "| --- | --- | --- |"]
    for outcome in outcomes:
        for name, diff in sorted(outcome.survivors.items()):
            change = change_of(diff)
            reason = next((why for part, why in reasons.items() if part in change or part == name), "")
            cells = (name.removeprefix("kvpress_merging."), f"`{change}`", reason)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all groups and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=200, help="mutants of each group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--groups", nargs="+", default=[group.name for group in GROUPS])
    parser.add_argument("--report", type=Path, help="where the figures go; by default they are only printed")
    arguments = parser.parse_args()
    started = time.perf_counter()
    outcomes = []
    for group in GROUPS:
        if group.name in arguments.groups:
            work = ROOT / "build" / "mutation" / group.name
            outcomes.append(run_group(group, arguments.sample, arguments.seed, work))
            print(f"{group.name}: {sum(outcomes[-1].killed.values())} of {sum(outcomes[-1].tried.values())} killed")
    text = report(outcomes, arguments.sample, arguments.seed, time.perf_counter() - started)
    print(text)
    if arguments.report is not None:
        arguments.report.parent.mkdir(parents=True, exist_ok=True)
        arguments.report.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
