# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
How far a model strays from itself when its KV cache is compressed.

A context is prefilled twice, with the full cache and with a press; the tokens that truly follow are then fed over each
cache in one forward pass, and what the model says at each of them is compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass

import torch
from kvpress import BasePress, DecodingPress
from kvpress.utils import extract_keys_and_values
from transformers import PreTrainedModel

from evaluation.benchmarks.fidelity.compressed_cache import (
    count_cache_bytes,
    prefill,
    read_continuation,
    watched_attention,
)
from evaluation.text import Window

# Positions whose logits are compared at a time: bounds the float64 copies for a vocabulary of 150,000.
_ROWS = 64


@dataclass(frozen=True)
class Fidelity:
    """
    What one press did to one window. One row of a table.

    The *scored* tokens are the continuation's, less its first, which the prefill predicts before any press acts.

    Parameters
    ----------
    kl, kl_per_token : float, tuple[float, ...]
        Kullback-Leibler divergence of the next-token distribution with the compressed cache from that with the full
        cache, KL(full || compressed), in nats, mean over the scored tokens, and for each of them.
    nll, nll_full : float
        Negative log-likelihood of the true continuation with the compressed and with the full cache, in nats, mean over
        the scored tokens.
    top1_agreement : float
        Share of the scored tokens at which both caches make the same token the most likely one.
    cache_bytes, cache_bytes_seen, cache_bytes_full : int
        Bytes of keys and values that the cache holds after the prefill, those of positions that attention still sees
        (some presses mask positions and leave them in memory), and those of the full cache.
    prefill_seconds, prefill_seconds_full : float
        Wall-clock time of the prefill with the press (all that it does until its context exits) and without.
    attention_errors : tuple[float, ...]
        For each layer, the relative error of its attention output; see ``measure_fidelity``. Empty if not measured.
    """

    kl: float
    kl_per_token: tuple[float, ...]
    nll: float
    nll_full: float
    top1_agreement: float
    cache_bytes: int
    cache_bytes_seen: int
    cache_bytes_full: int
    prefill_seconds: float
    prefill_seconds_full: float
    attention_errors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Reference:
    """
    The full cache's side of the comparison: measured once for a window, and used for each press.

    Parameters
    ----------
    window, cache_bytes, prefill_seconds
        What was read, bytes of its keys and values, and how long the prefill took.
    logits : torch.Tensor
        At each scored token's predecessor, shape ``(continuation_length - 1, vocab_size)``.
    attention_inputs, attention_outputs : list[torch.Tensor]
        Per layer, what went into attention and what it gave before the output projection, over the continuation, shapes
        ``(1, continuation_length - 1, hidden_size)`` and ``(1, continuation_length - 1, num_heads * head_dim)``.
        Empty if attention errors are not asked for.
    """

    window: Window
    logits: torch.Tensor
    cache_bytes: int
    prefill_seconds: float
    attention_inputs: list[torch.Tensor]
    attention_outputs: list[torch.Tensor]

    def to(self, device: torch.device | str) -> Reference:
        """The same with its tensors on ``device``; the window stays where it is."""
        return dataclasses.replace(
            self,
            logits=self.logits.to(device),
            attention_inputs=[tensor.to(device) for tensor in self.attention_inputs],
            attention_outputs=[tensor.to(device) for tensor in self.attention_outputs],
        )


# no_grad, not inference_mode, here and below: some presses take gradients, as they can in kvpress's pipeline.
@torch.no_grad()
def measure_reference(model: PreTrainedModel, window: Window, *, attention_errors: bool = False) -> Reference:
    """
    Read a window with the full cache, and keep what the attention error of each layer needs if asked to.

    A ValueError says if the continuation has fewer than two tokens: one to read and one to score.
    """
    if window.continuation_ids.shape[1] < 2:
        raise ValueError(f"a continuation needs at least 2 tokens, got {window.continuation_ids.shape[1]}")
    cache, start, seconds = prefill(model, window, None)
    cache_bytes, _ = count_cache_bytes(model, cache)
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    with watched_attention(model, inputs, outputs) if attention_errors else contextlib.nullcontext():
        logits = read_continuation(model, window.continuation_ids[:, :-1], cache, start)
    return Reference(window, logits[0], cache_bytes, seconds, inputs, outputs)


