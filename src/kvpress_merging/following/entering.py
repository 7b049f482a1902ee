# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""A press's context on a model, entered and left: our hooks around its own, and what it evicts on leaving."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from transformers import PreTrainedModel

from kvpress_merging.checks import not_followed
from kvpress_merging.following.cache import open_layer
from kvpress_merging.following.model import attention_modules, decoder_layers, layer_index, only_looking
from kvpress_merging.following.undo import EnteredModel, Snapshot
from kvpress_merging.following.watch import Watch
from kvpress_merging.wrapping import nested_presses


@contextmanager
def entered(watch: Watch, model: PreTrainedModel) -> Generator[None, None, None]:
    """Enter the watched press on ``model``, and see to it that both are as they were should anything fail."""
    before, presses = EnteredModel(model), Snapshot(*nested_presses(watch.press))
    inner = ExitStack()  # leaves the press's context once, whatever happens
    try:
        inner.enter_context(watch.press(model))
        presses = Snapshot(*nested_presses(watch.press))  # what the press has loaded by now stays
        handles = _put_hooks(watch, model, before.new_hooks())
        before.hooks = before.new_hooks()
        yield
        for handle in handles:
            handle.remove()
        _leave(watch, model, inner)
        before.take_off_leavings()
    except BaseException:
        layers = [open_layer(cache, layer_index(module)) for module, cache in watch.seen.items()]
        unchanged = Snapshot(*model.modules(), layers=layers)
        is_swallowed: bool | None = False
        with suppress(BaseException):
            for layer in layers:
                layer.open()
            is_swallowed = inner.__exit__(*sys.exc_info())
        unchanged.restore()
        before.take_off()
        presses.restore()
        if not is_swallowed:
            raise


def _put_hooks(watch: Watch, model: PreTrainedModel, hooks_of_press: list[tuple[dict[int, Any], int]]) -> list[Any]:
    uncompiled: Callable[..., Any] = torch.compiler.disable  # a compiled model leaves its graph for such a hook
    modules = attention_modules(model)
    handles = []
    for module in modules:
        for number in [number for hooks, number in hooks_of_press if hooks is module._forward_hooks]:
            hook: Any = module._forward_hooks[number]
            if number not in module._forward_hooks_with_kwargs:  # what follows it takes keyword arguments
                module._forward_hooks_with_kwargs[number] = True
                hook = _without_kwargs(hook)
            module._forward_hooks[number] = uncompiled(watch.follow_hook(hook))
            watch.hooked.add(module)
        handles.append(module.register_forward_pre_hook(uncompiled(watch.before_pass), with_kwargs=True))
        # Runs before the press's hook, which may shrink the layer or fail.
        handles.append(module.register_forward_hook(uncompiled(watch.look), with_kwargs=True, prepend=True))
    for layer, module in zip(decoder_layers(model), modules):
        settle = only_looking(lambda layer, args, output, module=module: watch.settle(module))
        handles.append(layer.register_forward_hook(settle, prepend=True))
    for module in {model, getattr(model, "model", model)}:
        handles.append(module.register_forward_hook(only_looking(watch.check_unseen)))
    watch.hooked = watch.hooked or set(modules)
    return handles


def _leave(watch: Watch, model: PreTrainedModel, inner: ExitStack) -> None:
    """Leave the press's context, in which it may evict, and merge what it evicted then."""
    modules = {module: open_layer(cache, layer_index(module)) for module, cache in watch.seen.items()}
    masks_before = {module: watch.memory.states[module].masks_on(module) for module in modules}
    for module, layer in modules.items():
        if watch.memory.states[module].find_rows(watch.press, module, layer.layer) is not None:
            raise ValueError(
                f"rows of layer {layer_index(module)} of the cache were moved since the last forward pass, and "
                f"{type(watch.press).__name__} may evict now: leave its context first, or after one more pass"
            )
    handles = []
    with Snapshot(*model.modules(), *map(watch.memory.states.get, modules), layers=modules.values()):
        for module, layer in modules.items():
            layer.open()
            # The press may run the model to score: that is none of our business. From then on it works on plain
            # tensors, and what it evicts is seen from its masks.
            handles.append(module.register_forward_pre_hook(lambda module, args, layer=layer: layer.close()))
        try:
            inner.__exit__(None, None, None)
        finally:
            for handle in handles:
                handle.remove()
        for module, layer in modules.items():
            state = watch.memory.states[module]
            limit = state.context_length - state.n_forgotten
            if layer.is_closed:
                layer = open_layer(watch.seen[module], layer_index(module))
                layer.open()
                if layer.lengths()[0] < min(limit, state.k_len):
                    raise not_followed(watch.press)
            watch.commit(module, layer, masks_before[module], None, {}, limit)
            state.note_rows(watch.seen[module].layers[layer_index(module)])


def _without_kwargs(hook: Callable[..., Any]) -> Callable[..., Any]:
    return lambda module, args, kwargs, output: hook(module, args, output)
