# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""The queries that an attention layer would ask at a position: it is asked itself, whatever it makes them of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Asked(NamedTuple):
    """What a layer gave to its attention function."""

    query: torch.Tensor  # (bsz, num_heads, n, head_dim)
    key: torch.Tensor  # (bsz, num_key_value_heads, n, head_dim)
    attention_mask: torch.Tensor | None
    scaling: float
    softcap: float | None
    sinks: torch.Tensor | None  # one more logit of each query head, (num_heads,)

    def of_heads(self, heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The first n queries, scaled, ``(bsz, num_key_value_heads, n, head_dim)``, and their sinks, both float32.

        ``heads``, int64, ``(n,)``: which of the query heads that a KV head serves is asked at each position.
        """
        queries = self.query.unflatten(1, (self.key.shape[1], -1))
        index = heads[:, None].expand(*queries.shape[:2], 1, -1, queries.shape[-1])
        queries = queries.gather(2, index).squeeze(2).float() * self.scaling
        sinks = None if self.sinks is None else self.sinks.unflatten(0, (self.key.shape[1], -1))[:, heads].float()
        return queries, None if sinks is None else sinks.expand(queries.shape[:3])


class _Answer(BaseException):
    """Leaves the layer's forward pass: nothing that follows is of use, and none of it leaves a trace."""


def _answer(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **_):  # type: ignore
    raise _Answer(query, key, attention_mask, scaling or query.shape[-1] ** -0.5, softcap, s_aux)


ALL_ATTENTION_FUNCTIONS.register("kvpress_merging", _answer)


class _Config(SimpleNamespace):
    """A layer's ``config``, but for the attention function that it names."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


def ask(module: nn.Module, hidden_states: torch.Tensor, kwargs: dict[str, Any], position: int) -> Asked | None:
    """
    What a layer makes of ``hidden_states``, ``(bsz, n, hidden_dim)``, at one position of a pass that had ``kwargs``,
    without mask and cache. None if the layer's attention is none of transformers' attention functions.
    """
    config = vars(module)["config"]
    vars(module)["config"] = _Config(config=config, _attn_implementation="kvpress_merging")
    try:
        given = {name: _repeated(value, position, hidden_states.shape[1]) for name, value in kwargs.items()}
        module.forward(**given | {"hidden_states": hidden_states})
    except _Answer as answer:
        return Asked(*answer.args)
    finally:
        vars(module)["config"] = config
    return None


def _repeated(value: Any, position: int, n: int) -> Any:
    """n times what is at a position of a sequence: along the last axis, but for embeddings, with channels behind it."""
    if isinstance(value, (tuple, list)):
        return type(value)(_repeated(part, position, n) for part in value)
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    axis = -2 if value.dim() > 1 and (value.is_floating_point() or value.is_complex()) else -1
    return value.narrow(axis, position, 1).expand([n if i == axis % value.dim() else -1 for i in range(value.dim())])
