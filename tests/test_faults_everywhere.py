# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
An exception at any call boundary of a run: nothing is left on the model, and no layer is left half-written.

The boundaries are the calls and returns of every Python function of the press, of ours, of the model and of its cache,
from entering the press's context to leaving it. A sample is tried here; ``make test-long`` tries the first and the last
time that each line calls each function.
"""

import copy
from collections import defaultdict

import pytest
import torch
from every_press import CASES
from faults import Boundaries, print_of, prints_of, tracks_of, watched_updates
from replay import attention_modules, clear_masks, decode
from test_caches import quantized
from tiny import tiny_checkpoint
from transformers import DynamicCache
from transformers.cache_utils import QuantizedLayer

from kvpress_merging import AttentionMatchingPress, MergingPress

PRESSES = {"merging": MergingPress, "matching": lambda press: AttentionMatchingPress(press, n_queries=8)}
KINDS = [
    # shrinks in compress
    "Knorm",
    "SnapKV",
    "KeyRerotation",
    "PerLayerCompression",
    "Composed",
    "Composed, ThinK first",
    # masks in compress, and in its forward hook
    "AdaKV",
    "DMS",
    # when its context exits
    "KVzip",
    "KVgrad",
    "FastKVzip",
    "RestoreKV",
    "KVCompose",
    "KVCompose unstructured",
    # while decoding
    "Decoding",
    "PrefillDecoding",
    "DMS while decoding",
    # in a hook of its own
    "third party, by a hook",
    "third party, by a new layer",
]
N_CONTEXT = 40


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    small = {"num_hidden_layers": 2, "hidden_size": 32, "head_dim": 8, "intermediate_size": 32}
    model, _ = tiny_checkpoint(tmp_path_factory.mktemp("llama"), **small)
    return model


class Run:
    """A press of one kind on a model, run again and again with an exception each time."""

    def __init__(self, llama, input_ids, name: str, press: str, new_cache=DynamicCache):
        self.case, self.wrap, self.input_ids, self.new_cache = CASES[name], PRESSES[press], input_ids, new_cache
        self.model = copy.deepcopy(llama)
        self.model.set_attn_implementation(self.case.attn_implementation)
        self.run(self.new_press(), new_cache())  # adapters are put in for good
        self.tracks = tracks_of(self.model)
        self.states: dict[int, set] = defaultdict(lambda: {None})
        cache = new_cache()

        def watch(layer_idx: int) -> None:
            if self.is_in_body:  # and not in a pass by which the press scores
                module = attention_modules(self.model)[layer_idx]
                self.states[layer_idx].add(print_of(module, cache.layers[layer_idx]))

        with watched_updates(cache, watch):
            self.run(self.new_press(), cache, self._note)
        self.final = prints_of(self.model, cache)
        press, cache = self.new_press(), new_cache()
        with Boundaries() as self.boundaries:
            self.run(press, cache)

    def new_press(self):
        clear_masks(self.model)
        return self.wrap(self.case.make())

    def _note(self, cache) -> None:
        for layer_idx, state in enumerate(prints_of(self.model, cache)):
            self.states[layer_idx].add(state)

    def run(self, press, cache, note=lambda cache: None) -> None:
        torch.manual_seed(5)
        self.is_in_body = True
        with torch.no_grad(), press(self.model):
            self.model.model(input_ids=self.input_ids, past_key_values=cache)
            note(cache)
            if self.case.moment == "decoding":
                for step in range(5):
                    decode(self.model, cache, self.input_ids[:, step : step + 1], N_CONTEXT + step)
                    note(cache)
            self.is_in_body = False
        note(cache)

    def fail_at(self, n: int, error: BaseException) -> None:
        """Raise ``error`` at boundary n; all must be as it was, or as it was to become, and go on as new."""
        press, cache = self.new_press(), self.new_cache()
        boundaries = Boundaries(n, error)
        with pytest.raises(BaseException) as raised, boundaries:
            self.run(press, cache)
        where = f"at boundary {n}, {boundaries.places[-1]}"
        assert boundaries.is_raised, where
        surfaced = raised.value
        if "enter_context" in (code.co_name for code in codes_of(surfaced)):
            # What a press raises while it cleans up after it failed to start hides the cause, as in Python everywhere.
            surfaced = surfaced if surfaced is error else surfaced.__context__
        assert surfaced is error, where
        assert tracks_of(self.model) == self.tracks, where
        if QuantizedLayer.update.__code__ not in codes_of(error):
            for layer_idx, state in enumerate(prints_of(self.model, cache)):
                assert state in self.states[layer_idx], f"layer {layer_idx} is between, {where}"
        clear_masks(self.model)
        cache = self.new_cache()
        self.run(press, cache)
        assert prints_of(self.model, cache) == self.final, f"the next use differs, {where}"


def codes_of(error: BaseException) -> list:
    """The functions that an exception passed through."""
    codes, traceback = [], error.__traceback__
    while traceback is not None:
        codes.append(traceback.tb_frame.f_code)
        traceback = traceback.tb_next
    return codes


def fail_everywhere(run: Run, most: int | None) -> None:
    n_tried = 0
    for n_tried, n in enumerate(run.boundaries.chosen(most), start=1):
        run.fail_at(n, (Stop, KeyboardInterrupt)[n_tried % 2]("now"))
    assert n_tried == most or n_tried > 400
    print(f"{n_tried} of {len(run.boundaries.places)} boundaries")


@pytest.mark.parametrize("press", PRESSES)
@pytest.mark.parametrize("name", KINDS)
def test_an_exception_at_any_of_some_calls_leaves_all_as_it_was_or_as_it_was_to_become(name, press, llama, input_ids):
    fail_everywhere(Run(llama, input_ids, name, press), most=7)


@pytest.mark.parametrize("press", PRESSES)
@pytest.mark.parametrize("name", ["Knorm", "AdaKV"])
def test_a_quantized_layer_is_left_whole_too(name, press, llama, input_ids):
    run = Run(llama, input_ids, name, press, lambda: quantized(llama, "quanto, 4 bit"))
    fail_everywhere(run, most=7)


@pytest.mark.long
@pytest.mark.parametrize("press", PRESSES)
@pytest.mark.parametrize("name", KINDS)
def test_an_exception_at_each_call_leaves_all_as_it_was_or_as_it_was_to_become(name, press, llama, input_ids):
    fail_everywhere(Run(llama, input_ids, name, press), most=None)
