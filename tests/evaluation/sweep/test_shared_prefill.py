# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""One prefill for many presses: each has what it would have alone, to the bit."""

from __future__ import annotations

import copy
import gc
from contextlib import contextmanager

import pytest
import torch
from every_press import CASES, ELSEWHERE, REFUSED
from kvpress import BasePress, KnormPress, RandomPress, SnapKVPress
from replay import attention_modules, clear_masks, run, snapshot
from tiny import FAMILIES, tiny_checkpoint, tiny_model

from evaluation.prefill import Prefilled, masks_of, prefill
from evaluation.sweep.shared_prefill import PressFailed, prefill_many, why_alone
from evaluation.sweep.stand_in import CannotShareError
from kvpress_merging import AttentionMatchingPress, MergingPress

N_CONTEXT = 96
KINDS = {"bare": lambda press: press, "merging": MergingPress, "matching": AttentionMatchingPress}
IMPLEMENTATIONS = ("sdpa", "eager")

ALONE = {name for name, case in CASES.items() if case.moment != "prefill" or case.needs == "delimiter"}
ALONE |= {"in a hook on the model"}
SHARING = [name for name in CASES if name not in ALONE]
# Bare presses that prune channels, or merge by themselves.
SHARING_BARE = [name for name in REFUSED if name != "CAM"]
WATCHING = [("full cache", "bare"), *((name, "bare") for name in SHARING_BARE)]
WATCHING += [(name, kind) for name in SHARING for kind in KINDS]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model, _ = tiny_checkpoint(tmp_path_factory.mktemp("llama"))
    return model


@pytest.fixture(scope="module")
def input_ids():
    return torch.randperm(240, generator=torch.Generator().manual_seed(11))[None, :N_CONTEXT] + 10


def make(name: str, kind: str) -> BasePress:
    if name in REFUSED or name in ELSEWHERE:
        return (REFUSED | ELSEWHERE)[name]()
    return KINDS[kind](CASES[name].make())


@pytest.fixture(scope="module")
def shared(llama, input_ids):
    """Every press that can share, bare, merging and matching, over one pass for each kind of attention."""
    outcomes = {}
    for implementation in IMPLEMENTATIONS:
        keys = [key for key in WATCHING if key[0] not in CASES or CASES[key[0]].attn_implementation == implementation]
        llama.set_attn_implementation(implementation)
        clear_masks(llama)
        presses = [None if name == "full cache" else make(name, kind) for name, kind in keys]
        torch.manual_seed(5)
        outcomes[implementation] = dict(zip(keys, prefill_many(llama, input_ids, presses), strict=True))
    return outcomes


def layers_of(model, outcome) -> list:
    assert isinstance(outcome, Prefilled), outcome
    with masks_of(model, outcome):
        return snapshot(model, outcome.cache)


def assert_same(layers, others) -> None:
    for layer, other in zip(layers, others, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)
        assert torch.equal(layer.is_masked, other.is_masked)


@pytest.mark.parametrize(("name", "kind"), WATCHING)
def test_a_press_that_shares_has_the_bits_that_it_has_alone(name, kind, llama, input_ids, shared):
    for implementation in IMPLEMENTATIONS:
        if (name, kind) not in shared[implementation]:
            continue
        llama.set_attn_implementation(implementation)
        press = None if name == "full cache" else make(name, kind)
        outcome = shared[implementation][name, kind]
        if isinstance(outcome, PressFailed):
            with pytest.raises(type(outcome.error)) as error:
                run(llama, press, input_ids)
            assert str(error.value) == str(outcome.error)
        else:
            assert_same(layers_of(llama, outcome), run(llama, press, input_ids))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_who_can_share_is_found_out_from_what_a_press_does(name, kind, llama):
    llama.set_attn_implementation(CASES[name].attn_implementation)
    before = {module: dict(vars(module)) for module in llama.modules()}
    press = make(name, kind)
    fields = str(press)
    reason = why_alone(llama, press)
    assert (reason is not None) == (name in ALONE), reason
    assert str(press) == fields
    assert {module: dict(vars(module)) for module in llama.modules()} == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("KVzip", "replaces the forward of model"),
        ("KVgrad", "replaces the forward of model"),
        ("KVCompose", "replaces the forward of model"),
        ("FastKVzip", "cannot be left without a prefill"),
        ("Finch", "puts a hook on model.embed_tokens"),
        ("in a hook on the model", "puts a hook on model"),
        ("Decoding", "evicts while decoding"),
    ],
)
def test_what_keeps_a_press_from_sharing_is_said(name, reason, llama):
    for kind in KINDS:
        assert reason in str(why_alone(llama, make(name, kind)))


