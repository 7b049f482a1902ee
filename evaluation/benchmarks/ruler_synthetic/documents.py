# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""RULER's question-answering tasks: a real question, the documents that answer it, and others around them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.benchmarks.ruler_synthetic.sample import Measure, Sample


@dataclass(frozen=True)
class Question:
    """
    A question, and answers any of which is right, with the documents that hold the answer.

    Related ones are on the same subject and do not: the first to be put around the needed ones.
    """

    text: str
    answers: list[str]
    needed: list[str]
    related: list[str]


@dataclass(frozen=True)
class Corpus:
    """Questions, and every document of the file that they come from."""

    questions: list[Question]
    documents: list[str]


def read_squad(file: str | Path) -> Corpus:
    """
    Read SQuAD's JSON format (1.1 or 2.0; https://rajpurkar.github.io/SQuAD-explorer).

    A ValueError says if the file is not of that format, or has no question with an answer.
    """

    def parse(content: Any) -> Iterator[Question]:
        for article in content["data"]:
            contexts = [paragraph["context"] for paragraph in article["paragraphs"]]
            for paragraph in article["paragraphs"]:
                context = paragraph["context"]
                related = [other for other in contexts if other != context]
                for item in paragraph["qas"]:
                    answers = list(dict.fromkeys(answer["text"] for answer in item["answers"]))
                    if answers and not item.get("is_impossible", False):
                        yield Question(item["question"], answers, [context], related)

    return _read(file, "SQuAD", parse)


def read_hotpotqa(file: str | Path) -> Corpus:
    """
    Read HotpotQA's JSON format (https://hotpotqa.github.io, the distractor setting).

    A ValueError says if the file is not of that format, or has no question.
    """

    def parse(content: Any) -> Iterator[Question]:
        for item in content:
            needed_titles = {title for title, _ in item["supporting_facts"]}
            documents = [(title, f"{title}\n{''.join(sentences)}") for title, sentences in item["context"]]
            needed = [document for title, document in documents if title in needed_titles]
            related = [document for title, document in documents if title not in needed_titles]
            yield Question(item["question"], [item["answer"]], needed, related)

    return _read(file, "HotpotQA", parse)


def write_questions(
    corpus: Corpus, generators: Iterable[random.Random], order: random.Random, measure: Measure
) -> Iterator[Sample]:
    """
    qa: answer a question about documents, most of which have nothing to do with it.

    Parameters
    ----------
    generators : iterable of random.Random
        One for each sample; draws its other documents, and the order of all.
    order : random.Random
        Draws the questions, among those whose documents fit.
    measure : Measure
        The length of the contexts; the last document is cut to it.

    A ValueError says if there are not enough questions whose documents fit, or not enough documents.
    """
    questions = order.sample(corpus.questions, len(corpus.questions))
    fitting = (question for question in questions if measure.count_tokens(_write(question.needed)) <= measure.length)
    for generator in generators:
        if (question := next(fitting, None)) is None:
            raise ValueError(
                f"a length of {measure.length} tokens is too small: fewer questions than wanted have documents that fit"
            )
        yield _write_sample(question, corpus, generator, measure)


def _write_sample(question: Question, corpus: Corpus, generator: random.Random, measure: Measure) -> Sample:
    kept_out = {*question.needed, *question.related}
    unrelated = [document for document in corpus.documents if document not in kept_out]
    others = [document for group in (question.related, unrelated) for document in generator.sample(group, len(group))]
    order_seed = generator.getrandbits(64)

    def write(n_words: int) -> str:
        documents = [*question.needed, *_cut(others, n_words)]
        random.Random(order_seed).shuffle(documents)
        return _write(documents)

    context = write(measure.fit(write))
    measure.check(context)
    return Sample(context, f"Question: {question.text}\n", "Answer:", question.answers)


def _write(documents: list[str]) -> str:
    introduction = (
        "Some documents follow, and then a question about them. Answer it in a few words, without an explanation.\n\n"
    )
    return introduction + "".join(f"Document {i}:\n{document}\n\n" for i, document in enumerate(documents, 1))


def _cut(documents: list[str], n_words: int) -> Iterator[str]:
    """The first ``n_words`` words of the documents; the last one may end early."""
    for document in documents:
        if n_words <= 0:
            return
        words = document.split(" ")
        yield " ".join(words[:n_words])
        n_words -= len(words)


def _read(file: str | Path, kind: str, parse: Callable[[Any], Iterator[Question]]) -> Corpus:
    try:
        questions = list(parse(json.loads(Path(file).expanduser().read_text(encoding="utf-8"))))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a file of {kind}'s JSON format: {type(error).__name__}: {error}") from error
    if not questions:
        raise ValueError(f"{file} has no question with an answer")
    documents = dict.fromkeys(document for question in questions for document in (*question.needed, *question.related))
    return Corpus(questions, list(documents))
