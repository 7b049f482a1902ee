# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
Break the kernels, ``merge_on_evict_press.py`` and ``checks.py`` in one place at a time, and see whether a test notices.

    python tests/mutate.py --report evaluation/results/trust/mutation.md

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
import resource
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.stats import status_by_exit_code

ROOT = Path(__file__).parents[1]
PACKAGE = Path("src/kvpress_merging")
EXPLAINED = Path(__file__).with_name("mutants.yaml")
# Address space in bytes: a mutant that asks for more memory than there is fails, and the machine does not.
MOST_MEMORY = 12 * 2**30
# How mutmut calls what no test noticed, and what it did not try to the end.
SURVIVED = ("survived", "no tests")
NOT_TRIED = ("not checked", "check was interrupted by user", "skipped")


# Not the one that looks at who called, between which and the mutant mutmut stands.
TRIAL_TESTS = "(test_trial.py or named_once or made_once) and not points_at_who_asked"
PRESS_TESTS = (
    "merge_on_evict_press",
    "merging_press",
    "wrapping",
    "faults",
    "decoding",
    "caches",
    "padding",
    "bad_input",
    "pipeline",
    "every_press",
    "families",
    "padding",
)


@dataclass(frozen=True)
class Group:
    """Files to mutate, and the tests that have to notice: few and fast ones, as pytest's ``-k`` picks them."""

    name: str
    files: tuple[str, ...]
    tests: tuple[str, ...]
    keywords: str = ""
    folder: str = "tests/kernels"


GROUPS = (
    Group("blend", ("kernels/blend.py",), ("test_blend",)),
    Group("match", ("kernels/match.py", "kernels/nearby.py"), ("test_match", "test_nearby")),
    Group(
        "nearest",
        ("kernels/nearest.py", "kernels/products.py"),
        ("test_nearest", "test_products", "test_nearest_triton"),
        "not test_nearest_triton or auto or takes_the_kernel or machine or too_long",
    ),
    Group("rows", ("kernels/rows.py",), ("test_rows", "test_nearest")),
    Group("trial", ("kernels/trial.py",), ("test_trial", "test_nearest_triton"), TRIAL_TESTS),
    Group(
        "press",
        ("merge_on_evict_press.py", "checks.py"),
        tuple(f"test_{name}" for name in PRESS_TESTS),
        "not leaves_no_tracks and (not (an_exception_inside or test_every_press or test_families) "
        "or AdaKV or KVzip or KVCompose or Composed or nothing or third or gemma)",
        folder="tests",
    ),
)


@dataclass
class Outcome:
    """What became of the mutants of a group."""

    made: Counter = field(default_factory=Counter)
    tried: Counter = field(default_factory=Counter)
    killed: Counter = field(default_factory=Counter)
    survivors: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def with_late_decorators(source: str) -> str:
    """mutmut passes by functions with decorators, so the one that kernels have is put on where the file ends."""
    decorated = re.compile(r"^@torch\.no_grad\(\)\n(?=def (\w+))", flags=re.MULTILINE)
    late = [f"{name} = torch.no_grad()({name})\n" for name in decorated.findall(source)]
    return decorated.sub("", source) + "\n\n" * bool(late) + "".join(late)