def test_a_press_that_cannot_be_entered_is_left_to_fail_alone(llama):
    class UnreadyPress(BasePress):
        def post_init_from_model(self, model):
            raise OSError("no such weights")

    assert why_alone(llama, UnreadyPress()) == "its context cannot be entered: OSError: no such weights"


class BrokenPress(KnormPress):
    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        if module.layer_idx == 2:
            raise RuntimeError("a fault of this press")
        return super().compress(module, hidden_states, keys, values, attentions, kwargs)


class ChangingPress(KnormPress):
    def forward_hook(self, module, input, kwargs, output):
        super().forward_hook(module, input, kwargs, output)
        return output[0] * 2, *output[1:]


class RedirectingPress(KnormPress):
    @contextmanager
    def __call__(self, model):
        def redirect(module, args, kwargs):
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * 2}

        handles = [m.register_forward_pre_hook(redirect, with_kwargs=True) for m in attention_modules(model)]
        with super().__call__(model):
            yield
        for handle in handles:
            handle.remove()


class UnleavablePress(KnormPress):
    @contextmanager
    def __call__(self, model):
        with super().__call__(model):
            yield
        raise RuntimeError("a fault on leaving")


@pytest.mark.parametrize("wrap", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (BrokenPress, RuntimeError, "a fault of this press"),
        (ChangingPress, CannotShareError, "changes what a LlamaAttention gives"),
        (RedirectingPress, CannotShareError, "changes what a LlamaAttention is given"),
        (UnleavablePress, RuntimeError, "a fault on leaving"),
    ],
)
def test_a_press_that_fails_fails_alone(broken, error, message, wrap, llama, input_ids):
    llama.set_attn_implementation("sdpa")
    presses = [KnormPress(0.5), wrap(broken(0.5)), wrap(SnapKVPress(0.5, window_size=16))]
    prefill(llama, input_ids, None)  # each attention layer has a mask from its first prefill on
    before = {module: dict(vars(module)) for module in llama.modules()}
    first, failed, last = prefill_many(llama, input_ids, presses)
    assert {module: dict(vars(module)) for module in llama.modules()} == before
    assert isinstance(failed, PressFailed)
    assert isinstance(failed.error, error)
    assert message in str(failed.error)
    assert failed.traceback.rstrip().endswith(str(failed.error))
    assert_same(layers_of(llama, first), run(llama, KnormPress(0.5), input_ids))
    assert_same(layers_of(llama, last), run(llama, wrap(SnapKVPress(0.5, window_size=16)), input_ids))


def test_a_failing_model_fails_all_and_is_left_without_hooks(llama):
    with pytest.raises(IndexError):
        prefill_many(llama, torch.full((1, 8), 10**6), [KnormPress(0.5), MergingPress(KnormPress(0.5))])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())


