# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
import contextlib
import math

import pandas as pd
import pytest
import torch
from kvpress import (
    AdaKVPress,
    DecodingPress,
    DMSPress,
    KeyRerotationPress,
    KnormPress,
    KVPressTextGenerationPipeline,
    PrefillDecodingPress,
    PyramidKVPress,
    SnapKVPress,
)
from kvpress.utils import extract_keys_and_values
from transformers import DynamicCache

from evaluation import prefill as prefill_module
from evaluation import run as run_command
from evaluation.answers import Questions
from evaluation.config import EvaluationConfig
from evaluation.evaluate import measure, prepare
from evaluation.evaluate_registry import DATASET_REGISTRY
from evaluation.likelihood import (
    ReadAnswer,
    answer_kl,
    answer_nll,
    encode_references,
    read_answers,
    references_of,
)
from evaluation.prefill import acts_while_decoding
from evaluation.presses import configure_press
from kvpress_merging import AttentionMatchingPress, MergingPress

CONTEXT_IDS = torch.randint(3, 259, (1, 96), generator=torch.Generator().manual_seed(0))
QUESTION_IDS = torch.randint(3, 259, (1, 7), generator=torch.Generator().manual_seed(1))
REFERENCES = [torch.tensor([5, 17, 200]), torch.tensor([9]), torch.tensor([30, 31, 32, 33, 34])]


def prefill(model, press=None, input_ids=CONTEXT_IDS):
    cache = DynamicCache()
    with torch.no_grad(), press(model) if press is not None else contextlib.nullcontext():
        model.model(input_ids=input_ids, past_key_values=cache)
    return cache


def naive_log_probs(model, reference):
    """One forward pass over the whole text, without a cache: float64, at the answer's tokens."""
    text_ids = torch.cat([CONTEXT_IDS[0], QUESTION_IDS[0], reference])[None]
    with torch.no_grad():
        logits = model(text_ids, use_cache=False).logits[0].double()
    start = CONTEXT_IDS.shape[1] + QUESTION_IDS.shape[1]
    rows = []
    for i in range(len(reference)):
        row = logits[start + i - 1]
        rows.append(row - row.exp().sum().log())
    return rows


def test_answer_nll_is_that_of_a_pass_without_a_cache(model):
    readings = read_answers(model, prefill(model), QUESTION_IDS, REFERENCES, CONTEXT_IDS.shape[1])
    means = []
    for reference in REFERENCES:
        rows = naive_log_probs(model, reference)
        means.append(sum(-float(row[token]) for row, token in zip(rows, reference)) / len(reference))
    assert answer_nll(readings) == pytest.approx(sum(means) / len(means), rel=1e-5)
    assert answer_nll(readings[1:2]) == pytest.approx(means[1], rel=1e-5)


def test_answer_kl_is_the_mean_over_tokens_and_then_over_references():
    generator = torch.Generator().manual_seed(2)
    sides, expected = [], []
    for n_tokens in (3, 1):
        pair = [torch.randn(n_tokens, 11, generator=generator).log_softmax(-1) for _ in range(2)]
        sides.append(pair)
        total = 0.0
        for i in range(n_tokens):
            for v in range(11):
                p, q = float(pair[0][i, v]), float(pair[1][i, v])
                total += math.exp(p) * (p - q)
        expected.append(total / n_tokens)
    full, other = ([ReadAnswer(torch.zeros(len(side), dtype=torch.long), side) for side in of] for of in zip(*sides))
    assert answer_kl(full, other) == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert answer_kl(full, full) == 0.0


def test_without_references_there_is_no_likelihood():
    assert math.isnan(answer_nll([]))
    assert math.isnan(answer_kl([], []))


PRESSES = {
    "bare": lambda: KnormPress(0.5),
    "lengths that differ between layers": lambda: PyramidKVPress(0.5, window_size=8),
    "masked": lambda: AdaKVPress(SnapKVPress(0.5, window_size=8)),
    "merged": lambda: MergingPress(KnormPress(0.5)),
    "merged and masked": lambda: MergingPress(AdaKVPress(KnormPress(0.7))),
    "matching": lambda: AttentionMatchingPress(KnormPress(0.5)),
}


