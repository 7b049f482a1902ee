# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Reference queries are those that the layer itself asks, in every family that a bare press runs on."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import prefilled, tiny_models
from kvpress import KeyRerotationPress, KnormPress
from replay import attention_modules, run
from tiny import FAMILIES, tiny_model
from transformers import DynamicCache, GlmConfig, GlmForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from evaluation.benchmarks.fidelity.measure import measure_fidelity, measure_reference
from evaluation.models import load_model
from evaluation.text import built_in_text, cut_windows
from kvpress_merging import AttentionMatchingPress, MergingPress
from kvpress_merging import attention_matching_press as press_module
from kvpress_merging.kernels.match import attention_match
from kvpress_merging.queries import ask
from kvpress_merging.reference import reference_positions

MAPPINGS = {"causal": MODEL_FOR_CAUSAL_LM_MAPPING, "vision-language": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING}
N_CONTEXT, N_QUERIES = 23, 7


class Seen(Exception):
    pass


def asked_from_the_end(module, kwargs: dict[str, Any], position: int, monkeypatch) -> dict[str, Any]:
    """
    What a layer gives to attention for its last token, were that token's input what stands at another position.

    The whole pass is done anew, by the layer's own code, with one row of its input changed.
    """
    seen: list[dict[str, Any]] = []

    def attention(module, query, key, value, attention_mask, scaling=None, **others):
        seen.append({"query": query[:, :, -1], "scaling": scaling, **others})
        raise Seen

    hidden_states = kwargs["hidden_states"].clone()
    hidden_states[:, -1] = hidden_states[:, position]
    with monkeypatch.context() as patch, torch.no_grad(), pytest.raises(Seen):
        for name in ("sdpa", "flash_attention_2"):
            patch.setitem(ALL_ATTENTION_FUNCTIONS, name, attention)
        patch.setattr(sys.modules[type(module).__module__], "eager_attention_forward", attention, raising=False)
        module(**kwargs | {"hidden_states": hidden_states, "past_key_values": None})
    return seen[0]


def passes(model: PreTrainedModel, input_ids: torch.Tensor) -> dict[int, dict[str, Any]]:
    """What each attention layer is given in a prefill, by layer."""
    seen: dict[int, dict[str, Any]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update({module.layer_idx: kwargs}), with_kwargs=True
        )
        for module in attention_modules(model)
    ]
    prefilled(model, None, input_ids)
    for handle in handles:
        handle.remove()
    return seen


def error_of_queries(model: PreTrainedModel, input_ids: torch.Tensor, monkeypatch) -> float:
    """
    The largest error, relative to its norm, of a query that matching is given, or of its soft cap or sink.

    In any layer that lost positions, at any reference position.
    """
    given: list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]] = []

    def watched_match(*args, key_ridge, **logits):
        given.append((*args[4:6], logits))
        return attention_match(*args, key_ridge=key_ridge, **logits)

    with monkeypatch.context() as patch:
        patch.setattr(press_module, "attention_match", watched_match)
        press = AttentionMatchingPress(KnormPress(0.5), n_queries=N_QUERIES)
        prefilled(model, press, input_ids)
    seen, layers = passes(model, input_ids), press.report.to_dict()
    positions = reference_positions(torch.tensor([N_CONTEXT]), N_QUERIES).tolist()
    assert len(given) == len(layers) > 0
    errors = [0.0]
    for module in attention_modules(model):
        if module.layer_idx not in layers:
            continue
        queries, kept_queries, logits = given.pop(0)
        assert kept_queries is queries
        for n, position in enumerate(positions):
            expected = asked_from_the_end(module, seen[module.layer_idx], position, monkeypatch)
            query = expected["query"].unflatten(1, (queries.shape[1], -1))
            head = n % query.shape[2]
            scaling = query.shape[-1] ** -0.5 if expected["scaling"] is None else expected["scaling"]
            expected_query = query[:, :, head].float() * scaling
            errors.append(float((queries[:, :, n] - expected_query).norm() / expected_query.norm()))
            assert logits["softcap"] == expected.get("softcap")
            assert (logits["sinks"] is None) == (expected.get("s_aux") is None)
            if logits["sinks"] is not None:
                sinks = expected["s_aux"].float().unflatten(0, (queries.shape[1], -1))[:, head]
                assert torch.equal(logits["sinks"][:, :, n], sinks.expand(len(queries), -1))
    return max(errors)


