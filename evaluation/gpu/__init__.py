# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
What the owner of a GPU asks of kvpress-merging, answered in one run of some minutes.

``python -m evaluation gpu`` needs torch, transformers and kvpress; Triton, rich and matplotlib are used where they are
there. The most important comes first, and each figure is written as soon as it is there:

- *right*: every kernel against its naive form in float64, the CPU and a second run, and whether anything waits for the
  device during a prefill;
- *cost*: whole prefills of a model of Llama-3.1-8B's shape with random weights, with the bare press, merging, matching
  and kvpress's own merge around it;
- *layer*: where the time of one layer goes;
- *decode*: tokens a second after compression.

What does not fit the time or the memory, or cannot run there, is left out, and its row says why. Ends with one table,
and writes gpu.json, gpu.md (to paste into an issue) and gpu.png. Exit status: 0; 1 if a kernel was wrong or something
failed; 2 for a mistake in the flags, or if there is no GPU; 130 after Ctrl-C.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from evaluation.cli import fail, parse_config
from evaluation.gpu.bench import FULL, QUICK, Bench, why_missing
from evaluation.gpu.cost import measure_cost
from evaluation.gpu.decode import measure_decoding
from evaluation.gpu.layer import measure_layer
from evaluation.gpu.record import Record
from evaluation.gpu.right import check_kernels
from evaluation.gpu.show import has_failed, show
from evaluation.gpu.waits import check_waits
from evaluation.speed.rounds import failure

PARTS = ("right", "cost", "layer", "decode")

Step = tuple[str, str, Callable[[Bench], Iterator[dict[str, Any]]]]


@dataclass
class GpuArguments:
    """Where to measure, and for how long."""

    minutes: float = field(default=9.0, metadata={"help": "How long to take, at most; what does not fit is left out."})
    device: str = field(default="cuda", metadata={"help": "cuda, cuda:1, ...; with --quick also cpu."})
    quick: bool = field(
        default=False,
        metadata={"help": "All of it small, to rehearse: on the CPU where there is no GPU, in under a minute."},
    )
    output_dir: str = field(
        default="results/gpu", metadata={"help": "Folder for what is written; one that is there is kept."}
    )

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"minutes must be above 0, got {self.minutes}")
        kind, _, number = self.device.partition(":")
        if kind not in ("cuda", "cpu") or (number and not number.isdigit()):
            raise ValueError(f"device must be cuda, cuda:<number> or cpu, got {self.device!r}")
        if kind == "cpu" and not self.quick:
            raise ValueError("device cpu is for a rehearsal alone: add --quick")


def steps(k_lens: tuple[int, int, int]) -> list[Step]:
    """What is measured, in this order: its part, what to call it, and what yields its rows."""
    short, long, longest = k_lens
    return [
        ("right", "kernels", partial(check_kernels, kernels=("torch", "auto", "match"))),
        ("right", "waits", check_waits),
        ("cost", f"prefills of {short:,} tokens", partial(measure_cost, k_len=short)),
        ("cost", f"prefills of {long:,} tokens", partial(measure_cost, k_len=long)),
        # By request alone, and so after what everybody gets: a kernel that breaks takes CUDA in this process with it.
        ("right", "Triton's kernel", partial(check_kernels, kernels=("triton",))),
        *(("layer", f"a layer of {k_len:,} tokens", partial(measure_layer, k_len=k_len)) for k_len in k_lens),
        ("decode", f"decoding after {long:,} tokens", partial(measure_decoding, k_len=long)),
        ("cost", f"prefills of {longest:,} tokens", partial(measure_cost, k_len=longest)),
    ]


def main(argv: Sequence[str]) -> None:
    """Measure with command-line arguments."""
    started = time.monotonic()
    arguments = parse_config(GpuArguments, argv, prog="python -m evaluation gpu", description=__doc__ or "")
    device = _device(arguments)
    sizes = QUICK if arguments.quick else FULL
    if device.type == "cpu":
        torch.set_num_threads(1)  # a rehearsal's tensors are too small to be shared out
    bench = Bench(device, sizes, started + 60 * arguments.minutes)
    record = Record.start(Path(arguments.output_dir).expanduser(), arguments, device)
    try:
        run(bench, record, steps(sizes.k_lens))
        record.end("complete")
    except KeyboardInterrupt:
        record.end("interrupted")
        show(record.figures)
        print(f"Interrupted; what was measured is in {record.folder}")
        raise SystemExit(130) from None
    show(record.figures)
    print(f"Written to {record.folder}")
    if has_failed(record.figures):
        raise SystemExit(1)


def run(bench: Bench, record: Record, steps: Sequence[Step]) -> None:
    """Take one step after the other: what one of them raises is recorded, and the next one is taken."""
    for part, name, step in steps:
        print(f"{name} ({bench.seconds_left:.0f} s left)", flush=True)
        try:
            for row in step(bench):
                record.add({"part": part, **row})
        except Exception as error:
            record.add({"part": part, "step": name, **why_missing(failure(error))})
        record.write_table()


def _device(arguments: GpuArguments) -> torch.device:
    """The device that is asked for, or the CPU for a rehearsal without a GPU."""
    device = torch.device(arguments.device)
    if device.type == "cpu":
        return device
    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if n_devices == 0 and arguments.quick:
        print("No GPU that this PyTorch can use: the CPU is taken.")
        return torch.device("cpu")
    if n_devices == 0:
        fail(
            f"python -m evaluation gpu: there is no GPU that this PyTorch ({torch.__version__}) can use; --quick "
            "rehearses on the CPU"
        )
    if (device.index or 0) >= n_devices:
        fail(f"python -m evaluation gpu: there is no {device}, but {n_devices} GPU{'s' if n_devices > 1 else ''}")
    device = torch.device("cuda", device.index or 0)
    torch.cuda.set_device(device)
    return device