@pytest.mark.parametrize("make", PRESSES.values(), ids=PRESSES)
def test_an_answer_is_read_as_kvpress_would_decode_it_token_by_token(make, model):
    readings = read_answers(model, prefill(model, make()), QUESTION_IDS, REFERENCES, CONTEXT_IDS.shape[1])
    for reference, reading in zip(REFERENCES, readings):
        cache = prefill(model, make())
        rows = []
        for place, token in enumerate([*QUESTION_IDS[0], *reference[:-1]]):
            position_ids = torch.tensor([[CONTEXT_IDS.shape[1] + place]])
            with torch.no_grad():
                logits = model(token.view(1, 1), past_key_values=cache, position_ids=position_ids).logits
            rows.append(logits[0, -1].double().log_softmax(-1))
        expected = torch.stack(rows[-len(reference) :])
        torch.testing.assert_close(reading.log_probs.double(), expected, rtol=1e-4, atol=1e-4)
        assert reading.log_probs.dtype == torch.float32
        assert torch.equal(reading.token_ids, reference)


def test_a_question_is_read_once_for_all_its_answers(model):
    lengths = []
    with model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    ):
        read_answers(model, prefill(model), QUESTION_IDS, REFERENCES[:1], CONTEXT_IDS.shape[1])
        read_answers(model, prefill(model), QUESTION_IDS[:, :1], REFERENCES[:2], CONTEXT_IDS.shape[1])
        prefills = [CONTEXT_IDS.shape[1]]
        assert lengths == [*prefills, 7 + 3, *prefills, 1 + 3, 1 + 1]
        lengths.clear()
        assert read_answers(model, prefill(model), QUESTION_IDS, [], CONTEXT_IDS.shape[1]) == []
        assert lengths == prefills
        lengths.clear()
        read_answers(model, prefill(model), QUESTION_IDS, REFERENCES, CONTEXT_IDS.shape[1])
        assert lengths == [*prefills, 7 - 1, 1 + 3, 1 + 1, 1 + 5]


@pytest.mark.parametrize("make", PRESSES.values(), ids=PRESSES)
def test_cache_and_masks_are_left_as_they_were(make, model):
    cache = prefill(model, make())
    layers = [layer.self_attn for layer in model.model.layers]

    def everything():
        tensors = [tensor for i in range(len(layers)) for tensor in extract_keys_and_values(cache, i)]
        masks = [getattr(layer, "masked_key_indices", None) for layer in layers]
        return [tensor.clone() for tensor in tensors], masks

    tensors, masks = everything()
    read_answers(model, cache, QUESTION_IDS, REFERENCES, CONTEXT_IDS.shape[1])
    tensors_after, masks_after = everything()
    assert all(torch.equal(one, other) for one, other in zip(tensors, tensors_after, strict=True))
    assert all(one is other for one, other in zip(masks, masks_after, strict=True))


# Questions about one context


def ask(model, tokenizer, press, references=(["one"], ["two", "three"]), **settings):
    samples = pd.DataFrame(
        {
            "sample": [0, 1],
            "context": "Some words that are long enough to evict a few. " * 3,
            "question": ["Which is it?", "And that?"],
            "answer_prefix": ["It is", "That is"],
            "answer": list(references),
            "max_new_tokens": 6,
        }
    )
    read = Questions(model, tokenizer, samples, EvaluationConfig(dataset="ruler", **settings))
    (context,) = read.contexts
    return read.measure(context, prefill_module.prefill(model, read.input_ids(context), press))


# kvpress's pipeline cannot ask a tiny model over the other caches: layers of several lengths, masks for which it finds
# no key that no query attends to.
ANSWERING = {
    **{name: PRESSES[name] for name in ("bare", "merged", "matching")},
    "full cache": lambda: None,
    "rotated anew": lambda: KeyRerotationPress(press=KnormPress(0.5)),
}


@pytest.mark.parametrize("make", ANSWERING.values(), ids=ANSWERING)
def test_reading_changes_no_answer(make, model, tokenizer):
    rows = ask(model, tokenizer, make())
    without = ask(model, tokenizer, make(), references=([], []))
    assert [row["predicted_answer"] for row in rows] == [row["predicted_answer"] for row in without]
    assert all(math.isfinite(row["answer_nll"]) for row in rows)
    assert not any("answer_nll" in row for row in without)


@pytest.mark.parametrize("make", {**PRESSES, **ANSWERING}.values(), ids={**PRESSES, **ANSWERING})
def test_reading_changes_no_later_reading(make, model, tokenizer):
    rows = ask(model, tokenizer, make(), max_new_tokens=0)
    alone = ask(model, tokenizer, make(), references=([], ["two", "three"]), max_new_tokens=0)
    assert math.isnan(alone[0]["answer_nll"])
    assert rows[1]["answer_nll"] == alone[1]["answer_nll"]


