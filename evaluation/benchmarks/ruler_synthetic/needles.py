# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""RULER's retrieval tasks: needles in a haystack."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from evaluation.benchmarks.ruler_synthetic.sample import NOISE, Essay, Measure, Sample, hide_in_list, hide_in_words
from evaluation.benchmarks.ruler_synthetic.words import ADJECTIVES, NOUNS


@dataclass(frozen=True)
class NeedleTask:
    """
    One retrieval task, as RULER's table of tasks defines it (arXiv 2404.06654, appendix B).

    The haystack is a few sentences over and over, prose, or other needles. Numbers have seven digits. There are so many
    needles with different keys, values of each key, and keys that are asked for.
    """

    haystack: Literal["noise", "essay", "needles"]
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    n_keys: int = 1
    n_values: int = 1
    n_queries: int = 1

    def write(
        self, depth: float, generator: random.Random, measure: Measure, essay: Essay, n_questions: int = 1
    ) -> list[Sample]:
        """
        Make one context and the questions about it, each for other keys than those before.

        The (first) needle that is asked for first is at a depth in [0, 1]; the generator draws everything else. Where
        there are too few keys for the questions, there are more needles. A ValueError says if the context cannot be as
        long as asked.
        """
        draw_key, draw_value = _distinct(_MAKERS[self.keys], generator), _distinct(_MAKERS[self.values], generator)
        keys = [draw_key() for _ in range(max(self.n_keys, self.n_queries * n_questions))]
        values = [[draw_value() for _ in range(self.n_values)] for _ in keys]
        needles = [self._state(key, value) for key, own in zip(keys, values) for value in own]
        depths = [depth, *(generator.random() for _ in needles[1:])]
        start = generator.randrange(2**32)
        others: list[str] = []

        introduction = (
            f"Secret {_NOUNS[self.values]}s are hidden in the text below. Remember them: you will be asked about them "
            "later.\n"
        )

        def write(n_units: int, n_padding: int = 0) -> str:
            if self.haystack == "essay":
                text = hide_in_words(essay.excerpt(n_units, start), needles, depths)
            elif self.haystack == "noise":
                text = hide_in_words(NOISE.excerpt(n_units), needles, depths)
            else:
                while len(others) < n_units:
                    others.append(self._state(draw_key(), draw_value()))
                text = hide_in_list(others[:n_units], needles, depths)
            text = " ".join([text, *NOISE.excerpt(n_padding)])
            return f"{introduction}{text}\n"

        n_units = measure.fit(write)
        # Other needles, and some words, are many tokens long: a few short words bring the context to its length.
        n_padding = measure.fit(lambda n: write(n_units, n)) if measure.is_too_short(write(n_units)) else 0
        context = write(n_units, n_padding)
        measure.check(context)
        haystack = context[len(introduction) :]
        n_asked = self.n_queries * self.n_values
        samples = []
        for number in range(n_questions):
            own_keys = keys[number * self.n_queries : (number + 1) * self.n_queries]
            own_values = values[number * self.n_queries : (number + 1) * self.n_queries]
            own_needles = needles[number * n_asked : (number + 1) * n_asked]
            # As they came out: a needle moves to the end of a sentence, and the others move it on.
            depths = [haystack.index(needle) / (len(haystack) - len(needle)) for needle in own_needles]
            answer = [value for of_key in own_values for value in of_key]
            samples.append(Sample(context, *self._ask(own_keys, len(answer) > 1), answer, depths))
        return samples

    def _ask(self, keys: list[str], many: bool) -> tuple[str, str]:
        """A question, and how its answer begins."""
        noun, names = _NOUNS[self.values], _enumerate(keys)
        things = f"{noun}s" if many else noun
        question = (
            f"What {'are all the' if many else 'is the'} secret {things} for {names} that the text above mentions?\n"
        )
        return question, f"The secret {things} for {names} that the text mentions {'are' if many else 'is'}"

    def _state(self, key: str, value: str) -> str:
        return f"One of the secret {_NOUNS[self.values]}s for {key} is: {value}."


NEEDLE_TASKS = {
    "niah_single_1": NeedleTask("noise"),
    "niah_single_2": NeedleTask("essay"),
    "niah_single_3": NeedleTask("essay", values="uuids"),
    "niah_multikey_1": NeedleTask("essay", n_keys=4),
    "niah_multikey_2": NeedleTask("needles"),
    "niah_multikey_3": NeedleTask("needles", keys="uuids", values="uuids"),
    "niah_multivalue": NeedleTask("essay", n_values=4),
    "niah_multiquery": NeedleTask("essay", n_keys=4, n_queries=4),
}

_NOUNS = {"numbers": "number", "uuids": "code"}
_MAKERS: dict[str, Callable[[random.Random], str]] = {
    "words": lambda generator: f"{generator.choice(ADJECTIVES)}-{generator.choice(NOUNS)}",
    "numbers": lambda generator: str(generator.randint(1_000_000, 9_999_999)),
    "uuids": lambda generator: str(uuid.UUID(int=generator.getrandbits(128), version=4)),
}


def _distinct(make: Callable[[random.Random], str], generator: random.Random) -> Callable[[], str]:
    """``make``, but never the same twice."""
    seen: set[str] = set()

    def draw() -> str:
        for _ in range(1000):
            if (made := make(generator)) not in seen:
                seen.add(made)
                return made
        raise ValueError(f"a haystack of more than {len(seen)} needles is too long: there are no more keys to draw")

    return draw


def _enumerate(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
