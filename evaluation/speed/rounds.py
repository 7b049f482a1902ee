# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Calls are timed beside each other: in rounds that run each of them once, so that a busy machine hurts all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from evaluation.prefill import synchronize

Call = Callable[[], Any]

OUT_OF_MEMORY = "out of memory"


@dataclass
class Rounds:
    """
    What some calls took.

    Parameters
    ----------
    seconds : dict
        Of each call by name, round by round.
    extra_bytes : dict
        Of each call, by how much it raised the peak of what is allocated on a GPU, in the round in which it raised it
        most. Empty on a CPU, where PyTorch does not count.
    notes : dict
        Of each call that failed, why; it is in none of the others.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    extra_bytes: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def ratios(self, numerator: str, denominator: str) -> list[float]:
        """Round by round, how many times as long one call took as another. Empty where one of them failed."""
        return [a / b for a, b in zip(self.seconds.get(numerator, ()), self.seconds.get(denominator, ()))]

    def median_ratio(self, numerator: str, denominator: str) -> float | None:
        """The median of these; None where there are none."""
        ratios = self.ratios(numerator, denominator)
        return statistics.median(ratios) if ratios else None

    def _give_up(self, name: str, error: Exception) -> None:
        self.notes[name] = failure(error)
        self.seconds.pop(name, None)
        self.extra_bytes.pop(name, None)


def time_in_rounds(
    calls: Mapping[str, Call],
    device: torch.device,
    repeats: int,
    *,
    tolerated: tuple[type[Exception], ...] = (torch.OutOfMemoryError,),
    goes_on: Callable[[], bool] = lambda: True,
) -> Rounds:
    """
    Time calls, after a round that warms up.

    Parameters
    ----------
    calls : mapping
        By name, in the order in which a round runs them.
    device : torch.device
        Where they work.
    repeats : int
        How many rounds to time.
    tolerated : tuple
        A call that raises one of these is left out from then on, with a note.
    goes_on : callable
        Asked before each round but the first whether there is time for it.
    """
    rounds = Rounds()

    def attempt(name: str) -> float | None:
        try:
            return seconds_of(calls[name], device)
        except tolerated as error:
            rounds._give_up(name, error)
            return None

    for name in calls:
        if attempt(name) is not None:
            rounds.seconds[name] = []
    for i in range(repeats):
        if i > 0 and not goes_on():
            break
        for name in list(rounds.seconds):
            before = _watch_peak(device)
            seconds = attempt(name)
            if seconds is not None:
                rounds.seconds[name].append(seconds)
                if before is not None:
                    n_bytes = torch.cuda.max_memory_allocated(device) - before
                    rounds.extra_bytes[name] = max(n_bytes, rounds.extra_bytes.get(name, 0))
    return rounds


def seconds_of(call: Call, device: torch.device) -> float:
    """Seconds that a call takes: by the GPU's own clock, from event to event, or by the wall clock."""
    synchronize(device)
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def failure(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"


def _watch_peak(device: torch.device) -> int | None:
    """Bytes allocated now, from which the peak is watched; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
