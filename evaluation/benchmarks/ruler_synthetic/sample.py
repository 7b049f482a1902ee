# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What every task of the generator shares: one sample, the length that it must have, and where its needles go."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from evaluation.text import insert

LENGTH_TOLERANCE = 0.02
"""A context is at most this share shorter than asked, and never longer."""

# The search for a length stops this near to it: well inside the tolerance, and two or three tries do.
_NEAR_ENOUGH = 0.005
# After so many tries the search halves its interval each time, should a context not grow as evenly as expected.
_LINEAR_ATTEMPTS = 8


@dataclass(frozen=True)
class Sample:
    """
    One question about one context, with the columns of kvpress's RULER dataset.

    Parameters
    ----------
    context : str
        What is prefilled: the instruction and the haystack.
    question, answer_prefix : str
        What is asked, and how the answer begins.
    answer : list[str]
        What the answer must hold.
    depths : list[float]
        Where in the haystack what is asked for stands, by characters, from 0 (its beginning) to 1 (its end). Empty for
        tasks whose answer is spread over all of it.
    """

    context: str
    question: str
    answer_prefix: str
    answer: list[str]
    depths: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Measure:
    """The length that a context must have, in tokens of the model at hand, and what counts those of a text."""

    length: int
    count_tokens: Callable[[str], int]

    def fit(self, write: Callable[[int], str]) -> int:
        """
        Find how many units of filler give at most ``length`` tokens, and hardly fewer if the units are small enough.

        ``write`` gives the context with ``n`` of them, which grows about linearly with ``n``. It is called several
        times, so it must be a function of ``n`` alone.

        A ValueError says if there is no room for any.
        """
        low, n_low = 0, self.count_tokens(write(0))
        if n_low > self.length:
            raise ValueError(f"a length of {self.length} tokens is too small, at least {n_low} are needed")
        high = None
        last, n_last = low, n_low
        n = max(1, self.length // 16)
        for attempt in itertools.count():
            n_tokens = self.count_tokens(write(n))
            if n_tokens <= self.length:
                low, n_low = n, n_tokens
            else:
                high = n
            is_closed = high is not None and high - low <= 1
            is_used_up = high is None and n_tokens <= n_last
            if n_low >= self.length * (1 - _NEAR_ENOUGH) or is_closed or is_used_up:
                break
            # Where the line through the last two measurements reaches the length, between the bounds known so far.
            slope = (n_tokens - n_last) / (n - last) if n != last else 0.0
            last, n_last = n, n_tokens
            wanted = self.length * (1 - _NEAR_ENOUGH / 2) - n_tokens
            n = n + int(wanted / slope) if slope > 0 else 2 * n
            if high is None:
                n = min(max(n, low + 1), 8 * low + 1)
            elif attempt > _LINEAR_ATTEMPTS:
                n = (low + high) // 2
            else:
                n = min(max(n, low + 1), high - 1)
        return low

    def is_too_short(self, context: str) -> bool:
        """Whether ``context`` is shorter than asked by more than the tolerance."""
        return self.count_tokens(context) < self.length * (1 - LENGTH_TOLERANCE)

    def check(self, context: str) -> None:
        """Raise a ``ValueError`` if ``context`` is too short."""
        if self.is_too_short(context):
            nearest = self.count_tokens(context)
            raise ValueError(
                f"no context of {self.length} tokens can be written: the nearest that its pieces come to is {nearest}"
            )


class Essay:
    """Prose to hide needles in: any text, without its line breaks and indents. A ValueError if it has no words."""

    def __init__(self, text: str):
        self.words = text.split()
        if not self.words:
            raise ValueError("the text to hide needles in is empty")
        ends = [i + 1 for i, word in enumerate(self.words) if _ends_sentence(word)]
        self.sentence_starts = [0, *ends[:-1]]

    def excerpt(self, n_words: int, start: int = 0) -> list[str]:
        """``n_words`` words from the sentence number ``start`` on; after the last word comes the first again."""
        first = self.sentence_starts[start % len(self.sentence_starts)]
        repeats = -(-(first + n_words) // len(self.words))
        return (self.words * repeats)[first : first + n_words]


def hide_in_words(words: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> str:
    """Prose with each needle at its depth, between the two sentences that meet nearest to it."""
    gaps = [0, *(i + 1 for i, word in enumerate(words) if _ends_sentence(word)), len(words)]
    places = []
    for depth in depths:
        wanted = depth * len(words)
        after = bisect.bisect_left(gaps, wanted)
        places.append(min(gaps[max(after - 1, 0) : after + 1], key=lambda gap: abs(gap - wanted)))
    return " ".join(insert(words, [[needle] for needle in needles], places))


def hide_in_list(pieces: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> str:
    """Pieces of text with each needle between two of them, at its depth."""
    return " ".join(insert(pieces, [[needle] for needle in needles], [round(d * len(pieces)) for d in depths]))


def even_depth(index: int, start: float) -> float:
    """
    The depth of the ``index``-th sample's needle, in [0, 1).

    The first n depths are spread about evenly for every n: van der Corput's sequence in base 2, moved on by ``start``.
    """
    spread, share = 0.0, 0.5
    while index:
        spread += share * (index % 2)
        index //= 2
        share /= 2
    return (spread + start) % 1.0


def _ends_sentence(word: str) -> bool:
    return re.search(r"[.!?]\W*$", word) is not None


NOISE = Essay("The bread is warm. The river is wide. The night is quiet. On we go. Home is not far away.")
"""RULER's simplest haystack: the same few sentences over and over."""
