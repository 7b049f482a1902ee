# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
Time and memory of the cosine blend next to kvpress's own ``MergingPress.merge``, on this machine, in one run.

``python -m evaluation speed`` prints a table of four subjects on the same keys, values and kept positions:

- *kvpress*: ``kvpress.MergingPress(KnormPress(ratio)).merge``;
- *ours*: finding the evicted positions and :func:`kvpress_merging.kernels.blend.cosine_blend`, with equal parameters;
- *product*: one matrix product per head of all evicted with all surviving keys, in float32, and nothing else: the floor
  of any exact search that asks the BLAS for it (in pieces of 1 GiB where it is larger);
- *tiles*: the same products in the tiles that ours takes them in.

Gathering the survivors, which eviction without merging does as well, is outside in all four. Times are taken in rounds
that run every subject once, and ratios are medians over rounds, so that a busy machine hurts all alike. Extra memory is
the growth of the peak resident set during one call in a fresh process of its own, read from ``/proc`` (Linux; elsewhere
it is left out).
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from kvpress import KnormPress, MergingPress
from rich.console import Console
from rich.table import Table

from evaluation.cli import parse_config
from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels.blend import cosine_blend
from kvpress_merging.kernels.nearest import tile_shape
from kvpress_merging.kernels.rows import DEFAULT_TILE_BYTES