def test_what_a_press_has_masked_is_not_read(model, tokenizer):
    press = PRESSES["masked"]
    (row, _) = ask(model, tokenizer, press(), max_new_tokens=0)
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    settings, _, _ = pipeline._sanitize_parameters(question="Which is it?", answer_prefix="It is")
    encoded = pipeline.preprocess("Some words that are long enough to evict a few. " * 3, **settings)
    (question_ids,), start = encoded["questions_ids"], encoded["context_ids"].shape[1]
    cache = prefill(model, press(), encoded["context_ids"])
    assert model.model.layers[1].self_attn.masked_key_indices is not None
    references = encode_references(tokenizer, question_ids, ["one"])
    assert row["answer_nll"] == answer_nll(read_answers(model, cache, question_ids, references, start))


def test_without_new_tokens_nothing_is_generated(model, tokenizer, monkeypatch):
    monkeypatch.setattr(
        KVPressTextGenerationPipeline, "generate_answer", lambda *args: pytest.fail("an answer was generated")
    )
    rows = ask(model, tokenizer, KnormPress(0.5), max_new_tokens=0)
    assert all(math.isfinite(row["answer_nll"]) and "predicted_answer" not in row for row in rows)


@pytest.mark.parametrize(("prefix", "text"), [("It is", " grey"), ("It is\n", "grey"), ("It is ", "grey")])
def test_a_space_parts_an_answer_from_its_prefix_once(prefix, text, tokenizer):
    question_ids = tokenizer.encode(prefix, add_special_tokens=False, return_tensors="pt")
    (token_ids,) = encode_references(tokenizer, question_ids, ["grey ", "", " "])
    assert tokenizer.decode(token_ids) == text


def test_a_tokenizer_that_puts_a_space_before_a_text_puts_none_into_an_answer(tokenizer):
    class WithSpace:
        decode = staticmethod(tokenizer.decode)

        def encode(self, text, **kwargs):
            return tokenizer.encode(" " + text, **kwargs)

    question_ids = tokenizer.encode("It is", add_special_tokens=False, return_tensors="pt")
    for prefix in ("It is", "It is\n"):
        question_ids = tokenizer.encode(prefix, add_special_tokens=False, return_tensors="pt")
        (expected,) = encode_references(tokenizer, question_ids, ["grey"])
        (token_ids,) = encode_references(WithSpace(), question_ids, ["grey"])
        assert torch.equal(token_ids, expected)


@pytest.mark.parametrize("column", ["answer", "answers", "needle"])
def test_references_are_found_by_the_columns_of_the_datasets(column):
    assert references_of(pd.DataFrame({column: [["a", "b"], ["c"]]})) == [["a", "b"], ["c"]]
    assert references_of(pd.DataFrame({column: ["a", "b"]})) == [["a"], ["b"]]
    assert references_of(pd.DataFrame({"question": ["a", "b"]})) == [[], []]


# A run


@pytest.fixture
def questions(monkeypatch):
    samples = pd.DataFrame(
        {
            "context": ["The cat is grey. " * 6, "The dog is brown. " * 6, "The cat is grey. " * 6],
            "question": ["Cat?", "Dog?", "Grey what?"],
            "answer_prefix": "It is",
            "answer": [["grey"], ["brown", "a dog"], ["cat"]],
            "max_new_tokens": 5,
            "task": "pets",
        }
    )
    monkeypatch.setitem(DATASET_REGISTRY, "ruler", lambda tokenizer: samples.copy())
    return samples


def run(model, tokenizer, **settings):
    return measure(prepare(EvaluationConfig(dataset="ruler", quiet=True, **settings), model, tokenizer))


def test_a_run_measures_the_likelihood_beside_the_answers(model, tokenizer, questions):
    predictions, metrics = run(model, tokenizer, press_name="knorm", answer_kl=True)
    row = predictions.loc[1]
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    settings, _, _ = pipeline._sanitize_parameters(question="Dog?", answer_prefix="It is")
    encoded = pipeline.preprocess(questions["context"][1], **settings)
    references = encode_references(tokenizer, encoded["questions_ids"][0], row["answer"])
    readings = []
    for press in (None, KnormPress(0.5)):
        cache = prefill(model, press, encoded["context_ids"])
        start = encoded["context_ids"].shape[1]
        readings.append(read_answers(model, cache, encoded["questions_ids"][0], references, start))
    assert row["answer_nll"] == answer_nll(readings[1])
    assert row["answer_kl"] == answer_kl(*readings) > 0
    assert set(metrics["pets"]) == {"string_match", "answer_nll", "answer_kl"}
    assert metrics["pets"]["answer_kl"] == predictions["answer_kl"].mean()
    plain, _ = run(model, tokenizer, press_name="knorm")
    assert "answer_kl" not in plain
    assert plain["answer_nll"].tolist() == predictions["answer_nll"].tolist()
    assert plain["predicted_answer"].tolist() == predictions["predicted_answer"].tolist()