@torch.no_grad()
def measure_fidelity(model: PreTrainedModel, press: BasePress, reference: Reference) -> Fidelity:
    """
    Read the reference's window with a press, and compare.

    If the reference kept its attention inputs and outputs, the relative error of each layer's attention output is
    measured too: ``|o_press - o_full| / |o_full|``, Euclidean norms over all tokens, heads and channels before the
    output projection. That takes a second pass over the continuation, in which each layer is given the hidden states
    that it had in the full-cache run. So queries are the same in both runs, and an error stems from this layer's cache
    alone, not from the layers below it. It is 0 where a layer was not compressed.

    A TypeError refuses a press that acts while decoding only, which leaves the prefill's cache as it was.
    """
    if isinstance(press, DecodingPress):
        raise TypeError(f"fidelity needs a press that compresses at prefill, got {type(press).__name__}")
    window = reference.window
    continuation_ids = window.continuation_ids[:, :-1]
    cache, start, seconds = prefill(model, window, press)
    cache_bytes, cache_bytes_seen = count_cache_bytes(model, cache)
    lengths = [layer.get_seq_length() for layer in cache.layers]
    logits = read_continuation(model, continuation_ids, cache, start)[0]
    kl, nll, nll_full, agree = compare_logits(reference.logits, logits, window.continuation_ids[0, 1:])
    errors: tuple[float, ...] = ()
    if reference.attention_inputs:
        for layer_idx, length in enumerate(lengths):
            keys, values = extract_keys_and_values(cache, layer_idx)
            cache.layers[layer_idx].keys, cache.layers[layer_idx].values = keys[:, :, :length], values[:, :, :length]
        outputs: list[torch.Tensor] = []
        with watched_attention(model, [], outputs, given=reference.attention_inputs):
            read_continuation(model, continuation_ids, cache, start)
        pairs = zip(outputs, reference.attention_outputs)
        errors = tuple(float((output - full).double().norm() / full.double().norm()) for output, full in pairs)
    return Fidelity(
        kl=float(kl.mean()),
        kl_per_token=tuple(kl.tolist()),
        nll=float(nll.mean()),
        nll_full=float(nll_full.mean()),
        top1_agreement=float(agree.double().mean()),
        cache_bytes=cache_bytes,
        cache_bytes_seen=cache_bytes_seen,
        cache_bytes_full=reference.cache_bytes,
        prefill_seconds=seconds,
        prefill_seconds_full=reference.prefill_seconds,
        attention_errors=errors,
    )


def compare_logits(
    full_logits: torch.Tensor, logits: torch.Tensor, target_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Compare two sets of next-token logits, in float64.

    Logits are of shape ``(n_tokens, vocab_size)``; ``target_ids``, int64, are the tokens that truly follow. Out come,
    per token, on the CPU: KL(full || compressed) in nats, negative log-likelihood of the target in nats with the
    compressed and with the full cache, and whether both have the same likeliest token.
    """
    parts = []
    for rows in torch.arange(len(target_ids)).split(_ROWS):
        full = full_logits[rows].double().log_softmax(-1)
        other = logits[rows].double().log_softmax(-1)
        targets = target_ids[rows].to(full.device)[:, None]
        probability = full.exp()
        # A token of probability 0 counts 0, whatever its logarithm is; torch's kl_div gives NaN there.
        kl = (probability * (full - other)).where(probability > 0, 0.0).sum(-1)
        agree = full.argmax(-1) == other.argmax(-1)
        parts.append((kl, -other.gather(1, targets)[:, 0], -full.gather(1, targets)[:, 0], agree))
    kl, nll, nll_full, agree = (torch.cat(column).cpu() for column in zip(*parts))
    return kl, nll, nll_full, agree
