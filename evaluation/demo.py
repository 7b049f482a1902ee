# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Compare full cache, eviction, merging and re-fitting on a real text: as a table, a file and a plot."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers.utils.logging as transformers_logging
from kvpress import BasePress, ExpectedAttentionPress, KnormPress, SnapKVPress
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, pipeline

from evaluation.cli import fail, parse_config
from evaluation.demo_report import plot, show
from evaluation.fidelity import Fidelity, measure_fidelity, measure_reference
from evaluation.models import BUILT_IN_MODEL, ModelUnavailableError, load_model
from evaluation.results import write_folder
from evaluation.text import Window, cut_windows, read_text
from kvpress_merging import AttentionMatchingPress, MergingPress, __version__

PRESSES: dict[str, Callable[[float], BasePress]] = {
    "Knorm": KnormPress,
    "ExpectedAttention": ExpectedAttentionPress,
    "SnapKV": SnapKVPress,
}
METHODS: dict[str, Callable[[BasePress], BasePress]] = {
    "evicted": lambda press: press,
    "merged": MergingPress,
    "matched": AttentionMatchingPress,
}
"""What becomes of what a press evicts."""

COMPRESSION_RATIOS = (0.5, 0.75)
"""The ratios measured; the needle question is asked at the first."""

NEEDLE_CONTEXT_LENGTH = 800
"""Tokens of text around the needle."""
NEEDLE_QUESTION = "\n\nWhich number opens the blue locker at the harbour? Answer with the number."