def test_several_questions_about_a_context_are_asked_in_turn_over_one_prefill(model, tokenizer):
    prefills = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: prefills.append(1) if kwargs["input_ids"].shape[1] > 500 else None,
        with_kwargs=True,
    )
    settings = {"data_dir": "1500", "n_samples": 2, "tasks": ["niah_multivalue"], "n_questions": 3, "max_new_tokens": 4}
    config = EvaluationConfig(press_name="knorm", quiet=True, **settings)
    try:
        evaluation = prepare(config, model, tokenizer)
        predictions, _ = measure(evaluation)
    finally:
        handle.remove()
    assert len(prefills) == 2
    assert predictions["turn"].tolist() == [1, 2, 3] * 2
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    for sample, row in zip(evaluation.samples.itertuples(), predictions.itertuples(), strict=True):
        asked = {"question": row.question, "answer_prefix": row.answer_prefix, "max_new_tokens": 4}
        assert row.predicted_answer == pipeline(sample.context, press=KnormPress(0.5), **asked)["answer"]


def test_several_questions_need_one_compressed_context(model, tokenizer):
    config = EvaluationConfig(press_name="knorm", n_questions=2, query_aware=True)
    with pytest.raises(ValueError, match="--query_aware compresses one for each"):
        prepare(config, model, tokenizer)


def test_the_full_cache_is_no_distance_from_itself(model, tokenizer, questions):
    predictions, _ = run(model, tokenizer, press_name="no_press", answer_kl=True)
    assert (predictions["answer_kl"] == 0).all()


@pytest.mark.parametrize(("settings", "n_prefills"), [({}, 2), ({"answer_kl": True}, 4)])
def test_the_divergence_costs_one_more_prefill_of_each_context(settings, n_prefills, model, tokenizer, questions):
    prefills = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: prefills.append(1) if kwargs["input_ids"].shape[1] > 60 else None, with_kwargs=True
    )
    try:
        run(model, tokenizer, press_name="knorm", max_new_tokens=0, **settings)
    finally:
        handle.remove()
    assert len(prefills) == n_prefills


def test_the_likelihood_alone_has_no_answers_and_no_scores_of_them(model, tokenizer, questions):
    predictions, metrics = run(model, tokenizer, press_name="knorm", max_new_tokens=0)
    answered, _ = run(model, tokenizer, press_name="knorm")
    assert set(metrics["pets"]) == {"answer_nll"}
    assert not {"predicted_answer", "string_match"} & set(predictions)
    assert predictions["answer_nll"].tolist() == answered["answer_nll"].tolist()


def test_a_press_that_evicts_while_it_answers_has_no_likelihood(model, tokenizer, questions):
    predictions, metrics = run(model, tokenizer, press_name="decoding_knorm")
    assert predictions["answer_nll"].isna().all()
    assert set(metrics["pets"]) == {"string_match"}
    for settings in ({"max_new_tokens": 0}, {"answer_kl": True}):
        with pytest.raises(ValueError, match="decoding_knorm evicts while it answers: it has no likelihood"):
            configure_press(EvaluationConfig(press_name="decoding_knorm", **settings))


@pytest.mark.parametrize(
    ("press", "expected"),
    [
        (None, False),
        (KnormPress(), False),
        (DecodingPress(KnormPress()), True),
        (MergingPress(DecodingPress(KnormPress())), True),
        (PrefillDecodingPress(KnormPress(), DecodingPress(KnormPress())), True),
        (DMSPress(KnormPress(), threshold=0.0), False),
        (DMSPress(KnormPress(), threshold=0.0, decoding=True), True),
    ],
)
def test_presses_that_evict_while_decoding_are_known_by_what_the_pipeline_asks(press, expected):
    assert acts_while_decoding(press) == expected


def test_the_likelihood_of_a_dataset_without_references_is_refused(model, tokenizer, questions, monkeypatch):
    monkeypatch.setitem(DATASET_REGISTRY, "ruler", lambda tokenizer: questions.drop(columns="answer"))
    with pytest.raises(ValueError, match="the dataset ruler has no reference answers to measure"):
        run(model, tokenizer, max_new_tokens=0)


def test_what_is_measured_is_in_the_name_of_the_folder():
    assert EvaluationConfig(max_new_tokens=0).folder_name().endswith("max_new_tokens0")
    assert EvaluationConfig(answer_kl=True).folder_name().endswith("answer_kl")


def test_fewer_than_no_new_tokens_are_refused(capsys):
    with pytest.raises(SystemExit):
        run_command.main(["--max_new_tokens", "-1"])
    assert "--max_new_tokens must be an integer of at least 0" in capsys.readouterr().err