@pytest.mark.parametrize("kind", MAPPINGS)
def test_every_family_is_asked_for_its_own_queries_or_refused_by_name(kind, monkeypatch):
    input_ids = torch.randint(10, 240, (2, N_CONTEXT), generator=torch.Generator().manual_seed(1))
    errors, refused = {}, {}
    for family, model in tiny_models(MAPPINGS[kind], input_ids):
        try:
            errors[family] = error_of_queries(model, input_ids, monkeypatch)
        except ValueError as error:
            refused[family] = str(error)
            press = MergingPress(KnormPress(0.5))
            prefilled(model, press, input_ids)
            assert sum(row["merged"] for row in press.report.to_dict().values()) > 0
    assert {family: error for family, error in errors.items() if not error < 1e-3} == {}
    for family, message in refused.items():
        expected = rf"AttentionMatchingPress cannot ask layer 0 of {family} \(\w+\) .*; MergingPress works there$"
        assert re.match(expected, message)
    assert len(errors) > 5 * len(refused)
    if transformers.__version__.startswith("5.2."):
        row = next(line for line in Path("docs/testing.md").read_text().splitlines() if line.startswith(f"| {kind} "))
        assert [errors.keys(), refused.keys()] == [set(re.findall(r"`(\w+)`", cell)) for cell in row.split("|")[2:4]]


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_a_press_rotates_are_asked_from_where_they_will_be_asked(family, attn_implementation, monkeypatch):
    if family.startswith("gemma3"):  # kvpress cannot rotate its keys
        return
    model = tiny_model(family)
    model.set_attn_implementation(attn_implementation)
    input_ids = torch.randint(10, 240, (2, N_CONTEXT), generator=torch.Generator().manual_seed(1))
    given = []
    monkeypatch.setattr(
        press_module, "attention_match", lambda *args, **others: given.append(args) or attention_match(*args, **others)
    )
    run(model, AttentionMatchingPress(KeyRerotationPress(KnormPress(0.5)), n_queries=N_QUERIES), input_ids)
    n_kept = given[0][2].shape[2]
    seen = passes(model, input_ids)
    for module, arguments in zip(attention_modules(model), given, strict=True):
        # As long as the survivors are: what stands behind has no say in the last token's query.
        kwargs = seen[module.layer_idx]
        short = {
            "attention_mask": None,
            "position_embeddings": tuple(t[:, :n_kept] for t in kwargs["position_embeddings"]),
        }
        for n, position in enumerate(reference_positions(torch.tensor([N_CONTEXT]), N_QUERIES).tolist()):
            hidden_states = kwargs["hidden_states"][:, :n_kept].clone()
            hidden_states[:, -1] = kwargs["hidden_states"][:, position]
            asked = kwargs | short | {"hidden_states": hidden_states}
            query = asked_from_the_end(module, asked, -1, monkeypatch)["query"]
            expected = query.unflatten(1, (arguments[5].shape[1], -1))[:, :, n % module.num_key_value_groups]
            torch.testing.assert_close(arguments[5][:, :, n], expected * module.scaling, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_asking_a_layer_leaves_no_trace(attn_implementation, llama):
    llama.set_attn_implementation(attn_implementation)
    module, shapes, fired = attention_modules(llama)[1], [], []
    kwargs = passes(llama, torch.arange(20, 44)[None])[1]
    given = kwargs | {"attention_mask": None, "past_key_values": None}
    module.masked_key_indices = masks = [torch.tensor([0])] * 3
    before = dict(vars(module))
    handles = [
        module.q_proj.register_forward_hook(lambda _, args, output: shapes.append(args[0].shape)),
        module.register_forward_hook(lambda *args: fired.append(args)),
    ]
    asked = ask(module, kwargs["hidden_states"][:, :5], given, -1)
    for handle in handles:
        handle.remove()
    assert asked is not None
    assert asked.query.shape == (1, 4, 5, 16)
    assert shapes == [(1, 5, 64)]  # as the model gives it: never flat
    assert not fired
    assert vars(module).keys() == before.keys()
    assert all(value is before[name] for name, value in vars(module).items())
    assert module.masked_key_indices is masks
    assert llama.config._attn_implementation == attn_implementation
    del module.masked_key_indices
    llama.set_attn_implementation("sdpa")


def test_an_exception_of_a_layer_that_is_asked_puts_its_config_back_and_names_it():
    model = tiny_model("llama")
    module = attention_modules(model)[2]

    def fail(*args):
        if hasattr(module.config, "config"):
            raise RuntimeError("no such shape")

    module.k_proj.register_forward_pre_hook(fail)
    message = r"layer 2 of llama \(LlamaAttention\) .*no such shape.*; MergingPress works there$"
    with pytest.raises(ValueError, match=message):
        run(model, AttentionMatchingPress(KnormPress(0.5)), torch.arange(20, 44)[None])
    assert module.config is model.config
    assert run(model, MergingPress(KnormPress(0.5)), torch.arange(20, 44)[None])


def test_a_layer_whose_keys_do_not_come_out_again_is_an_error_that_names_it():
    model = tiny_model("llama")
    module = attention_modules(model)[1]
    # Looks at all that it is given, as a convolution over tokens does.
    module.k_proj.register_forward_hook(lambda _, args, output: output + output.cumsum(dim=1))
    with pytest.raises(ValueError, match=r"layer 1 of llama .*key that it makes again of its last token"):
        run(model, AttentionMatchingPress(KnormPress(0.5)), torch.arange(20, 64)[None])


def test_rows_with_an_adapter_each_are_asked_through_it():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, config, adapter_name="one")
        adapted.add_adapter("two", config)
    adapted.eval()
    input_ids = torch.randint(10, 240, (3, 40), generator=torch.Generator().manual_seed(1))
    names = ["one", "__base__", "two"]
    caches = []
    for rows in (slice(None), slice(0, 1), slice(1, 2), slice(2, 3)):
        caches.append(cache := DynamicCache())
        with torch.no_grad(), AttentionMatchingPress(KnormPress(0.5))(adapted.base_model.model):
            adapted(input_ids[rows], past_key_values=cache, adapter_names=names[rows])
    for together, *alone in zip(*(cache.layers for cache in caches)):
        for row, layer in enumerate(alone):
            torch.testing.assert_close(together.keys[row], layer.keys[0], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(together.values[row], layer.values[0], rtol=1e-3, atol=1e-3)


def in_form_of(llama: PreTrainedModel, family: str) -> PreTrainedModel:
    """The same function, in another family's code: GLM turns neighbouring channels, Phi3 has joined projections."""
    config_class, model_class = {"glm": (GlmConfig, GlmForCausalLM), "phi3": (Phi3Config, Phi3ForCausalLM)}[family]
    given, old = llama.config.to_dict(), llama.config
    fields = {name: given[name] for name in inspect.signature(config_class.__init__).parameters if name in given}
    fields |= {"head_dim": old.head_dim, "partial_rotary_factor": 1.0}
    if hasattr(old, "rope_parameters"):  # from transformers 5 on
        fields["rope_parameters"] = old.rope_parameters | {"partial_rotary_factor": fields.pop("partial_rotary_factor")}
    else:
        fields["rope_theta"] = old.rope_theta
    model = model_class(config_class(**fields)).to(llama.dtype).eval()
    weights = dict(llama.state_dict())
    for layer in range(old.num_hidden_layers):
        at, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        if family == "glm":
            pairs = torch.arange(old.head_dim).view(2, -1).T.flatten()
            for name in ("q_proj.weight", "k_proj.weight"):
                weights[at + name] = weights[at + name].unflatten(0, (-1, old.head_dim))[:, pairs].flatten(0, 1)
        else:
            parts = [weights.pop(f"{at}{name}_proj.weight") for name in "qkv"]
            weights[at + "qkv_proj.weight"] = torch.cat(parts)
        parts = [weights.pop(f"{mlp}{name}_proj.weight") for name in ("gate", "up")]
        weights[mlp + "gate_up_proj.weight"] = torch.cat(parts)
    model.load_state_dict(weights)
    return model


@pytest.mark.real_model
def test_a_real_model_written_as_another_family_is_matched_as_well():
    llama, tokenizer = load_model("smollm2", device="cpu")
    window = cut_windows(built_in_text(), tokenizer, 1, 384, 65)[0]
    kl, logits = {}, {}
    for family in ("llama", "glm", "phi3"):
        model = llama if family == "llama" else in_form_of(llama, family)
        reference = measure_reference(model, window)
        logits[family] = reference.logits
        kl[family] = measure_fidelity(model, AttentionMatchingPress(KnormPress(0.5)), reference).kl
        torch.testing.assert_close(logits[family], logits["llama"], rtol=1e-3, atol=1e-2)
        assert kl[family] == pytest.approx(kl["llama"], rel=0.02)
    assert kl["llama"] < 0.6 * measure_fidelity(llama, KnormPress(0.5), measure_reference(llama, window)).kl


@pytest.mark.parametrize("n_queries", [1, 2, 64, 99, 100, 150, 1000])
def test_positions_lie_over_the_whole_context_and_differ_where_there_are_enough(n_queries):
    positions = reference_positions(torch.tensor([100]), n_queries)
    assert positions.dtype == torch.int64
    assert positions.shape == (n_queries,)
    assert (positions >= 0).all()
    assert (positions < 100).all()
    assert positions.equal(positions.sort().values)
    assert len(positions.unique()) == min(n_queries, 100)
    if n_queries > 2:
        assert positions[0] < 100 / min(n_queries, 100) * 2
        assert positions[-1] >= 100 - 100 / min(n_queries, 100)
    # The same for each row of a batch as for a row alone.
    together = reference_positions(torch.tensor([[100], [7]]), n_queries)
    assert torch.equal(together[0], positions)
    assert torch.equal(together[1], reference_positions(torch.tensor([7]), n_queries))