@dataclass
class DemoConfig:
    """
    What the demo measures.

    Raises
    ------
    ValueError
        If a length or number is too small, or the text file does not exist.
    """

    model: str = field(default=BUILT_IN_MODEL, metadata={"help": "the built-in 'smollm2', a folder, or a hub id"})
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

    def __post_init__(self):
        for name, least in (("n_contexts", 1), ("context_length", 128), ("continuation_length", 2)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        if self.text_file is not None and not Path(self.text_file).expanduser().is_file():
            raise ValueError(f"--text_file: there is no file {self.text_file!r}")


@dataclass(frozen=True)
class Comparison:
    """
    A press alone, with merging and with a re-fit, at one ratio, over the same windows.

    Parameters
    ----------
    press : str
        Name of the inner press.
    compression_ratio : float
        Share of the cache that it evicts.
    results : dict of str to list[Fidelity]
        For each of ``METHODS``, one per window.
    """

    press: str
    compression_ratio: float
    results: dict[str, list[Fidelity]] = field(default_factory=lambda: {method: [] for method in METHODS})

    def mean(self, method: str, name: str) -> float:
        """Mean over the windows of a figure of ``Fidelity``."""
        return statistics.fmean(getattr(fidelity, name) for fidelity in self.results[method])

    def kl_change(self, method: str) -> float:
        """Change of the mean KL divergence against eviction, in percent; below 0, it is nearer to the full cache."""
        return _change(self.mean(method, "kl"), self.mean("evicted", "kl"))

    def kl_change_per_window(self, method: str) -> list[float]:
        """The same for each window."""
        return [_change(after.kl, before.kl) for after, before in zip(self.results[method], self.results["evicted"])]

    @property
    def label(self) -> str:
        """How tables and plots name it."""
        return f"{self.press} {self.compression_ratio:g}"


@dataclass(frozen=True)
class NeedleAnswer:
    """What the model said when asked for the needle. ``found`` tells whether the number is in it."""

    cache: str
    answer: str
    found: bool


def main(argv: Sequence[str]) -> None:
    """Run the demo with command-line arguments."""
    config = parse_config(DemoConfig, argv, prog="python -m evaluation demo", description=__doc__ or "")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("evaluation").setLevel(logging.WARNING if config.quiet else logging.INFO)
    if config.quiet:
        transformers_logging.disable_progress_bar()
    started = time.perf_counter()
    try:
        model, tokenizer = load_model(config.model, device=config.device)
        text = read_text(config.text_file)
        windows = cut_windows(text, tokenizer, config.n_contexts, config.context_length, config.continuation_length)
        context, number = hide_needle(text, tokenizer, config.seed)
    except (ModelUnavailableError, OSError, ValueError) as error:
        fail(f"python -m evaluation demo: {error}")
    n_presses = len(METHODS) * len(PRESSES)
    n_steps = len(windows) * (1 + n_presses * len(COMPRESSION_RATIOS)) + 1 + n_presses
    with tqdm(total=n_steps, desc="demo", unit="run", disable=config.quiet) as progress:
        comparisons = compare(model, windows, progress)
        answers = ask_needle(model, tokenizer, context, number, progress)
    seconds = time.perf_counter() - started

    record = describe(config, model, text, comparisons, answers, number, seconds)
    subtitle = f"{Path(config.model).name}, {len(windows)} windows of {config.context_length} tokens"

    def write(place: Path) -> None:
        (place / "demo.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        plot(comparisons, subtitle, place / "demo.png")

    folder = write_folder(Path(config.output_dir).expanduser(), write)
    show(comparisons, answers, NEEDLE_QUESTION, number)
    print(f"\nWritten to {folder / 'demo.json'} and {folder / 'demo.png'} after {seconds:.0f} s.")


def compare(model: PreTrainedModel, windows: Sequence[Window], progress: tqdm) -> list[Comparison]:
    """
    Measure every press at every ratio, by each method, on every window.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    windows : Sequence[Window]
        What to read.
    progress : tqdm
        Advances by one for each prefill.

    Returns
    -------
    list[Comparison]
        In the order of ``PRESSES``, then of ``COMPRESSION_RATIOS``.
    """
    comparisons = [Comparison(name, ratio) for name in PRESSES for ratio in COMPRESSION_RATIOS]
    # The first prefill of a process pays for allocations and thread pools; no press should be charged for that.
    measure_reference(model, windows[0])
    for window in windows:
        reference = measure_reference(model, window)
        progress.update()
        for comparison in comparisons:
            for method, wrap in METHODS.items():
                press = wrap(PRESSES[comparison.press](comparison.compression_ratio))
                comparison.results[method].append(measure_fidelity(model, press, reference))
                progress.update()
    return comparisons


def hide_needle(text: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[str, str]:
    """
    Put one sentence with a number into the beginning of a text.

    Parameters
    ----------
    text : str
        Its first ``NEEDLE_CONTEXT_LENGTH`` tokens are the haystack.
    tokenizer : PreTrainedTokenizerBase
        Measures the haystack.
    seed : int
        Draws the number and the place, between a fifth and four fifths of the way.

    Returns
    -------
    tuple[str, str]
        The haystack with the needle in it, and the number.
    """
    generator = random.Random(seed)
    number = str(generator.randint(10_000, 99_999))
    token_ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:NEEDLE_CONTEXT_LENGTH]
    haystack = str(tokenizer.decode(token_ids))
    place = int(len(haystack) * generator.uniform(0.2, 0.8))
    # Between two paragraphs, if the text has any from here on.
    place = max(place, haystack.find("\n\n", place))
    needle = f"\n\nThe number that opens the blue locker at the harbour is {number}."
    return haystack[:place] + needle + haystack[place:], number


def ask_needle(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, number: str, progress: tqdm
) -> list[NeedleAnswer]:
    """Ask for the needle with the full cache, then with each press at the first ratio, by each method."""
    generate = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer)  # type: ignore[call-overload]
    ratio = COMPRESSION_RATIOS[0]
    presses: dict[str, BasePress | None] = {"full cache": None}
    for name, press_class in PRESSES.items():
        for method, wrap in METHODS.items():
            presses[f"{name} {ratio:g}, {method}"] = wrap(press_class(ratio))
    answers = []
    for name, press in presses.items():
        answer = generate(context, question=NEEDLE_QUESTION, press=press, max_new_tokens=24)["answer"]
        answers.append(NeedleAnswer(name, answer.strip(), number in answer))
        progress.update()
    return answers


def describe(
    config: DemoConfig,
    model: PreTrainedModel,
    text: str,
    comparisons: Sequence[Comparison],
    answers: Sequence[NeedleAnswer],
    number: str,
    seconds: float,
) -> dict[str, Any]:
    """All that was measured, and all that it depends on, as what JSON can hold."""
    packages = {package: version(package) for package in ("torch", "transformers", "kvpress")}
    return {
        "config": asdict(config),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": seconds,
        "versions": {"python": platform.python_version(), **packages, "kvpress-merging": __version__},
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device),
        },
        "model": {
            "architecture": type(model).__name__,
            "parameters": model.num_parameters(),
            "dtype": str(model.dtype),
        },
        "text": {"characters": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()},
        "comparisons": [
            {
                "press": comparison.press,
                "compression_ratio": comparison.compression_ratio,
                "methods": {
                    method: {
                        "kl": comparison.mean(method, "kl"),
                        "kl_change_percent": comparison.kl_change(method),
                        "kl_change_percent_per_window": comparison.kl_change_per_window(method),
                        "windows": [asdict(fidelity) for fidelity in results],
                    }
                    for method, results in comparison.results.items()
                },
            }
            for comparison in comparisons
        ],
        "needle": {
            "number": number,
            "question": NEEDLE_QUESTION.strip(),
            "answers": [asdict(answer) for answer in answers],
        },
    }


def _change(after: float, before: float) -> float:
    return 100 * (after / before - 1) if before else 0.0
