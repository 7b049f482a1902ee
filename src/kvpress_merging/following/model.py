# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""The parts of a model that presses work on, and what they put there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo.config
from torch import nn
from transformers import PreTrainedModel

# Or a compiled model would overlook hooks put on or taken off after its first run: a press would silently do nothing,
# or go on when its context is left.
torch._dynamo.config.skip_nnmodule_hook_guards = False


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers whose attention presses work on, where kvpress finds them."""
    base = getattr(model, "model", model)
    language_model = getattr(base, "language_model", base)
    return list(getattr(language_model, "layers", ()))


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Their attention."""
    return [layer.self_attn for layer in decoder_layers(model)]  # type: ignore[misc]


def layer_index(module: nn.Module) -> int:
    """Which layer of a cache an attention module fills."""
    return int(module.layer_idx)  # type: ignore[arg-type]


def uncompiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, for which a model compiled with ``torch.compile`` leaves its graph."""
    return torch.compiler.disable(hook)


def only_looking(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a hook that changes nothing, which says so to who asks what a press has put on a model."""
    hook = uncompiled(hook)
    hook.only_looks = True  # type: ignore[attr-defined]
    return hook


def wrap_hook(module: nn.Module, number: int, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put ``wrap(hook)`` in the place of a forward hook; the hook that is wrapped takes keyword arguments."""
    hook = module._forward_hooks[number]
    takes_kwargs = number in module._forward_hooks_with_kwargs

    def with_kwargs(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        return hook(module, args, kwargs, output) if takes_kwargs else hook(module, args, output)

    module._forward_hooks[number] = uncompiled(wrap(with_kwargs))
    module._forward_hooks_with_kwargs[number] = True


class EnteredModel:
    """
    A model that a press is about to be entered on, and what entering puts there, to be taken off.

    Some of it every press leaves behind: ``forward`` as an attribute of a module that had it from its class, and
    ``rotary_emb``, lent to the attention layers. The rest a press takes off itself, unless an exception keeps it from
    that: hooks, forwards that it keeps, the attention implementation.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.attn_implementation = model.config._attn_implementation
        self.names = {module: set(vars(module)) for module in model.modules()}
        self.forwards = {module: vars(module).get("forward") for module in self.names}
        self.without_rotary_emb = [module for module in attention_modules(model) if not hasattr(module, "rotary_emb")]
        self.earlier_hooks = {(id(hooks), number) for hooks, number in self._hooks()}
        self.new_hooks: list[tuple[dict[int, Any], int]] = []
        self.is_ready = False  # for the body of the context: hooks that are put on from then on are not of the press

    def note_hooks(self) -> None:
        """All hooks that are there now and were not before are the press's, or ours."""
        self.new_hooks = [
            (hooks, number) for hooks, number in self._hooks() if (id(hooks), number) not in self.earlier_hooks
        ]

    def hooks_of_press(self, module: nn.Module) -> list[int]:
        """The numbers of the forward hooks that the press put on a module."""
        return [number for hooks, number in self.new_hooks if hooks is module._forward_hooks]

    def take_off_leavings(self) -> None:
        """Take off what presses leave behind when all goes well."""
        for module, forward in self.forwards.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward
        for module in self.without_rotary_emb:
            if hasattr(module, "rotary_emb"):
                del module.rotary_emb

    def take_off(self) -> None:
        """Take off everything, after an exception."""
        self.model.config._attn_implementation = self.attn_implementation
        if not self.is_ready:
            self.note_hooks()
        for hooks, number in self.new_hooks:
            hooks.pop(number, None)
        for module in self.model.modules():
            for name in set(vars(module)).difference(self.names.get(module, vars(module))):
                if callable(vars(module)[name]):  # a forward that the press kept, to put it back
                    del vars(module)[name]
        self.take_off_leavings()

    def _hooks(self) -> Iterator[tuple[dict[int, Any], int]]:
        """Every hook on the model: the dict of its kind and module, and its number there."""
        for module in self.model.modules():
            for name, hooks in vars(module).items():
                if "_hooks" in name and isinstance(hooks, dict):
                    yield from ((hooks, number) for number in hooks)
