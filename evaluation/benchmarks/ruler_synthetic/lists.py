# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""RULER's tasks whose answer is spread over the context: following variables, and counting words."""

from __future__ import annotations

import itertools
import random
import string

from scipy.special import zeta

from evaluation.benchmarks.ruler_synthetic.sample import NOISE, Measure, Sample, hide_in_words
from evaluation.benchmarks.ruler_synthetic.words import ADJECTIVES, NOUNS

N_HOPS = 4
"""Variable tracking: assignments that pass the value on."""

N_COMMON = 10
COMMON_COUNT, UNCOMMON_COUNT = 30, 3
"""Common words: how many there are, and how often each of them and each other word is in the list."""

CODED_WORD_LENGTH = 6
ZIPF_EXPONENT = 2.0
"""Frequent words: letters in a word, and how fast counts fall with the rank."""
N_FREQUENT = 3
WORDS_PER_CODED_WORD = 50
"""Tokens of context for each different coded word."""

# A worked example, as RULER gives for these tasks, may take this share of the context; a short context goes without.
_EXAMPLE_SHARE = 0.2
_EXAMPLE_NOISE = 20
_EXAMPLE_COMMON_COUNT, _EXAMPLE_N_UNCOMMON = 3, 10


def write_variable_tracking(generator: random.Random, measure: Measure) -> Sample:
    """
    vt: a value is given to a variable and passed on from variable to variable; name all that hold it.

    A ValueError, as from the others here, says if the context cannot be as long as asked.
    """
    introduction = (
        "Assignments to variables are hidden in the text below. Keep track of the value that each one holds.\n"
    )
    names = _draw_distinct(generator, 2 * (N_HOPS + 1), string.ascii_uppercase, 5)
    example_value, value = map(str, generator.sample(range(10_000, 100_000), 2))

    def chain(names: list[str], value: str) -> tuple[list[str], list[float]]:
        steps = [f"LET {names[0]} = {value}.", *(f"LET {b} = {a}." for a, b in itertools.pairwise(names))]
        return steps, sorted(generator.random() for _ in steps)

    def ask(value: str) -> tuple[str, str]:
        return (
            f"Question: Which variables hold the value {value}, given to them directly or through other variables?\n",
            f"Answer: The {N_HOPS + 1} variables that hold the value {value} are",
        )

    example_names, names = names[: N_HOPS + 1], names[N_HOPS + 1 :]
    question, answer_prefix = ask(example_value)
    example_text = hide_in_words(NOISE.excerpt(_EXAMPLE_NOISE), *chain(example_names, example_value))
    example = f"{introduction}{example_text}\n{question}{answer_prefix} {', '.join(example_names)}.\n\n"
    example = _if_it_fits(example, measure)

    steps, depths = chain(names, value)

    def write(n_words: int) -> str:
        return f"{example}{introduction}{hide_in_words(NOISE.excerpt(n_words), steps, depths)}\n"

    context = write(measure.fit(write))
    measure.check(context)
    return Sample(context, *ask(value), names)


