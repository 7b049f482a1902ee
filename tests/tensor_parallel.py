# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
One process of a group that holds a model together: prefills with every press and gathers the cache.

torchrun --nproc_per_node 2 tests/tensor_parallel.py CHECKPOINT OUT: the first process writes to OUT, for each press,
the layers' keys and values with the heads of all processes side by side.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from kvpress import KeyDiffPress, KnormPress, StreamingLLMPress
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, DynamicCache

from kvpress_merging import AttentionMatchingPress, MergingPress

SCORERS = {
    "Knorm": lambda: KnormPress(0.5),
    "KeyDiff": lambda: KeyDiffPress(0.6),
    "StreamingLLM": lambda: StreamingLLMPress(0.5),
}
PRESSES = {
    f"{wrap.__name__} {name}": lambda wrap=wrap, make=make: wrap(make())
    for wrap in (MergingPress, AttentionMatchingPress)
    for name, make in SCORERS.items()
}
INPUT_IDS = torch.randperm(240, generator=torch.Generator().manual_seed(3))[None, :96] + 10


def prefill(model, press) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], dict]:
    """Keys and values of every layer, and the press's report."""
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        model.model(input_ids=INPUT_IDS, past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers], press.report.to_dict()


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim=1)


def main(checkpoint: str, out: str) -> None:
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, tp_plan="auto").eval()
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight = weight.to_local() if isinstance(weight, DTensor) else weight  # as transformers 4 keeps it
    results: dict = {"rows of q_proj": weight.shape[0]}
    for name, make in PRESSES.items():
        layers, report = prefill(model, make())
        results[name] = [tuple(gathered(part) for part in layer) for layer in layers], report
    if dist.get_rank() == 0:
        torch.save(results, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    # Without the interpreter's own end: now and then a thread of the process group outlived it, and the process was
    # aborted ("terminate called without an active exception"), and with it the other one.
    os._exit(0)