SUBJECTS = ("kvpress", "ours", "product", "tiles")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class SpeedArguments:
    """What to measure."""

    k_len: int = field(default=16_384, metadata={"help": "Tokens in the cache."})
    num_key_value_heads: int = field(default=8, metadata={"help": "KV heads."})
    head_dim: int = field(default=128, metadata={"help": "Length of a key or value."})
    dtype: str = field(default="bfloat16", metadata={"help": f"Of the cache: {', '.join(DTYPES)}."})
    compression_ratio: float = field(default=0.5, metadata={"help": "Share of the tokens evicted, in (0, 1)."})
    repeats: int = field(default=5, metadata={"help": "Rounds after one to warm up."})
    threads: int = field(default=0, metadata={"help": "CPU threads; 0 leaves PyTorch's choice."})
    tile_bytes: int = field(default=DEFAULT_TILE_BYTES, metadata={"help": "Most bytes of one tile of cosines."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write the figures to."})

    def __post_init__(self) -> None:
        for name in ("k_len", "num_key_value_heads", "head_dim", "repeats", "tile_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.threads < 0:
            raise ValueError(f"threads must be at least 0, got {self.threads}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not 0 < int(self.k_len * self.compression_ratio) < self.k_len:
            raise ValueError(f"compression_ratio must leave and evict some tokens, got {self.compression_ratio}")


def make_subject(name: str, arguments: SpeedArguments) -> Callable[[], Any]:
    """One call of a subject on inputs that depend on the arguments alone."""
    bsz, heads, k_len, head_dim = 1, arguments.num_key_value_heads, arguments.k_len, arguments.head_dim
    n_kept = k_len - int(k_len * arguments.compression_ratio)
    generator = torch.Generator().manual_seed(0)
    keys = torch.empty(bsz, heads, k_len, head_dim, dtype=DTYPES[arguments.dtype])
    values = torch.empty_like(keys)
    # Head by head, so that a float32 copy of all heads does not raise the peak before the measurement.
    for tensor in (keys, values):
        for h in range(heads):
            tensor[:, h] = torch.randn(bsz, k_len, head_dim, generator=generator).to(tensor.dtype)
    kept = torch.rand(bsz, heads, k_len, generator=generator).topk(n_kept, dim=-1).indices

    if name == "kvpress":
        press = MergingPress(KnormPress(arguments.compression_ratio))
        return lambda: press.merge(keys, values, kept)

    if name == "ours":
        index = kept[..., None].expand(-1, -1, -1, head_dim)
        kept_keys, kept_values = keys.gather(2, index), values.gather(2, index)
        return lambda: cosine_blend(
            keys, values, kept_keys, kept_values, Eviction.from_kept(kept, k_len), tile_bytes=arguments.tile_bytes
        )

    n_evicted = k_len - n_kept
    n_rows, n_columns = n_kept, max(1, min(n_evicted, 2**28 // n_kept))
    if name == "tiles":
        _, n_rows, n_columns = tile_shape(n_kept, n_evicted, keys.device, arguments.tile_bytes)
    float_keys = keys[0, 0].float()
    survivors, evicted = float_keys[:n_kept].split(n_rows), float_keys[n_kept:].split(n_columns)
    buffer = torch.empty(len(survivors[0]) * len(evicted[0]))

    def products() -> None:
        for _ in range(heads):
            for columns in evicted:
                for rows in survivors:
                    out = buffer[: len(rows) * len(columns)].view(len(rows), len(columns))
                    torch.mm(rows, columns.T, out=out)

    return products


def measure_seconds(arguments: SpeedArguments) -> dict[str, list[float]]:
    """Seconds of every call, for each subject, round by round."""
    subjects = {name: make_subject(name, arguments) for name in SUBJECTS}
    seconds: dict[str, list[float]] = {name: [] for name in SUBJECTS}
    for call in subjects.values():
        call()
    for _ in range(arguments.repeats):
        for name, call in subjects.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _resident_bytes(entry: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(entry + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no entry {entry}")


def _peak_of_one_call(name: str, arguments: SpeedArguments) -> int:
    """Bytes by which one call raises the peak resident set of this process, which runs nothing else."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # A small call first: what libraries and threads allocate once is not the subject's.
    make_subject(name, SpeedArguments(k_len=256, num_key_value_heads=1, head_dim=arguments.head_dim))()
    call = make_subject(name, arguments)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = _resident_bytes("VmRSS")
    call()
    return _resident_bytes("VmHWM") - before


def measure_extra_bytes(arguments: SpeedArguments) -> dict[str, int | None]:
    """Extra peak memory of one call of each subject, each in a fresh process; None where there is no ``/proc``."""
    if not Path("/proc/self/clear_refs").exists():
        return dict.fromkeys(SUBJECTS)
    extra: dict[str, int | None] = {}
    for name in SUBJECTS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            extra[name] = pool.apply(_peak_of_one_call, (name, arguments))
    return extra


def measure(arguments: SpeedArguments) -> dict[str, Any]:
    """
    All figures of one run.

    Returns
    -------
    dict
        ``arguments``, ``machine`` and ``subjects``: for each subject the ``seconds`` of each round, their median, the
        extra peak memory in bytes, both as a ratio to kvpress's, and the share of the rate of the product alone.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    extra = measure_extra_bytes(arguments)
    seconds = measure_seconds(arguments)

    def median_ratio(numerator: str, denominator: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[numerator], seconds[denominator]))

    kvpress_bytes = extra["kvpress"]
    subjects = {}
    for name in SUBJECTS:
        n_bytes = extra[name]
        subjects[name] = {
            "seconds": seconds[name],
            "median_seconds": statistics.median(seconds[name]),
            "extra_bytes": n_bytes,
            "time_to_kvpress": median_ratio(name, "kvpress"),
            "memory_to_kvpress": n_bytes / kvpress_bytes if n_bytes is not None and kvpress_bytes else None,
            "share_of_product_rate": median_ratio("product", name),
        }
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": load,
        "torch": torch.__version__,
    }
    return {"arguments": asdict(arguments), "machine": machine, "subjects": subjects}


def print_table(figures: dict[str, Any], console: Console) -> None:
    """Print the figures of :func:`measure`."""
    arguments, machine = figures["arguments"], figures["machine"]
    table = Table(
        title=f"{arguments['k_len']:,} tokens, {arguments['num_key_value_heads']} heads, head_dim"
        f" {arguments['head_dim']}, {arguments['dtype']}, ratio {arguments['compression_ratio']}",
        caption=f"median of {arguments['repeats']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"load average before {machine['load_before']:.1f}",
    )
    for heading in ("", "time", "extra memory", "time to kvpress", "memory to kvpress", "share of the product's rate"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in figures["subjects"].items():
        n_bytes, memory_ratio = row["extra_bytes"], row["memory_to_kvpress"]
        table.add_row(
            name,
            f"{row['median_seconds']:.3f} s",
            "not measured" if n_bytes is None else f"{n_bytes / 1e6:,.0f} MB",
            f"{row['time_to_kvpress']:.2f}",
            "" if memory_ratio is None else f"{memory_ratio:.2f}",
            f"{row['share_of_product_rate']:.0%}",
        )
    console.print(table)


def main(argv: Sequence[str]) -> None:
    """Time everything with command-line arguments."""
    arguments = parse_config(SpeedArguments, argv, prog="python -m evaluation speed", description=__doc__ or "")
    figures = measure(arguments)
    print_table(figures, Console())
    if arguments.output is not None:
        output = Path(arguments.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(figures, indent=2) + "\n")
