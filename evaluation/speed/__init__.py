# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
Time and memory of the cosine blend next to kvpress's own ``MergingPress.merge``, on this machine, in one run.

``python -m evaluation speed`` runs these subjects on the same keys, values and kept positions, over context, heads,
ratio and dtype, on the CPU (``python -m evaluation gpu`` measures on a GPU):

- *eviction*: gathering the survivors and nothing else. It is outside in all others;
- *kvpress*: ``kvpress.MergingPress(KnormPress(ratio)).merge``;
- *ours*: finding the evicted positions and ``cosine_blend``, with equal parameters and ``kernel="torch"``;
- *matching*: ``attention_match`` in place of the blend, with as many queries as by default;
- *product*: one matrix product per head of all evicted with all surviving keys, and nothing else: the floor of any
  exact search that asks the BLAS for it (in pieces of 1 GiB where it is larger);
- *tiles*: the same products in the tiles that ours takes them in.

Times are taken in rounds that run every subject once, and ratios are medians over rounds, so that a busy machine hurts
all alike. Extra memory is the growth of the peak of a fresh process during one call (on Linux; elsewhere it is left
out). --prefill times whole prefills as well. Beside the times stand the operations that a press asks of the device for
each layer, which no noise touches. Writes speed.json and speed.png.
"""

# ruff: noqa: RUF009
from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kvpress import SnapKVPress

from evaluation.cli import fail, parse_config
from evaluation.files import write_folder
from evaluation.speed.operations import operations_table
from evaluation.speed.prefill import INNER_PRESSES, measure_prefill
from evaluation.speed.subjects import DTYPES, SUBJECTS, Cell, measure_extra_bytes, measure_seconds
from kvpress_merging.kernels.rows import DEFAULT_TILE_BYTES

# What comes with the extra "eval" is imported where it is used: ``evaluation.gpu`` takes from this folder without it.


def _list(values: Sequence[Any], help: str) -> Any:
    return field(default_factory=lambda: list(values), metadata={"help": help})


@dataclass
class SpeedArguments:
    """What to measure: every combination of devices, contexts, heads, ratios and dtypes."""

    k_len: list[int] = _list([8192, 16_384, 32_768], "Tokens in the cache.")
    num_key_value_heads: list[int] = _list([8], "KV heads.")
    compression_ratio: list[float] = _list([0.5], "Share of the tokens evicted, in (0, 1).")
    dtype: list[str] = _list(["bfloat16"], f"Of the cache: {', '.join(DTYPES)}.")
    subjects: list[str] = _list(list(SUBJECTS), f"What: {', '.join(SUBJECTS)}.")
    head_dim: int = field(default=128, metadata={"help": "Length of a key or value."})
    prefill: list[int] = _list([], "Tokens of whole prefills to time, for instance 1024 4096 8192.")
    model: str = field(default="smollm2", metadata={"help": "For --prefill: built in, a folder or a hub id."})
    repeats: int = field(default=3, metadata={"help": "Rounds after one to warm up."})
    threads: int = field(default=0, metadata={"help": "CPU threads; 0 leaves PyTorch's choice."})
    tile_bytes: int = field(default=DEFAULT_TILE_BYTES, metadata={"help": "Max bytes of one tile of cosines."})
    output_dir: str = field(
        default="results/speed", metadata={"help": "Folder for speed.json and speed.png; one that is there is kept."}
    )

    def __post_init__(self) -> None:
        for name in ("k_len", "num_key_value_heads", "prefill", "head_dim", "repeats", "tile_bytes"):
            value = getattr(self, name)
            for number in value if isinstance(value, list) else [value]:
                if number < 1:
                    raise ValueError(f"{name} must be at least 1, got {number}")
        window = SnapKVPress().window_size
        for k_len in self.prefill:
            if k_len <= window:
                raise ValueError(f"prefill must be more than SnapKV's window of {window} tokens, got {k_len}")
        if self.threads < 0:
            raise ValueError(f"threads must be at least 0, got {self.threads}")
        for name, allowed in (("dtype", DTYPES), ("subjects", SUBJECTS)):
            for value in getattr(self, name):
                if value not in allowed:
                    raise ValueError(f"{name} must be among {', '.join(allowed)}, got {value!r}")
        for k_len, ratio in itertools.product([*self.k_len, *self.prefill], self.compression_ratio):
            if not 0 < int(k_len * ratio) < k_len:
                raise ValueError(f"compression_ratio must leave and evict some of {k_len} tokens, got {ratio}")

    def cells(self) -> list[Cell]:
        """The grid, the context varying fastest."""
        axes = self.dtype, self.num_key_value_heads, self.compression_ratio, sorted(set(self.k_len))
        return [
            Cell("cpu", k_len, heads, self.head_dim, ratio, dtype)
            for dtype, heads, ratio, k_len in itertools.product(*axes)
        ]


def measure(arguments: SpeedArguments) -> dict[str, Any]:
    """All figures of one run, as speed.json has them; see ``measure_cell``, ``growth`` and ``measure_prefill``."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "torch": torch.__version__,
    }
    # First, so that a model that is not there is told before minutes of layers.
    prefills = []
    if arguments.prefill:
        from evaluation.models import load_model

        model, _ = load_model(arguments.model)
        for k_len, ratio, name in itertools.product(arguments.prefill, arguments.compression_ratio, INNER_PRESSES):
            measured = measure_prefill(model, k_len, ratio, arguments.repeats, name)
            prefills.append({"device": str(model.device), **measured})
    rows: list[dict[str, Any]] = []
    for cell in arguments.cells():
        rows += measure_cell(cell, arguments)
    figures = {"layers": rows, "growth": growth(rows), "prefills": prefills, "operations": operations_table()}
    return {"arguments": asdict(arguments), "machine": machine, **figures}