def prepare(group: Group, work: Path) -> None:
    """Make a copy of the project in ``work`` on which mutmut mutates and tests this group alone."""
    shutil.rmtree(work, ignore_errors=True)
    for folder in ("src", "tests", "evaluation"):
        shutil.copytree(ROOT / folder, work / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for file in group.files:
        place = work / PACKAGE / file
        place.write_text(with_late_decorators(place.read_text(encoding="utf-8")), encoding="utf-8")
    settings = {
        "source_paths": ["src"],
        "only_mutate": [str(PACKAGE / file) for file in group.files],
        "also_copy": ["evaluation"],
        "pytest_add_cli_args": ["-p", "no:xdist", "-p", "no:cacheprovider", "-k", group.keywords],
        "pytest_add_cli_args_test_selection": [f"{group.folder}/{name}.py" for name in group.tests],
        # Only what runs on and on is out of time: where other work shares the machine, tests take their time.
        "timeout_multiplier": 30.0,
        "timeout_constant": 20.0,
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (work / "pyproject.toml").write_text(text + "\n[tool.mutmut]\n" + "\n".join(lines) + "\n", encoding="utf-8")


def mutants(group: Group, work: Path) -> dict[str, str]:
    """The names of all mutants of a group, and the file that each is of."""
    names: dict[str, str] = {}
    for file in group.files:
        place = work / PACKAGE / file
        module = ".".join((PACKAGE / file).with_suffix("").parts[1:])
        mutated = mutate_file_contents(str(place), place.read_text(encoding="utf-8"))
        names |= {f"{module}.{name}": file for name in mutated.mutant_names if "_naive_" not in name}
    return names


def run_group(group: Group, sample: int, seed: int, work: Path, *, is_run: bool) -> Outcome:
    """Try a sample of a group's mutants, or only read what became of it when it was last tried."""
    if is_run:
        prepare(group, work)
    names = mutants(group, work)
    drawn = sorted(random.Random(seed).sample(sorted(names), min(sample, len(names))))

    def mutmut(*arguments: str) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "mutmut", *arguments]
        done = subprocess.run(
            command,
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY)),
        )
        if done.returncode != 0:
            raise RuntimeError(f"mutmut failed in {work}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return done.stdout

    if is_run:
        used_before = seconds_used()
        mutmut("run", "--max-children", "1", *drawn)
        (work / "seconds").write_text(str(seconds_used() - used_before), encoding="utf-8")
    outcome = Outcome(made=Counter(names.values()), seconds=float((work / "seconds").read_text(encoding="utf-8")))
    for meta in (work / "mutants").rglob("*.meta"):
        codes = json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"]
        for name in codes.keys() & drawn:
            status = status_by_exit_code[codes[name]]
            if status in NOT_TRIED:
                raise RuntimeError(f"{name} was not tried ({status}): was the sample another when {work} was made?")
            outcome.tried[names[name]] += 1
            if status in SURVIVED:
                outcome.survivors[name] = change_of(mutmut("show", name))
            else:  # a test failed, or the mutant ran on and on, or died
                outcome.killed[names[name]] += 1
    return outcome


def seconds_used() -> float:
    """Of a core, by processes that this one started: on a machine that is shared, a clock would tell of others too."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def change_of(diff: str) -> str:
    """The lines that a mutant takes away and puts in, in one line of text."""
    changed = [line for line in diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return " → ".join(" ".join(line[1:].split()) for line in changed)


def report(outcomes: list[Outcome], sample: int, seed: int) -> str:
    """Figures and survivors, as Markdown."""
    seconds = sum(outcome.seconds for outcome in outcomes)
    reasons = yaml.safe_load(EXPLAINED.read_text(encoding="utf-8")) if EXPLAINED.exists() else {}
    made, tried, killed = (sum((getattr(o, name) for o in outcomes), Counter()) for name in ("made", "tried", "killed"))
    lines = [
        "# Mutation testing",
        "",
        f"`make mutation`: mutmut, at most {sample} mutants of each of {len(GROUPS)} groups of files, drawn with seed "
        f"{seed}; {seconds / 60:.0f} minutes of one core. Naive forms, which only tests use, and the Triton kernel "
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
        for name, change in sorted(outcome.survivors.items()):
            reason = next((why for part, why in reasons.items() if part in change or part == name), "")
            cells = (name.removeprefix("kvpress_merging."), f"`{change}`", reason)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all groups and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=100, help="mutants of each group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--groups", nargs="+", default=[group.name for group in GROUPS])
    parser.add_argument("--read_only", action="store_true", help="run nothing: report what the last run left")
    parser.add_argument("--report", type=Path, help="where the figures go; by default they are only printed")
    arguments = parser.parse_args()
    outcomes = []
    for group in GROUPS:
        if group.name in arguments.groups:
            work = ROOT / "build" / "mutation" / group.name
            outcomes.append(run_group(group, arguments.sample, arguments.seed, work, is_run=not arguments.read_only))
            print(f"{group.name}: {sum(outcomes[-1].killed.values())} of {sum(outcomes[-1].tried.values())} killed")
    text = report(outcomes, arguments.sample, arguments.seed)
    print(text)
    if arguments.report is not None:
        arguments.report.parent.mkdir(parents=True, exist_ok=True)
        arguments.report.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
