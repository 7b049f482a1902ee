# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What reference queries are made of: a layer's input at some positions of its context, and at the tokens since."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

MAX_RECENT = 64
"""Tokens seen after the prefill whose queries join those of the context when a press evicts while decoding."""

# Reference positions are equal steps of (0, 1) raised to this power, times the length: denser towards the end, whose
# queries are most like those that will be asked.
_CROWDING = 2 / 3


def reference_positions(n_tokens: torch.Tensor, n_queries: int) -> torch.Tensor:
    """
    Positions to take reference queries from: all over a context, denser towards its end, several times if it is short.

    ``n_tokens`` are the lengths of contexts, int64, ``(..., 1)``; what comes back is ascending, int64, ``(...,
    n_queries)``. Nothing is read from the device.
    """
    steps = (torch.arange(n_queries, device=n_tokens.device, dtype=torch.float64) + 0.5) / n_queries
    # Even steps where the last ones would otherwise meet at one position.
    is_long = (n_queries <= _CROWDING * n_tokens.double()).double()
    return (n_tokens * steps ** (1 - (1 - _CROWDING) * is_long)).long()


@lru_cache(maxsize=32)
def _positions(q_len: int, n_queries: int, device: torch.device) -> torch.Tensor:
    """The same for one length, ``(n_queries + 1,)``, and the last position behind them; not to be written."""
    length = torch.full((1,), q_len, device=device)
    return torch.cat([reference_positions(length, n_queries), length - 1])


def sample(hidden_states: torch.Tensor, is_padding: torch.Tensor | None, n_queries: int) -> torch.Tensor:
    """
    A layer's input at the reference positions of each row's tokens and, behind these, at the last position.

    Parameters
    ----------
    hidden_states : torch.Tensor
        Its input in the pass that fills the cache, shape ``(bsz, q_len, hidden_dim)``.
    is_padding : torch.Tensor or None
        Which of these are padding, bool, shape ``(bsz, q_len)``; None if none is.
    n_queries : int
        How many positions to take.

    Returns
    -------
    torch.Tensor
        Shape ``(bsz, n_queries + 1, hidden_dim)``.
    """
    q_len, hidden_dim = hidden_states.shape[1:]
    if is_padding is None:
        return hidden_states[:, _positions(q_len, n_queries, hidden_states.device)]
    order = is_padding.to(torch.uint8).sort(dim=1, stable=True).indices  # tokens first
    positions = order.gather(1, reference_positions((~is_padding).sum(dim=1, keepdim=True), n_queries))
    positions = torch.cat([positions, torch.full_like(positions[:, :1], q_len - 1)], dim=1)
    return hidden_states.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden_dim))


@lru_cache(maxsize=32)
def turns(n: int, n_groups: int, device: torch.device) -> torch.Tensor:
    """
    Which of ``n_groups`` query heads is asked at each of n positions, one after the other, int64; not to be written.

    So n positions give n different queries for the price of n, and every query head has its say.
    """
    return torch.arange(n, device=device) % n_groups


@dataclass
class LayerQueries:
    """What one layer's reference queries are made of, as long as it works on one cache."""

    # What its last forward pass was given, but for its input, mask and cache.
    kwargs: dict[str, Any]
    # Its input at the reference positions of the context and, behind these, at the last position, shape
    # (bsz, n + 1, hidden_dim); None where the context was not seen.
    context: torch.Tensor | None = None
    # Its input at the tokens that followed, each of shape (bsz, 1, hidden_dim), and how many there were.
    recent: deque[torch.Tensor] = field(default_factory=lambda: deque(maxlen=MAX_RECENT))
    n_since: int = 0

    def add(self, hidden_states: torch.Tensor) -> None:
        """Note tokens that followed the context."""
        self.n_since += hidden_states.shape[1]
        if hidden_states.shape[1] > MAX_RECENT:
            hidden_states = hidden_states[:, -MAX_RECENT:].clone()  # a view would hold them all
        self.recent.extend(hidden_states.split(1, dim=1))

    def hidden_states(self) -> torch.Tensor:
        """Of the context and the tokens seen since, and once more of the last one, ``(bsz, n + 1, hidden_dim)``."""
        if not self.recent:
            assert self.context is not None
            return self.context
        context = () if self.context is None else (self.context[:, :-1],)
        return torch.cat([*context, *self.recent, self.recent[-1]], dim=1)

    def move(self, rows: torch.Tensor) -> None:
        """Follow rows of the cache that were moved."""
        self.context = None if self.context is None else self.context[rows]
        self.recent = deque((token[rows] for token in self.recent), maxlen=MAX_RECENT)

    def cut(self, n_cut: int) -> None:
        """Forget the last tokens seen since the context, or the context too if it was cut into."""
        self.n_since -= n_cut
        if self.n_since < 0:
            self.context, self.n_since = None, 0
        for _ in range(min(n_cut, len(self.recent))):
            self.recent.pop()