def write_common_words(generator: random.Random, measure: Measure) -> Sample:
    """
    cwe: a numbered list in which ten words come ten times as often as the others; name the ten.

    They come 30 times, and the others 3 times, where the list is long enough for that and there are enough other words.
    """
    introduction = (
        "The list below repeats some words far more often than others. Remember those that it repeats most.\n"
    )
    question = f"Question: Which {N_COMMON} words does the list above repeat most often?\n"
    answer_prefix = f"Answer: The {N_COMMON} words that the list repeats most often are"
    singles = generator.sample(ADJECTIVES + NOUNS, len(ADJECTIVES + NOUNS))
    common, example_common = singles[:N_COMMON], singles[N_COMMON : 2 * N_COMMON]
    uncommon = singles[2 * N_COMMON :]
    # Once there are no more words, pairs of them, without the common ones: these must not be found in other words.
    adjectives, nouns = ([word for word in words if word not in common] for words in (ADJECTIVES, NOUNS))
    n_pairs = min(len(adjectives) * len(nouns), measure.length // UNCOMMON_COUNT)
    for i in generator.sample(range(len(adjectives) * len(nouns)), n_pairs):
        uncommon.append(f"{adjectives[i // len(nouns)]}-{nouns[i % len(nouns)]}")
    shuffle_seed = generator.getrandbits(64)

    def number(entries: list[str]) -> str:
        # The order is drawn anew, from the same seed, for each length that is tried.
        random.Random(shuffle_seed).shuffle(entries)
        return " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))

    example_list = number(_EXAMPLE_COMMON_COUNT * example_common + uncommon[:_EXAMPLE_N_UNCOMMON])
    example = f"{introduction}{example_list}\n{question}{answer_prefix} {', '.join(example_common)}.\n\n"
    example = _if_it_fits(example, measure)

    def write(n_entries: int) -> str:
        return f"{example}{introduction}{number(count_common_words(n_entries, common, uncommon))}\n"

    n_entries = measure.fit(write)
    if n_entries < 4 * N_COMMON:
        raise ValueError(f"a length of {measure.length} tokens is too small: it holds a list of {n_entries} words only")
    context = write(n_entries)
    measure.check(context)
    return Sample(context, question, answer_prefix, common)


def count_common_words(n_entries: int, common: list[str], uncommon: list[str]) -> list[str]:
    """
    The words of a list of ``n_entries`` common and uncommon ones.

    Each common word is repeated ``COMMON_COUNT`` times, and each uncommon one ``UNCOMMON_COUNT`` times, for as many
    uncommon ones as there is room for. Where more than three fifths of the list would be common words, all counts are
    lower; where there are not enough uncommon words, all are higher.
    """
    scale = 1
    while True:
        common_count, uncommon_count = scale * COMMON_COUNT, scale * UNCOMMON_COUNT
        n_uncommon_entries = n_entries - common_count * len(common)
        if n_uncommon_entries <= uncommon_count * len(uncommon):
            break
        scale += 1
    max_common_entries = n_entries * 3 // 5
    if scale == 1 and common_count * len(common) > max_common_entries:
        common_count = max_common_entries // len(common)
        uncommon_count = max(1, common_count * UNCOMMON_COUNT // COMMON_COUNT)
    entries = common * common_count
    repeated = itertools.chain.from_iterable(itertools.repeat(word, uncommon_count) for word in uncommon)
    return entries + list(itertools.islice(repeated, n_entries - len(entries)))


def write_frequent_words(generator: random.Random, measure: Measure) -> Sample:
    """fwe: made-up words whose counts follow Zipf's law, and dots that are more frequent still; name the top three."""
    introduction = "The text below is in code: dots mean nothing, and some words are more frequent than others.\n"
    question = (
        f"Question: Which {N_FREQUENT} coded words are the most frequent in the text above? Leave the dots out.\n"
    )
    answer_prefix = f"Answer: The {N_FREQUENT} most frequent words of the coded text are"
    n_words = max(measure.length // WORDS_PER_CODED_WORD, N_FREQUENT + 2)
    words = _draw_distinct(generator, n_words, string.ascii_lowercase, CODED_WORD_LENGTH)
    shuffle_seed = generator.getrandbits(64)

    def write(n_entries: int, n_dots: int = 0) -> str:
        entries = count_frequent_words(n_entries, words) + n_dots * ["..."]
        random.Random(shuffle_seed).shuffle(entries)
        return f"{introduction}{' '.join(entries)}\n"

    n_entries = measure.fit(write)
    counts = [count_frequent_words(n_entries, words).count(word) for word in words[: N_FREQUENT + 1]]
    if counts[N_FREQUENT] >= counts[N_FREQUENT - 1]:
        raise ValueError(f"a length of {measure.length} tokens is too small: it holds {n_entries} coded words only")
    # One entry more may bring several long words more: a few dots bring the context to its length.
    context = write(n_entries, measure.fit(lambda n_dots: write(n_entries, n_dots)))
    measure.check(context)
    return Sample(context, question, answer_prefix, words[:N_FREQUENT])


def count_frequent_words(n_entries: int, words: list[str]) -> list[str]:
    """
    The words of a coded text, the most frequent first.

    The dots have rank 1 and ``words`` the ranks from 2 on. Rank k has ``n_entries * k**-2 / zeta(2)`` entries, rounded
    down, and the dots have all that is left.
    """
    entries = [
        word
        for rank, word in enumerate(words, 2)
        for _ in range(int(n_entries * rank**-ZIPF_EXPONENT / zeta(ZIPF_EXPONENT)))
    ]
    return ["..."] * (n_entries - len(entries)) + entries


def _if_it_fits(example: str, measure: Measure) -> str:
    return example if measure.count_tokens(example) <= _EXAMPLE_SHARE * measure.length else ""


def _draw_distinct(generator: random.Random, n_words: int, letters: str, n_letters: int) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < n_words:
        words["".join(generator.choices(letters, k=n_letters))] = None
    return list(words)
