# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
import itertools
import json
import random
import re
from collections import Counter

import pandas as pd
import pytest

from evaluation.benchmarks.ruler import string_match
from evaluation.benchmarks.ruler_synthetic import MANY_QUESTION_TASKS, QUESTION_TASKS, TASKS, generate
from evaluation.benchmarks.ruler_synthetic.documents import read_hotpotqa, read_squad
from evaluation.benchmarks.ruler_synthetic.lists import count_common_words, count_frequent_words, write_common_words
from evaluation.benchmarks.ruler_synthetic.sample import Essay, Measure, even_depth, hide_in_words
from evaluation.benchmarks.ruler_synthetic.words import ADJECTIVES, NOUNS

LENGTH = 2000  # bytes, with this tokenizer; about 500 tokens of a real one

STATEMENT = re.compile(r"One of the secret (?:numbers|codes) for (\S+) is: (\S+)\.")
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    articles = [
        {
            "title": f"Town {town}",
            "paragraphs": [
                {
                    "context": f"Paragraph {i} of town {town}. "
                    + f"The mayor of {town}-{i} is Ms. {town}{i}. " * (5 + i),
                    "qas": [
                        {
                            "question": f"Who is the mayor of {town}-{i}?",
                            "answers": [{"text": f"Ms. {town}{i}"}, {"text": f"{town}{i}"}, {"text": f"{town}{i}"}],
                        },
                        {"question": f"Who is the king of {town}-{i}?", "answers": [], "is_impossible": True},
                    ],
                }
                for i in range(4)
            ],
        }
        for town in ("Aa", "Bb", "Cc", "Dd")
    ]
    squad = folder / "squad.json"
    squad.write_text(json.dumps({"version": "v2.0", "data": articles}))
    items = [
        {
            "question": f"Is river {i} longer than river {i + 1}?",
            "answer": "yes",
            "supporting_facts": [[f"River {i}", 0], [f"River {i + 1}", 1]],
            "context": [
                [f"River {j}", [f"River {j} is a river. ", f"It is {100 - j} km long. "] * 3] for j in range(i, i + 5)
            ],
        }
        for i in range(12)
    ]
    hotpotqa = folder / "hotpotqa.json"
    hotpotqa.write_text(json.dumps(items))
    return {"squad_file": squad, "hotpotqa_file": hotpotqa}


@pytest.fixture(scope="module")
def samples(tokenizer, files):
    return generate(tokenizer, LENGTH, n_samples=3, **files)


def of_task(samples, task):
    return samples[samples["task"] == task].to_dict("records")


def test_all_thirteen_tasks_of_the_paper_are_there(samples):
    assert Counter(samples["task"]) == dict.fromkeys((*TASKS, *QUESTION_TASKS), 3)
    assert len(TASKS) + len(QUESTION_TASKS) == 13
    assert {"context", "question", "answer_prefix", "answer", "max_new_tokens", "task"} <= set(samples.columns)


def test_question_tasks_are_left_out_where_there_are_no_files(tokenizer):
    assert set(generate(tokenizer, LENGTH, n_samples=1)["task"]) == set(TASKS)


def test_the_longest_answers_are_those_of_the_paper(samples):
    longest = samples.groupby("task")["max_new_tokens"].unique()
    assert {task: list(values) for task, values in longest.items()} == {
        **{task: [128] for task in TASKS if task.startswith("niah")},
        "vt": [30],
        "cwe": [120],
        "fwe": [50],
        "qa_1": [32],
        "qa_2": [32],
    }


@pytest.mark.parametrize("length", [700, 4001])
@pytest.mark.parametrize("task", TASKS)
def test_contexts_are_as_long_as_asked_within_two_percent(tokenizer, task, length):
    contexts = generate(tokenizer, length, n_samples=2, tasks=[task])["context"]
    assert all(0.98 * length <= len(context.encode()) <= length for context in contexts)


@pytest.mark.parametrize("task", QUESTION_TASKS)
def test_documents_are_cut_to_the_length(tokenizer, files, task):
    contexts = generate(tokenizer, 1500, n_samples=3, tasks=[task], **files)["context"]
    assert all(0.98 * 1500 <= len(context) <= 1500 for context in contexts)