def test_each_press_draws_what_it_draws_alone(llama, input_ids):
    llama.set_attn_implementation("sdpa")
    torch.manual_seed(5)
    outcomes = prefill_many(llama, input_ids, [RandomPress(0.5), MergingPress(RandomPress(0.5)), RandomPress(0.3)])
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(5))
    for outcome, press in zip(
        outcomes, [RandomPress(0.5), MergingPress(RandomPress(0.5)), RandomPress(0.3)], strict=True
    ):
        assert_same(layers_of(llama, outcome), run(llama, press, input_ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_shared_sliding_layers_and_batches_included(family, input_ids):
    model = tiny_model(family)
    batch = torch.cat([input_ids, input_ids.flip(1)])
    makers = [lambda kind=kind: KINDS[kind](KnormPress(0.5)) for kind in KINDS]
    outcomes = prefill_many(model, batch, [None, *(maker() for maker in makers)])
    for outcome, press in zip(outcomes, [None, *(maker() for maker in makers)], strict=True):
        assert_same(layers_of(model, outcome), run(model, press, batch))


def test_modules_with_a_forward_of_their_own_are_served(input_ids, llama):
    """As accelerate leaves them, where a model is spread over devices."""
    model = copy.deepcopy(llama)
    model.set_attn_implementation("sdpa")
    expected = run(model, MergingPress(SnapKVPress(0.5, window_size=16)), input_ids)
    forwards = {}
    for module in model.modules():
        module.forward = forwards[module] = type(module).forward.__get__(module)
    press = MergingPress(SnapKVPress(0.5, window_size=16))
    assert why_alone(model, press) is None
    (outcome,) = prefill_many(model, input_ids, [press])
    assert_same(layers_of(model, outcome), expected)
    assert all(module.forward is forward for module, forward in forwards.items())


def test_the_masks_of_an_answer_are_taken_off_again(llama, input_ids):
    llama.set_attn_implementation("sdpa")
    clear_masks(llama)
    masking, bare = prefill_many(llama, input_ids, [CASES["AdaKV"].make(), KnormPress(0.5)])
    with pytest.raises(ZeroDivisionError), masks_of(llama, masking):
        assert all(module.masked_key_indices is not None for module in attention_modules(llama))
        raise ZeroDivisionError
    assert all(module.masked_key_indices is None for module in attention_modules(llama))
    with masks_of(llama, bare):
        assert all(module.masked_key_indices is None for module in attention_modules(llama))


@pytest.mark.parametrize("wrap", KINDS.values(), ids=KINDS)
def test_no_more_than_one_layer_is_held_whole_beside_a_copy(wrap, llama):
    llama.set_attn_implementation("sdpa")
    input_ids = torch.arange(10, 150)[None]  # more tokens than there are reference queries
    most = 0

    def whole_layers(like):
        gc.collect()
        tensors = [tensor for tensor in gc.get_objects() if type(tensor) is torch.Tensor]
        return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.shape == like.shape}

    class CountingPress(KnormPress):
        def compress(self, module, hidden_states, keys, values, attentions, kwargs):
            nonlocal most
            most = max(most, len(whole_layers(keys)))
            return super().compress(module, hidden_states, keys, values, attentions, kwargs)

    class BrokenAtTheFirstPress(KnormPress):
        def compress(self, module, hidden_states, keys, values, attentions, kwargs):
            raise RuntimeError("with a whole layer in its frame")

    presses = [wrap(CountingPress(0.5)) for _ in range(5)] + [wrap(BrokenAtTheFirstPress(0.5)) for _ in range(5)]
    gc.collect()
    gc.freeze()  # what there is already is not looked through each time
    try:
        outcomes = prefill_many(llama, input_ids, presses)
    finally:
        gc.unfreeze()
    assert [type(outcome) for outcome in outcomes] == [Prefilled] * 5 + [PressFailed] * 5
    # Keys and values of the model's layer and of the press's copy.
    assert 2 <= most <= 4


def test_seconds_are_told_apart(llama, input_ids, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    outcomes = prefill_many(llama, input_ids, [KnormPress(0.5), KnormPress(0.5), None])
    n_layers = len(attention_modules(llama))
    # One tick from start to end each time that a press has its turn: entered, at each layer, left.
    assert [outcome.press_seconds for outcome in outcomes] == [n_layers + 2] * 3
    total = 3 * 2 * (n_layers + 2) + 1
    shared = total - 3 * (n_layers + 2)
    assert [outcome.prefill_seconds for outcome in outcomes] == [shared + n_layers + 2] * 3
