# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""In what people run models in: generate, inference mode, autocast, compile, several devices, processes, threads."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
import tensor_parallel
import torch
from every_press import CASES
from kvpress import BasePress, KnormPress
from replay import assert_equal, attention_modules, clear_masks, run, snapshot
from tiny import tiny_model
from transformers import DynamicCache

from kvpress_merging import AttentionMatchingPress, MergingPress
from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels import match as match_module

N_CONTEXT = 64
PRESSES = {"merging": MergingPress, "matching": AttentionMatchingPress}


def prefill(model, press, input_ids, inside=nullcontext):
    clear_masks(model)
    cache = DynamicCache()
    torch.manual_seed(5)
    with press(model), inside():
        model.model(input_ids=input_ids, past_key_values=cache)
    return snapshot(model, cache)


@pytest.mark.parametrize("inner", ["Knorm", "AdaKV", "Decoding", "DMS while decoding"])
@pytest.mark.parametrize("name", PRESSES)
def test_generate_gives_the_tokens_of_a_loop_by_hand(name, inner, llama, input_ids):
    clear_masks(llama)
    with PRESSES[name](CASES[inner].make())(llama):
        generated = llama.generate(input_ids, max_new_tokens=8, do_sample=False, eos_token_id=-1, use_cache=True)
    clear_masks(llama)
    cache, tokens = DynamicCache(), input_ids
    with torch.no_grad(), PRESSES[name](CASES[inner].make())(llama):
        for position in range(N_CONTEXT, N_CONTEXT + 8):
            new = tokens if position == N_CONTEXT else tokens[:, -1:]
            position_ids = torch.arange(position - new.shape[1], position)[None]
            cache_position = position_ids[0]
            logits = llama(new, past_key_values=cache, position_ids=position_ids, cache_position=cache_position).logits[
                :, -1
            ]
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated, tokens)