def measure_cell(cell: Cell, arguments: SpeedArguments) -> list[dict[str, Any]]:
    """
    A row for each subject.

    Returns
    -------
    list of dict
        The cell's fields and ``subject``; ``seconds`` of each round and their median; the median ratios
        ``time_to_kvpress`` and ``share_of_product_rate``; ``products_per_second`` (multiplications and additions of the
        products that an exact search needs, over the median); ``extra_bytes`` and ``memory_to_kvpress``. None where the
        other subject was not run.
    """
    names = [name for name in SUBJECTS if name in arguments.subjects]
    rounds = measure_seconds(cell, names, arguments.repeats, arguments.tile_bytes)
    extra = {name: measure_extra_bytes(cell, name, arguments.tile_bytes, arguments.threads) for name in names}
    operations = 2 * cell.num_key_value_heads * cell.n_kept * cell.n_evicted * cell.head_dim

    rows: list[dict[str, Any]] = []
    for name in names:
        row: dict[str, Any] = {**asdict(cell), "subject": name}
        n_bytes, kvpress_bytes = extra[name], extra.get("kvpress")
        searches = name not in ("eviction", "matching")
        median = statistics.median(rounds.seconds[name])
        row |= {"seconds": rounds.seconds[name], "median_seconds": median, "extra_bytes": n_bytes}
        row["time_to_kvpress"] = rounds.median_ratio(name, "kvpress")
        row["memory_to_kvpress"] = n_bytes / kvpress_bytes if n_bytes is not None and kvpress_bytes else None
        row["share_of_product_rate"] = rounds.median_ratio("product", name) if searches else None
        row["products_per_second"] = operations / median if searches else None
        rows.append(row)
    return rows


def growth(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    How the time of each subject grows with the context, where there are two contexts at least.

    In each row ``from`` and ``to`` are the shortest and the longest context, ``times`` is how many times as long the
    second takes (the median over rounds), and ``exponent`` the slope of the logarithm of the median time over that of
    the context, by least squares.
    """
    fields = ("device", "num_key_value_heads", "head_dim", "compression_ratio", "dtype", "subject")
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["k_len"]):
        groups.setdefault(tuple((name, row[name]) for name in fields), []).append(row)
    grown = []
    for key, group in groups.items():
        if len(group) > 1:
            lengths, medians = (np.log([row[name] for row in group]) for name in ("k_len", "median_seconds"))
            times = statistics.median(b / a for a, b in zip(group[0]["seconds"], group[-1]["seconds"]))
            ends = {"from": group[0]["k_len"], "to": group[-1]["k_len"]}
            grown.append({**dict(key), **ends, "times": times, "exponent": float(np.polyfit(lengths, medians, 1)[0])})
    return grown


def main(argv: Sequence[str]) -> None:
    """Time everything with command-line arguments."""
    from rich.console import Console

    from evaluation.model_files import ModelUnavailableError
    from evaluation.speed.show import plot, show

    arguments = parse_config(SpeedArguments, argv, prog="python -m evaluation speed", description=__doc__ or "")
    try:
        figures = measure(arguments)
    except ModelUnavailableError as error:
        fail(f"python -m evaluation speed: {error}")
    console = Console()
    show(figures, console if console.is_terminal else Console(width=120))

    def write(place: Path) -> None:
        (place / "speed.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        plot(figures).savefig(place / "speed.png", dpi=150)

    print(f"Written to {write_folder(Path(arguments.output_dir).expanduser(), write)}")