@pytest.mark.parametrize(
    ("task", "n_keys", "n_values", "n_queries", "key", "value"),
    [
        ("niah_single_1", 1, 1, 1, r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah_single_2", 1, 1, 1, r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah_single_3", 1, 1, 1, r"[a-z]+-[a-z]+", UUID.pattern),
        ("niah_multikey_1", 4, 1, 1, r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah_multikey_2", None, 1, 1, r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah_multikey_3", None, 1, 1, UUID.pattern, UUID.pattern),
        ("niah_multivalue", 1, 4, 1, r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah_multiquery", 4, 1, 4, r"[a-z]+-[a-z]+", r"\d{7}"),
    ],
)
def test_needles_are_what_the_papers_table_says(samples, task, n_keys, n_values, n_queries, key, value):
    for sample in of_task(samples, task):
        stated: dict[str, list[str]] = {}
        for its_key, its_value in STATEMENT.findall(sample["context"]):
            assert re.fullmatch(key, its_key)
            assert re.fullmatch(value, its_value)
            stated.setdefault(its_key, []).append(its_value)
        if n_keys is None:  # the haystack is needles: it has as many as there is room for
            statement = len(f"One of the secret codes for {its_key} is: {its_value}. ")
            assert len(stated) > 0.85 * LENGTH / statement
        else:
            assert len(stated) == n_keys
        assert {len(values) for values in stated.values()} == {n_values}
        values = [its_value for values in stated.values() for its_value in values]
        assert len(set(values)) == len(values)
        asked = [its_key for its_key in stated if its_key in sample["question"]]
        assert len(asked) == n_queries
        assert sorted(sample["answer"]) == sorted(its_value for its_key in asked for its_value in stated[its_key])
        assert all(its_key in sample["answer_prefix"] for its_key in asked)


def test_what_is_asked_for_stands_in_the_context_alone(samples):
    for sample in samples[samples["task"].str.startswith("niah")].to_dict("records"):
        for answer in sample["answer"]:
            assert sample["context"].count(answer) == 1
            assert answer not in sample["question"] + sample["answer_prefix"]


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2"])
def test_needles_stand_at_every_depth(tokenizer, task):
    samples = generate(tokenizer, LENGTH, n_samples=25, tasks=[task])
    depths = sorted(depth for (depth,) in samples["depths"])
    assert depths[0] < 0.12
    assert depths[-1] > 0.88
    assert max(b - a for a, b in itertools.pairwise(depths)) < 0.2


def test_the_table_says_how_deep_each_needle_stands(samples):
    for sample in samples[samples["task"].str.startswith("niah")].to_dict("records"):
        haystack = sample["context"][sample["context"].index("\n") + 1 :]
        places = {match[2]: match.start() / (len(haystack) - len(match[0])) for match in STATEMENT.finditer(haystack)}
        assert sample["depths"] == pytest.approx([places[answer] for answer in sample["answer"]])


def test_every_stretch_of_the_depth_gets_its_share_of_samples():
    for n in (4, 8, 64):
        depths = sorted(even_depth(index, 0.3) for index in range(n))
        gaps = [b - a for a, b in zip(depths, [*depths[1:], depths[0] + 1])]
        assert max(gaps) == pytest.approx(1 / n)


def test_needles_go_between_sentences():
    words = ["One", "two.", "Three", "four", "five.", "Six", "seven."]
    assert hide_in_words(words, ["N1.", "N2."], [0.0, 0.99]) == "N1. One two. Three four five. Six seven. N2."
    assert hide_in_words(words, ["N1."], [0.4]) == "One two. N1. Three four five. Six seven."
    assert hide_in_words(words, ["Zz.", "Aa."], [0.4, 0.41]) == "One two. Zz. Aa. Three four five. Six seven."
    assert hide_in_words(words, ["N1."], [0.6]) == "One two. Three four five. N1. Six seven."


def test_the_essay_starts_with_a_sentence_and_goes_round():
    essay = Essay("Alpha beta.\n\n  Gamma delta epsilon. Zeta.")
    assert essay.excerpt(3, start=1) == ["Gamma", "delta", "epsilon."]
    assert essay.excerpt(4, start=2) == ["Zeta.", "Alpha", "beta.", "Gamma"]
    assert essay.excerpt(1, start=3) == ["Alpha"]


def test_a_text_file_is_the_haystack_of_the_essay_tasks(tokenizer, tmp_path):
    file = tmp_path / "sea.txt"
    file.write_text("Call me somebody. The sea is deep and cold. " * 40)
    sample = generate(tokenizer, LENGTH, n_samples=1, tasks=["niah_single_2"], text_file=file).iloc[0]
    haystack = STATEMENT.sub("", sample["context"].split("\n", 1)[1])
    assert set(haystack.split()) == {"Call", "me", "somebody.", "The", "sea", "is", "deep", "and", "cold."}


def test_variables_form_one_chain_of_four_hops(samples):
    for sample in of_task(samples, "vt"):
        (value,) = set(re.findall(r"\b\d{5}\b", sample["question"] + sample["answer_prefix"]))
        steps = re.findall(r"LET (\w+) = (\w+)\.", sample["context"])
        assert len(steps) == 5  # this short, there is no room for an example
        holders = [value]
        for name, source in steps:
            assert source == holders[-1]
            holders.append(name)
        assert sample["answer"] == holders[1:]
        assert all(re.fullmatch(r"[A-Z]{5}", name) for name in sample["answer"])


@pytest.mark.parametrize("task", ["vt", "cwe"])
def test_long_contexts_begin_with_a_worked_example_of_another_problem(tokenizer, task):
    sample = generate(tokenizer, 8000, n_samples=1, tasks=[task]).iloc[0]
    assert sample["context"].count("Question: ") == sample["context"].count("Answer: ") == 1
    example, problem = sample["context"].split("\n\n")
    assert len(example) <= 0.2 * 8000
    said = example[example.index("Answer: ") :]
    assert not any(answer in said for answer in sample["answer"])
    assert all(answer in problem for answer in sample["answer"])


def numbered_words(context):
    numbers, words = zip(*re.findall(r"(\d+)\. ([a-z-]+)", context.split("\n\n")[-1]))
    assert list(map(int, numbers)) == list(range(1, len(words) + 1))
    return Counter(words)


@pytest.mark.parametrize(("length", "common", "uncommon"), [(2000, None, 1), (16000, 30, 3)])
def test_ten_common_words_come_ten_times_as_often(tokenizer, length, common, uncommon):
    sample = generate(tokenizer, length, n_samples=1, tasks=["cwe"]).iloc[0]
    counts = numbered_words(sample["context"])
    in_common = {word: counts.pop(word) for word in sample["answer"]}
    assert len(in_common) == 10
    assert len(set(in_common.values())) == 1
    assert common is None or set(in_common.values()) == {common}
    assert max(counts.values()) == uncommon
    assert min(in_common.values()) >= 3 * uncommon
    assert sorted(counts.values())[1:] == [uncommon] * (len(counts) - 1)  # the last one may be cut short
    assert not any(word in other for word in in_common for other in counts)


def test_no_common_word_is_a_part_of_another_word_where_words_are_paired():
    sample = write_common_words(random.Random(0), Measure(20_000, lambda text: len(text.split())))
    counts = numbered_words(sample.context)
    assert len(counts) > 2000
    common = {word: counts.pop(word) for word in sample.answer}
    assert not any(word in other for word in common for other in counts)
    assert set(common.values()) == {30}


def test_counts_of_common_words_fit_the_list():
    common, uncommon = [f"c{i}" for i in range(10)], [f"u{i}" for i in range(100)]
    assert Counter(count_common_words(600, common, uncommon)) == dict.fromkeys(common, 30) | dict.fromkeys(uncommon, 3)
    short = Counter(count_common_words(100, common, uncommon))
    assert [short[word] for word in common] == [6] * 10
    assert sorted(short.values())[:40] == [1] * 40
    long = Counter(count_common_words(1100, common, uncommon))  # 300 + 3 * 100 would leave 500 entries without a word
    assert long.total() == 1100
    assert [long[word] for word in common] == [60] * 10
    assert max(long[word] for word in uncommon) == 6


def test_coded_words_follow_zipfs_law(tokenizer):
    sample = generate(tokenizer, 8000, n_samples=1, tasks=["fwe"]).iloc[0]
    counts = Counter(sample["context"].split("\n")[1].split())
    total, dots = counts.total(), counts.pop("...")
    assert all(re.fullmatch(r"[a-z]{6}", word) for word in counts)
    assert [word for word, _ in counts.most_common(3)] == sample["answer"]
    assert dots > counts.most_common(1)[0][1]
    # zeta(2) = pi^2 / 6
    expected = [total * rank**-2 / 1.6449340668 for rank in (2, 3, 4)]
    assert [count for _, count in counts.most_common(3)] == pytest.approx(expected, rel=0.05)


def test_coded_words_are_counted_exactly():
    # 1000 / zeta(2) = 607.9: a quarter, a ninth and a sixteenth of it, rounded down, and all else is dots
    counts = Counter(count_frequent_words(1000, ["aaaaaa", "bbbbbb", "cccccc"]))
    assert counts == {"...": 745, "aaaaaa": 151, "bbbbbb": 67, "cccccc": 37}


def test_squad_questions_come_with_their_paragraph_and_others(samples, files):
    corpus = read_squad(files["squad_file"])
    assert len(corpus.questions) == len(corpus.documents) == 16  # the impossible ones are left out
    by_text = {question.text: question for question in corpus.questions}
    asked = [sample["question"] for sample in of_task(samples, "qa_1")]
    assert len(set(asked)) == len(asked)
    for sample in of_task(samples, "qa_1"):
        question = by_text[sample["question"].removeprefix("Question: ").strip()]
        assert sample["answer"] == question.answers
        assert len(set(question.answers)) == len(question.answers) == 2
        assert sample["context"].count(question.needed[0]) == 1
        titles = re.findall(r"^Document (\d+):$", sample["context"], re.MULTILINE)
        assert titles == [str(i) for i in range(1, len(titles) + 1)]
        assert len(titles) > 3


def test_hotpotqa_questions_come_with_both_their_documents(samples, files):
    by_text = {question.text: question for question in read_hotpotqa(files["hotpotqa_file"]).questions}
    for sample in of_task(samples, "qa_2"):
        question = by_text[sample["question"].removeprefix("Question: ").strip()]
        assert len(question.needed) == 2
        assert len(question.related) == 3
        assert all(sample["context"].count(document) == 1 for document in question.needed)


def test_the_same_seed_makes_the_same_samples_and_another_seed_others(tokenizer, samples, files):
    again = generate(tokenizer, LENGTH, n_samples=3, **files)
    pd.testing.assert_frame_equal(samples, again)
    other = generate(tokenizer, LENGTH, n_samples=1, seed=7, **files)
    assert not set(samples["context"]) & set(other["context"])


def test_fewer_samples_are_the_first_of_more(tokenizer, samples):
    few = generate(tokenizer, LENGTH, n_samples=2, tasks=["niah_multikey_1"])
    assert few.to_dict("records") == of_task(samples, "niah_multikey_1")[:2]


@pytest.mark.parametrize("task", MANY_QUESTION_TASKS)
@pytest.mark.parametrize("n_questions", [2, 6])
def test_several_questions_about_a_context_are_for_different_needles_in_it(tokenizer, task, n_questions):
    rows = generate(tokenizer, LENGTH, n_samples=2, tasks=[task], n_questions=n_questions)
    assert rows["context_number"].tolist() == [0] * n_questions + [1] * n_questions
    assert rows["turn"].tolist() == [*range(1, n_questions + 1)] * 2
    for _, group in rows.groupby("context_number"):
        assert group["context"].nunique() == 1
        assert group["question"].nunique() == group["answer_prefix"].nunique() == n_questions
        stated = {}
        for key, value in STATEMENT.findall(group["context"].iloc[0]):
            stated.setdefault(key, []).append(value)
        for row in group.itertuples():
            (key,) = (key for key in stated if f" for {key} " in row.question)
            assert f" for {key} " in row.answer_prefix
            assert sorted(row.answer) == sorted(stated[key])
            assert len(row.depths) == len(row.answer)
    contexts = rows.drop_duplicates("context_number")["context_tokens"]
    assert contexts.between(LENGTH * 0.98, LENGTH).all()


def test_the_first_of_several_questions_is_about_the_needle_at_an_even_depth(tokenizer):
    one, many = (
        generate(tokenizer, LENGTH, n_samples=4, tasks=["niah_multikey_2"], n_questions=n_questions)
        for n_questions in (1, 4)
    )
    first = many[many["turn"] == 1]["depths"].tolist()
    assert [depths[0] for depths in first] == pytest.approx([depths[0] for depths in one["depths"]], abs=0.1)


def test_one_question_is_asked_without_a_turn(tokenizer, samples):
    assert not {"turn", "context_number"} & set(samples)


def test_by_default_several_questions_are_asked_in_the_tasks_that_can_and_no_other_takes_them(tokenizer):
    rows = generate(tokenizer, LENGTH, n_samples=1, n_questions=2)
    assert tuple(rows["task"].unique()) == MANY_QUESTION_TASKS
    with pytest.raises(
        ValueError, match=r"the task vt has one question a context, --n_questions is for niah_multikey_1"
    ):
        generate(tokenizer, LENGTH, n_samples=1, n_questions=2, tasks=["niah_multivalue", "vt"])


def test_no_word_is_a_part_of_another():
    words = ADJECTIVES + NOUNS
    assert len(set(words)) == len(words)
    assert [(a, b) for a in words for b in words if a != b and a in b] == []


@pytest.mark.parametrize(
    ("task", "length", "message"),
    [
        ("niah_single_1", 100, "niah_single_1: a length of 100 tokens is too small, at least"),
        ("vt", 150, "vt: a length of 150 tokens is too small, at least"),
        ("cwe", 300, "cwe: a length of 300 tokens is too small: it holds a list of"),
        ("fwe", 150, "fwe: a length of 150 tokens is too small: it holds"),
        ("niah_sngle_1", 500, "there is no task 'niah_sngle_1'; did you mean niah_single_1"),
        ("qa_1", 500, "the task qa_1 needs --squad_file"),
    ],
)
def test_what_cannot_be_made_is_told(tokenizer, task, length, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(tokenizer, length, n_samples=1, tasks=[task])


def test_too_few_documents_for_the_length_are_told(tokenizer, files):
    with pytest.raises(ValueError, match=r"qa_1: no context of 50000 tokens can be written"):
        generate(tokenizer, 50_000, n_samples=1, tasks=["qa_1"], **files)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "JSONDecodeError"), ('{"version": 1}', "KeyError: 'data'"), ('{"data": []}', "has no question")],
)
def test_a_file_of_another_format_is_told(tokenizer, tmp_path, content, message):
    file = tmp_path / "squad.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        generate(tokenizer, 500, n_samples=1, tasks=["qa_1"], squad_file=file)


def test_the_search_for_a_length_copes_with_jumps_and_with_filler_that_runs_out():
    assert Measure(500, len).fit(lambda n: "x" * (10 + 3 * n + 400 * (n > 90))) == 90
    n_units = Measure(1000, len).fit(lambda n: "x" * min(n, 600))
    assert n_units >= 600


def test_string_match_counts_what_is_found():
    predictions = pd.DataFrame(
        {
            "task": ["niah_multivalue", "niah_single_1", "vt", "qa_1", "qa_2"],
            "answer": [["12", "34", "56", "78"], ["ABC"], ["AAA", "BBB"], ["Rome", "the city"], ["Rome"]],
            "predicted_answer": ["12 and 78, also 56.", " x\x00abc\n", "aaa", "It is the\tcity? No: The city", "Paris"],
        },
        index=[4, 2, 0, 1, 3],
    )
    scores = string_match(predictions)
    assert scores.index.tolist() == [4, 2, 0, 1, 3]
    assert scores["string_match"].tolist() == [75.0, 100.0, 50.0, 100.0, 0.0]
