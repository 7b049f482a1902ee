# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What all parts of ``python -m evaluation gpu`` share: the device, the time that is left, the sizes and the model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from evaluation.speed.rounds import OUT_OF_MEMORY, Call, Rounds, time_in_rounds

LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
}
"""The shape of Llama-3.1-8B."""


@dataclass(frozen=True)
class Sizes:
    """
    How much is done.

    Parameters
    ----------
    shape : dict
        Of the model.
    k_lens : tuple of int
        Contexts, ascending.
    repeats : int
        Rounds of each timing.
    check_k_len : int
        Tokens of a layer that is compared with the naive form.
    n_tokens : int
        Tokens that are decoded.
    side : int
        Of the matrices whose product stands for the device's peak.
    """

    shape: dict[str, int]
    k_lens: tuple[int, int, int]
    repeats: int
    check_k_len: int
    n_tokens: int
    side: int


FULL = Sizes(LLAMA_8B, (4096, 32_768, 131_072), repeats=5, check_k_len=300, n_tokens=128, side=8192)
QUICK = Sizes(
    {
        **LLAMA_8B,
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    (80, 128, 192),
    repeats=2,
    check_k_len=72,
    n_tokens=4,
    side=256,
)


@dataclass
class Bench:
    """
    What a part is measured with.

    Parameters
    ----------
    device : torch.device
        Where.
    sizes : Sizes
        How much.
    deadline : float
        When to be done, by ``time.monotonic()``.
    rate : float, optional
        Floating-point operations a second of a prefill, as the last one showed: what is to come is estimated by it.
    """

    device: torch.device
    sizes: Sizes
    deadline: float
    rate: float | None = field(default=None, init=False)

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()

    def goes_on(self) -> bool:
        """Whether there is time left."""
        return self.seconds_left > 0

    @cached_property
    def model(self) -> PreTrainedModel:
        """
        A Llama of this shape with random weights in bfloat16, made on the device.

        With fewer layers where memory is short: weights may take half of what is free.
        """
        shape, free = dict(self.sizes.shape), self.free_bytes()
        if free is not None:
            embeddings = 2 * shape["vocab_size"] * shape["hidden_size"]
            n_fitting = (free // 4 - embeddings) // self._layer_parameters
            shape["num_hidden_layers"] = max(1, min(shape["num_hidden_layers"], n_fitting))
        attention = "sdpa"
        if self.device.type == "cuda" and is_flash_attn_2_available():
            attention = "flash_attention_2"
        with torch.random.fork_rng(), torch.device(self.device):
            torch.manual_seed(0)
            config = LlamaConfig(**shape, tie_word_embeddings=False)  # type: ignore[arg-type]
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
        return model.eval()

    @property
    def _layer_parameters(self) -> int:
        """Weights of one layer, but for its norms."""
        shape = self.sizes.shape
        n_heads = 2 * (shape["num_attention_heads"] + shape["num_key_value_heads"])
        return shape["hidden_size"] * (n_heads * shape["head_dim"] + 3 * shape["intermediate_size"])

    def prefill_operations(self, n_layers: int, k_len: int) -> float:
        """Floating-point operations of a prefill without the model's head: products with weights, and attention."""
        shape = self.sizes.shape
        attention = 2 * shape["num_attention_heads"] * shape["head_dim"] * k_len**2
        return float(n_layers * (2 * self._layer_parameters * k_len + attention))

    def prefill_bytes(self, n_layers: int, k_len: int) -> int:
        """Bytes that a prefill takes beside the weights, about: the cache, and the tensors of the widest layer."""
        shape = self.sizes.shape
        cache = 2 * n_layers * shape["num_key_value_heads"] * shape["head_dim"]
        return 2 * k_len * (cache + 8 * shape["hidden_size"] + 3 * shape["intermediate_size"])

    def free_bytes(self) -> int | None:
        """Bytes that the device can still give, what PyTorch holds and does not use among them; None on a CPU."""
        if self.device.type != "cuda":
            return None
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + unused

    def time(self, calls: Mapping[str, Call]) -> Rounds:
        """Time calls, whatever any of them raises, until the rounds are done or the time is up."""
        return time_in_rounds(calls, self.device, self.sizes.repeats, tolerated=(Exception,), goes_on=self.goes_on)

    def too_long(self, seconds: float | None) -> str | None:
        """Why something that is estimated to take so many seconds is left out; None if it is not."""
        if not self.goes_on():
            return "no time was left"
        if seconds is not None and seconds > self.seconds_left:
            return f"it would have taken some {seconds:.0f} s, and {self.seconds_left:.0f} s were left"
        return None


def why_missing(failure: str) -> dict[str, str]:
    """
    Why a row has no figures: ``left_out`` for want of memory or of what Triton's kernel needs, as the package says.

    Else it ``failed``.
    """
    if failure == OUT_OF_MEMORY:
        return {"left_out": failure}
    if failure.startswith("ValueError: kernel='triton'"):
        return {"left_out": failure.removeprefix("ValueError: ")}
    return {"failed": failure}


@contextlib.contextmanager
def first_layers(model: PreTrainedModel, n_layers: int) -> Iterator[None]:
    """Within it, the model has only so many layers."""
    layers = model.model.layers
    model.model.layers = layers[:n_layers]
    try:
        yield
    finally:
        model.model.layers = layers
