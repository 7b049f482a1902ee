# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
How many operations a press asks of the device for each layer: on a GPU each of them is a kernel to launch.

Counted are PyTorch's operations below autograd that are no views, in a prefill of a tiny random model, over those of
the same prefill with the bare press.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from kvpress import AdaKVPress, BasePress, KnormPress, SnapKVPress
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvpress_merging import AttentionMatchingPress, MergingPress

PRESSES: Mapping[str, Callable[[BasePress], BasePress]] = {
    "merging": MergingPress,
    "matching": AttentionMatchingPress,
}
EVICTIONS: Mapping[str, Callable[[float], BasePress]] = {
    "even": lambda ratio: KnormPress(ratio),
    "ragged": lambda ratio: AdaKVPress(SnapKVPress(ratio, window_size=16)),
}
"""An inner press for each kind of eviction."""


MASK_INDEX = "index by a mask"
"""What an operation is called whose index is a mask: how much it finds has to be read from the mask first."""


class OperationCounter(TorchDispatchMode):
    """
    Counts operations that are no views while it is entered.

    Parameters
    ----------
    folder : str
        Operations are told apart by the line of code that asked for them: the innermost in a file whose path has this
        in it.
    """

    def __init__(self, folder: str = "kvpress") -> None:
        super().__init__()
        self.folder = folder
        self.by_line: Counter[tuple[str, str]] = Counter()

    @property
    def n_operations(self) -> int:
        """How many there were."""
        return sum(self.by_line.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not func.is_view:
            name = func.overloadpacket.__name__
            self.by_line[self.line(), MASK_INDEX if _indexes_by_mask(name, args) else name] += 1
        return func(*args, **(kwargs or {}))

    def line(self) -> str:
        """The line of code that asks for what is just being counted, by whoever calls this."""
        frame = sys._getframe(2)
        while frame is not None and self.folder not in frame.f_code.co_filename:
            frame = frame.f_back  # type: ignore[assignment]
        return "elsewhere" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _indexes_by_mask(name: str, args: tuple) -> bool:
    return name.startswith("index") and any(
        isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
        for index in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
    )


def tiny_llama(num_key_value_heads: int, num_hidden_layers: int = 2) -> PreTrainedModel:
    """A random model whose attention is far from uniform, with head_dim 16."""
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2 * num_key_value_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=16,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def operations_of_prefill(press: BasePress, model: PreTrainedModel, bsz: int, k_len: int) -> Counter[tuple[str, str]]:
    """Operations of one prefill by the line that asked for them and their name; what is made once is made before."""
    input_ids = torch.randint(100, (bsz, k_len), generator=torch.Generator().manual_seed(0)).to(model.device)
    for _ in range(2):
        counter = OperationCounter()
        with torch.no_grad(), press(model), counter:
            model(input_ids, past_key_values=DynamicCache())
    return counter.by_line


def operations_per_layer(
    name: str, eviction: str, *, num_key_value_heads: int = 4, bsz: int = 1, k_len: int = 1024, ratio: float = 0.5
) -> tuple[float, dict[tuple[str, str], float]]:
    """
    Operations of a press for each layer, over those of the bare press.

    Parameters
    ----------
    name, eviction : str
        Of :data:`PRESSES` and :data:`EVICTIONS`.
    num_key_value_heads, bsz, k_len, ratio
        The model, the prompt, and the share of it that is evicted.

    Returns
    -------
    float
        How many there are.
    dict
        The same by the line of code that asks for them and the operation's name.
    """
    model = tiny_llama(num_key_value_heads)
    inner = EVICTIONS[eviction]
    bare = operations_of_prefill(inner(ratio), model, bsz, k_len)
    ours = operations_of_prefill(PRESSES[name](inner(ratio)), model, bsz, k_len)
    ours.subtract(bare)
    by_line = {line: n / model.config.num_hidden_layers for line, n in sorted(ours.items()) if n}
    return sum(by_line.values()), by_line


@functools.cache
def operations_table(k_len: int = 1024) -> list[dict[str, Any]]:
    """A row for each press, kind of eviction, number of heads and batch size, with ``operations`` per layer."""
    return [
        {
            "press": name,
            "eviction": eviction,
            "num_key_value_heads": num_key_value_heads,
            "bsz": bsz,
            "operations": operations_per_layer(
                name, eviction, num_key_value_heads=num_key_value_heads, bsz=bsz, k_len=k_len
            )[0],
        }
        for name in PRESSES
        for eviction in EVICTIONS
        for num_key_value_heads, bsz in ((4, 1), (2, 1), (16, 1), (4, 3))
    ]