MODES = {
    "inference mode around": (torch.inference_mode, nullcontext),
    "inference mode inside": (nullcontext, torch.inference_mode),
    "gradients on": (nullcontext, nullcontext),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inner", ["Knorm", "AdaKV", "DMS", "KVzip", "KVgrad", "FastKVzip", "KVCompose"])
@pytest.mark.parametrize("name", PRESSES)
def test_inference_mode_and_gradients_give_the_bits_of_no_grad(name, inner, mode, llama, input_ids):
    around, inside = MODES[mode]
    expected = run(llama, PRESSES[name](CASES[inner].make()), input_ids)
    with around():
        assert_equal(prefill(llama, PRESSES[name](CASES[inner].make()), input_ids, inside), expected)


@pytest.mark.parametrize("name", PRESSES)
def test_under_autocast_survivors_are_those_of_the_bare_press_and_dtypes_its(name, llama, input_ids):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        bare = prefill(llama, KnormPress(0.5), input_ids)
        merged = prefill(llama, PRESSES[name](KnormPress(0.5)), input_ids)
    for before, after in zip(bare, merged, strict=True):
        assert (after.keys.dtype, after.values.dtype) == (before.keys.dtype, before.values.dtype)
        assert after.keys.shape == before.keys.shape
        assert name == "matching" or torch.equal(after.keys, before.keys)
        assert torch.isfinite(after.values).all()
        assert not torch.equal(after.values, before.values)


def test_a_fit_under_autocast_is_that_without():
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(1, 2, 40, 16, generator=generator) for _ in range(2))
    queries = torch.randn(1, 2, 12, 16, generator=generator) / 4
    eviction = Eviction.from_kept(torch.arange(0, 40, 2).expand(1, 2, -1), 40)
    arguments = (keys, values, keys[:, :, ::2], values[:, :, ::2], queries, queries, eviction)
    expected = match_module.attention_match(*arguments, key_ridge=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        match = match_module.attention_match(*arguments, key_ridge=0.1)
    assert torch.equal(match.keys, expected.keys)
    assert torch.equal(match.values, expected.values)
    assert torch.equal(match.error_after, expected.error_after)


@pytest.mark.parametrize(("name", "inner"), [("merging", "Knorm"), ("matching", "AdaKV")])
def test_a_compiled_model_is_merged_inside_the_context_and_only_there(name, inner, input_ids):
    torch._dynamo.reset()
    model = tiny_model(num_hidden_layers=2)
    full = run(model, None, input_ids)
    expected = run(model, PRESSES[name](CASES[inner].make()), input_ids)
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")
    assert_equal(run(model, None, input_ids), full)  # compiled before any press comes
    assert_equal(run(model, PRESSES[name](CASES[inner].make()), input_ids), expected)
    assert_equal(run(model, None, input_ids), full)
    torch._dynamo.reset()


class EverySecondPress(BasePress):
    """Keeps every second position, on any device."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        return keys[:, :, ::2], values[:, :, ::2]


@pytest.mark.parametrize("make", [lambda: KnormPress(0.5), EverySecondPress])
@pytest.mark.parametrize("name", PRESSES)
def test_layers_on_another_device_are_merged_there(name, make, input_ids):
    """As ``device_map`` splits a model; the second device holds no data, so that nothing can be read from it."""
    model = tiny_model()
    expected = run(model, PRESSES[name](make()), input_ids)

    def move(module, args, kwargs):
        kwargs["position_embeddings"] = tuple(part.to("meta") for part in kwargs["position_embeddings"])
        return tuple(arg.to("meta") for arg in args), kwargs

    for layer in model.model.layers[2:]:
        layer.to("meta").register_forward_pre_hook(move, with_kwargs=True)
    model.model.norm.to("meta")
    cache = DynamicCache()
    press = PRESSES[name](make())
    with torch.no_grad(), press(model):
        model.model(input_ids=input_ids, past_key_values=cache)
    for layer_idx, layer in enumerate(cache.layers):
        assert layer.keys.shape[2] == N_CONTEXT // 2
        assert layer.keys.device.type == layer.values.device.type == ("cpu" if layer_idx < 2 else "meta")
        if layer_idx < 2:
            assert torch.equal(layer.values, expected[layer_idx].values)


def test_two_processes_hold_together_what_one_holds(llama, tmp_path):
    """Tensor parallelism: each process has its own KV heads, and merges and fits them by itself."""
    out, tests = tmp_path / "caches.pt", Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tests / "tensor_parallel.py"), llama.config.name_or_path, str(out)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    results = torch.load(out)
    assert results["rows of q_proj"] == llama.model.layers[0].self_attn.q_proj.weight.shape[0] // 2
    for name, make in tensor_parallel.PRESSES.items():
        layers, report = tensor_parallel.prefill(llama, make())
        together, report_of_one = results[name]
        bare, _ = tensor_parallel.prefill(llama, MergingPress(make().press, similarity_threshold=1.0))
        for layer, both, without in zip(layers, together, bare, strict=True):
            for part, gathered in zip(layer, both):
                torch.testing.assert_close(gathered, part, rtol=1e-3, atol=1e-4)
            assert not torch.allclose(both[1], without[1], rtol=1e-3, atol=1e-4)
        assert [row["evicted"] for row in report.values()] == [2 * row["evicted"] for row in report_of_one.values()]


@pytest.mark.parametrize("name", PRESSES)
def test_two_threads_with_a_model_and_a_press_each_do_not_meet(name, llama, input_ids):
    kinds = ["Knorm", "AdaKV", "KVzip", "Composed"]
    models = [copy.deepcopy(llama) for _ in range(2)]
    with torch.no_grad():
        models[1].model.layers[0].self_attn.v_proj.weight.mul_(2)

    def all_kinds(model) -> list:
        found = []
        for kind in kinds * 2:
            clear_masks(model)
            cache = DynamicCache()
            with torch.no_grad(), PRESSES[name](CASES[kind].make())(model):
                model.model(input_ids=input_ids, past_key_values=cache)
            found.append(snapshot(model, cache))
        return found

    alone = [all_kinds(model) for model in models]
    together: list = [None, None]
    barrier = threading.Barrier(2)

    def work(which: int) -> None:
        barrier.wait()
        together[which] = all_kinds(models[which])

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, found in zip(alone, together):
        for one, other in zip(expected, found, strict=True):
            assert_equal(one, other)


def grow(n_prefills: int, llama, input_ids) -> tuple[int, float]:
    """Live tensors and megabytes that ``n_prefills`` of one press object each add, after the first few."""
    presses = [wrap(CASES[kind].make()) for wrap in PRESSES.values() for kind in ("Knorm", "AdaKV", "FastKVzip")]
    process = psutil.Process()

    def measure() -> tuple[int, float]:
        gc.collect()
        return sum(isinstance(item, torch.Tensor) for item in gc.get_objects()), process.memory_info().rss / 2**20

    for n in range(10 + n_prefills):
        if n == 10:
            before = measure()
        press = presses[n % len(presses)]
        run(llama, press, input_ids)
    after = measure()
    assert not any(module._forward_hooks for module in attention_modules(llama))
    return after[0] - before[0], after[1] - before[1]


def test_a_hundred_prefills_take_no_more_memory_than_ten(llama, input_ids):
    tensors, megabytes = grow(100, llama, input_ids)
    assert tensors < 100
    assert megabytes < 8


@pytest.mark.long
def test_a_thousand_prefills_take_no_more_memory_than_ten(llama, input_ids):
    tensors, megabytes = grow(1000, llama, input_ids)
    print(f"{tensors} tensors and {megabytes:.2f} MB more")
    assert tensors < 100
    assert megabytes < 8
