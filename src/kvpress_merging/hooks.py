# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""The modules of a model that presses work on: find them, follow the hooks put on them, take off what is left there."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention layers, where kvpress finds them."""
    base = getattr(model, "model", model)
    language_model = getattr(base, "language_model", base)
    return [layer.self_attn for layer in getattr(language_model, "layers", ())]


def replace_new_hooks(module: nn.Module, earlier: set[int] | None, followed: Callable) -> None:
    """Put ``followed(hook)`` in place of each hook that the inner press has just put on ``module``."""
    for hook_id, hook in module._forward_hooks.items():
        if hook_id not in (earlier or ()):
            takes_kwargs = hook_id in module._forward_hooks_with_kwargs
            module._forward_hooks[hook_id] = followed(hook if takes_kwargs else _dropping_kwargs(hook))
            module._forward_hooks_with_kwargs[hook_id] = True


def _dropping_kwargs(hook: Callable) -> Callable:
    return lambda module, args, kwargs, output: hook(module, args, output)


def remove(handles: Iterable[Any]) -> None:
    """Take off the hooks of these handles."""
    for handle in handles:
        handle.remove()


@contextmanager
def tracks_removed(model: PreTrainedModel) -> Generator[None, None, None]:
    """
    Take off the modules what presses put on them and leave there.

    That is ``forward``, which a press that wraps it puts back as an attribute of the module, where it was the class's;
    and ``rotary_emb``, which every press lends to the attention layers.
    """
    forwards = [(module, vars(module).get("forward")) for module in model.modules()]
    without_rotary_emb = [module for module in attention_modules(model) if not hasattr(module, "rotary_emb")]
    try:
        yield
    finally:
        for module, forward in forwards:
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward
        for module in without_rotary_emb:
            if hasattr(module, "rotary_emb"):
                del module.rotary_emb
