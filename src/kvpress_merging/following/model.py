# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""The parts of a model that presses work on."""

from __future__ import annotations

from collections.abc import Callable
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


def only_looking(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that changes nothing, which says so to who asks what a press has put on a model; not compiled."""
    hook = torch.compiler.disable(hook)
    hook.only_looks = True  # type: ignore[attr-defined]
    return hook
