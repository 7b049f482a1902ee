# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
One prefill for many presses.

What attention gives in a prefill does not depend on the press, which compresses a layer's cache after its attention
has run. So many presses can watch one forward pass, each on a stand-in of the model (``stand_in.py``).
"""

from __future__ import annotations

import copy
import random
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from kvpress import BasePress
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from evaluation.prefill import Prefilled, acts_while_decoding, start_after, synchronize
from evaluation.sweep.stand_in import CannotShareError, Watcher
from kvpress_merging.following.model import attention_modules


@dataclass
class PressFailed:
    """
    Why a prefill left nothing of one press.

    Parameters
    ----------
    error : Exception
        What was raised, without its frames: they would hold a whole layer.
    traceback : str
        Where, as Python prints it.
    """

    error: Exception
    traceback: str


def why_alone(model: PreTrainedModel, press: BasePress | None) -> str | None:
    """
    What keeps a press from sharing a prefill, found out by entering and leaving its context.

    Parameters
    ----------
    model : PreTrainedModel
        The model; it is not run.
    press : BasePress or None
        The press, of which a copy is tried; None for the full cache, which can share.

    Returns
    -------
    str or None
        What it does: hooks or forwards other than those of the attention layers, work while answering, or work on
        leaving its context that needs a prefill of the whole model. None if it can share.
    """
    if acts_while_decoding(press):
        return "it evicts while decoding"
    watcher = Watcher(model, copy.deepcopy(press))
    try:
        watcher.enter()
    except Exception as error:
        watcher.give_up()
        if isinstance(error, CannotShareError):
            return str(error)
        return f"its context cannot be entered: {type(error).__name__}: {error}"
    try:
        watcher.leave()
    except Exception as error:
        return f"its context cannot be left without a prefill: {type(error).__name__}: {error}"
    return None


@torch.no_grad()
def prefill_many(
    model: PreTrainedModel, input_ids: torch.Tensor, presses: Sequence[BasePress | None]
) -> list[Prefilled | PressFailed]:
    """
    Prefill once, with a cache and masks for each press as if it had prefilled alone.

    Of the whole layers, no more than two are held at a time: the model's and one press's. Each press draws the random
    numbers that it would draw alone.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model; it is left as it was.
    input_ids : torch.Tensor
        Token ids, int64, shape ``(bsz, q_len)``.
    presses : sequence of BasePress or None
        Presses that can share (``why_alone``), each an object of its own; None for the full cache.

    Returns
    -------
    list of Prefilled or PressFailed
        In the order of ``presses``. Where one fails, the others go on.

    Raises
    ------
    Exception
        Whatever the model itself raises.
    """
    device = model.device
    attention = set(attention_modules(model))
    watchers: list[Watcher] = []
    failed: dict[int, PressFailed] = {}
    seconds = [0.0] * len(presses)
    draws = [_random_state()] * len(presses)

    def each(deed: Callable[[Watcher], None], module: nn.Module | None = None) -> None:
        """Let each press that watches a module, and has not failed, do something with a clock and draws of its own."""
        before = _random_state()
        for i, watcher in enumerate(watchers):
            if i in failed or (module is not None and module not in watcher.watched):
                continue
            _set_random_state(draws[i])
            started = time.perf_counter()
            try:
                deed(watcher)
            except Exception as error:
                watcher.give_up()
                failed[i] = PressFailed(error, "".join(traceback.format_exception(error)))
                _drop_frames(error)
            synchronize(device)
            seconds[i] += time.perf_counter() - started
            draws[i] = _random_state()
        _set_random_state(before)

    def has_run(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        synchronize(device)
        each(lambda watcher: watcher.watch(module, args, kwargs, output), module)
        if module in attention:  # to whose cache the model does not come back
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            layer.keys, layer.values = layer.keys.new_empty(0), layer.values.new_empty(0)

    synchronize(device)
    started = time.perf_counter()
    with ExitStack() as stack:
        for press in presses:
            watchers.append(Watcher(model, press))
            stack.callback(watchers[-1].give_up)
        each(Watcher.enter)
        with ExitStack() as hooks:
            for module in attention.union(*(watcher.watched for watcher in watchers)):
                handle = module.register_forward_hook(torch.compiler.disable(has_run), with_kwargs=True)
                hooks.callback(handle.remove)
            # As kvpress's pipeline does, without the language model's head.
            model.model(input_ids=input_ids.to(device), past_key_values=DynamicCache())
            synchronize(device)
        each(Watcher.leave)
        pass_seconds = time.perf_counter() - started - sum(seconds)
        return [
            failed[i] if i in failed else _result(watcher, input_ids.shape[1], pass_seconds, seconds[i])
            for i, watcher in enumerate(watchers)
        ]


def _result(watcher: Watcher, context_length: int, pass_seconds: float, press_seconds: float) -> Prefilled:
    start = start_after(watcher.press, watcher.cache, context_length)
    masks = watcher.masked_key_indices()
    return Prefilled(watcher.press, watcher.cache, masks, start, pass_seconds + press_seconds, press_seconds)


def _drop_frames(error: BaseException | None) -> None:
    while error is not None:
        error.__traceback__ = None
        error = error.__context__ or error.__cause__


def _random_state() -> tuple[Any, ...]:
    """Where the global generators are."""
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_gpus  # noqa: NPY002


def _set_random_state(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    torch.set_rng_state(state[2])
    if state[3]:
        torch.cuda.set_rng_state_all(state[3])
