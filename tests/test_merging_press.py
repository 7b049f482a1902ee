# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""MergingPress: its fields, and what its merges are worth."""

import copy
from dataclasses import dataclass

import kvpress
import numpy as np
import pytest
import torch
from every_press import CASES
from kvpress import BasePress, FinchPress, KeyRerotationPress, KnormPress, PyramidKVPress, ScorerPress, SnapKVPress
from replay import merge_in_float64, run
from tiny import tiny_model, tiny_tokenizer
from transformers import DynamicCache

from kvpress_merging import Eviction, MergeOnEvictPress, MergingPress
from kvpress_merging.kernels.blend import cosine_blend


def tokens(bsz: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.stack([torch.randperm(180, generator=generator)[:length] for _ in range(bsz)]) + 10


def test_defaults_and_their_order():
    press = MergingPress(KnormPress(0.5), 0.3, True, False, 4, 0.75)
    assert press.similarity_threshold == 0.3
    assert press.merge_keys is True
    assert press.value_norm_weighting is False
    assert press.max_merge_per_token == 4
    assert press.merge_fraction == 0.75
    with pytest.raises(TypeError):
        MergingPress(KnormPress(0.5), 0.3, True, False, 4, 0.75, 1 << 20)
    default = MergingPress(KnormPress(0.5))
    assert (default.similarity_threshold, default.merge_keys, default.value_norm_weighting) == (0.0, False, True)
    assert (default.max_merge_per_token, default.merge_fraction, default.kernel) == (0, 1.0, "auto")


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("similarity_threshold", 1.5, ValueError),
        ("similarity_threshold", -0.1, ValueError),
        ("similarity_threshold", float("nan"), ValueError),
        ("similarity_threshold", "0.5", TypeError),
        ("similarity_threshold", None, TypeError),
        ("similarity_threshold", True, TypeError),
        ("merge_keys", 1, TypeError),
        ("value_norm_weighting", None, TypeError),
        ("max_merge_per_token", -1, ValueError),
        ("max_merge_per_token", 1.0, TypeError),
        ("max_merge_per_token", True, TypeError),
        ("merge_fraction", 0.0, ValueError),
        ("merge_fraction", 1.01, ValueError),
        ("merge_fraction", float("nan"), ValueError),
        ("merge_fraction", "all", TypeError),
        ("tile_bytes", 0, ValueError),
        ("tile_bytes", 1e6, TypeError),
        ("kernel", "cuda", ValueError),
        ("record_pairs", 1, TypeError),
    ],
)
def test_a_wrong_field_is_an_error_that_names_it_at_construction_and_when_set(field, value, error):
    with pytest.raises(error, match=field):
        MergingPress(KnormPress(0.5), **{field: value})
    press = MergingPress(KnormPress(0.5))
    before = getattr(press, field)
    with pytest.raises(error, match=field):
        setattr(press, field, value)
    assert getattr(press, field) == before


@pytest.mark.parametrize("inner", [lambda: KeyRerotationPress(KnormPress(0.5)), lambda: FinchPress(0.5)])
def test_merging_keys_is_refused_where_the_press_rotates_them(inner):
    with pytest.raises(ValueError, match="merge_keys"):
        MergingPress(inner(), merge_keys=True)


def test_merging_keys_is_refused_when_a_press_turns_out_to_rewrite_them(llama):
    press = MergingPress(CASES["Composed with rerotation"].make(), merge_keys=True)
    cache = DynamicCache()
    with pytest.raises(ValueError, match="merge_keys=False"):
        run(llama, press, tokens(1, 64), cache=cache)
    assert cache.layers[0].keys.shape[2] == 64


@pytest.mark.parametrize("name", ["Knorm", "AdaKV", "Composed", "third party, slices and joins"])
def test_merging_keys_changes_the_keys_of_survivors_that_take_something_in(name, llama):
    input_ids = tokens(1, 96)
    bare = run(llama, CASES[name].make(), input_ids)
    plain_merge = run(llama, MergingPress(CASES[name].make()), input_ids)
    merged = run(llama, MergingPress(CASES[name].make(), merge_keys=True), input_ids)
    for before, by_values, after in zip(bare, plain_merge, merged):
        assert torch.equal(by_values.values, after.values)
        takes_in = (by_values.values != before.values).any(-1)
        assert torch.equal(after.keys[~takes_in], before.keys[~takes_in])
        assert (after.keys[takes_in] != before.keys[takes_in]).any(-1).all()


def test_it_differs_from_hard_eviction_and_keeps_the_keys(llama):
    input_ids = tokens(1, 96)
    bare, merged = (run(llama, press, input_ids) for press in (KnormPress(0.5), MergingPress(KnormPress(0.5))))
    for before, after in zip(bare, merged):
        assert torch.equal(before.keys, after.keys)
        assert not torch.equal(before.values, after.values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_in_its_dtype(dtype, llama):
    model = tiny_model().to(dtype)
    for layer in run(model, MergingPress(KnormPress(0.7)), tokens(2, 96)):
        assert layer.values.dtype == layer.keys.dtype == dtype
        assert torch.isfinite(layer.values).all()


@pytest.mark.parametrize("bsz", [1, 3])
def test_rows_of_a_batch_are_merged_each_by_itself(bsz, llama):
    input_ids = tokens(bsz, 96)
    together = run(llama, MergingPress(SnapKVPress(0.5, window_size=8)), input_ids)
    for row in range(bsz):
        alone = run(llama, MergingPress(SnapKVPress(0.5, window_size=8)), input_ids[row : row + 1])
        for both, single in zip(together, alone):
            torch.testing.assert_close(both.values[row : row + 1], single.values)


def test_no_eviction_leaves_the_cache_bit_identical(llama):
    input_ids = tokens(2, 96)
    full = run(llama, None, input_ids)
    for press in (KnormPress(0.0), KeyRerotationPress(KnormPress(0.0)), CASES["AdaKV"].make()):
        press.compression_ratio = 0.0
        for before, after in zip(full, run(llama, MergingPress(press), input_ids)):
            assert torch.equal(before.keys, after.keys)
            assert torch.equal(before.values, after.values)


def test_pyramidkv_keeps_its_own_budgets(llama):
    input_ids = torch.randint(10, 250, (1, 256), generator=torch.Generator().manual_seed(2))
    layers = run(llama, MergingPress(PyramidKVPress(0.5, window_size=8)), input_ids)
    assert [layer.keys.shape[2] for layer in layers] == [248, 168, 88, 8]


class FirstPress(ScorerPress):
    """Keeps the first positions."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return -torch.arange(keys.shape[2]).expand(keys.shape[:3]).float()


class FirstMetaPress(ScorerPress):
    """As ``FirstPress``, wherever the keys are."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return -torch.arange(keys.shape[2], device=keys.device).expand(keys.shape[:3]).float()


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.softmax(queries @ keys.mT, dim=-1) @ values


def test_attention_over_merged_values_is_nearer_to_the_full_cache_where_it_must_be():
    # Every key stands twice, each time with another value, and eviction takes the second of each pair: attention over
    # the survivors alone knows nothing of those values, over the merged ones it is off by the blend's weight alone.
    generator = torch.Generator().manual_seed(4)
    pair_keys = torch.randn(1, 2, 24, 16, generator=generator)
    keys = torch.cat([pair_keys, pair_keys], dim=2)
    values = torch.cat([torch.randn(1, 2, 24, 16, generator=generator) + shift for shift in (0.0, 3.0)], dim=2)
    queries = torch.randn(1, 2, 50, 16, generator=generator)

    class Module(torch.nn.Module):
        layer_idx, head_dim = 0, 16

    arguments = (Module(), torch.zeros(1, 48, 8), keys, values, None, {})
    hard_keys, hard_values = FirstPress(0.5).compress(*arguments)
    merged_keys, merged_values = MergingPress(FirstPress(0.5)).compress(*arguments)
    assert torch.equal(hard_keys, merged_keys)
    full = attend(queries, keys, values)
    hard = (attend(queries, hard_keys, hard_values) - full).norm()
    merged = (attend(queries, merged_keys, merged_values) - full).norm()
    assert merged < 0.6 * hard


def test_nothing_is_read_back_from_the_device_until_the_report_is():
    class Module(torch.nn.Module):
        layer_idx, head_dim = 0, 16

    keys, values = (torch.empty(1, 2, 4096, 16, device="meta", dtype=torch.bfloat16) for _ in range(2))
    gates = {"similarity_threshold": 0.2, "merge_fraction": 0.9, "max_merge_per_token": 3}
    press = MergingPress(FirstMetaPress(0.5), **gates, record_pairs=True)
    merged_keys, merged_values = press.compress(
        Module(), torch.empty(1, 4096, 8, device="meta"), keys, values, None, {}
    )
    assert merged_keys.shape == merged_values.shape == (1, 2, 2048, 16)
    assert merged_values.dtype == torch.bfloat16
    with pytest.raises((NotImplementedError, RuntimeError)):
        press.report.to_dict()


class NothingLeftPress(BasePress):
    """Evicts every position."""

    def __init__(self, by_mask: bool):
        self.by_mask = by_mask

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        if not self.by_mask:
            return keys[:, :, :0], values[:, :, :0]
        module.masked_key_indices = torch.where(torch.ones(keys.shape[:3], dtype=torch.bool))
        return keys, values


@pytest.mark.parametrize("by_mask", [True, False])
def test_without_a_survivor_nothing_is_merged(by_mask, llama):
    input_ids = tokens(2, 64)
    press = MergingPress(NothingLeftPress(by_mask))
    bare, merged = run(llama, NothingLeftPress(by_mask), input_ids), run(llama, press, input_ids)
    for before, after in zip(bare, merged):
        assert torch.equal(before.keys, after.keys)
        assert torch.equal(before.values, after.values)
        assert torch.equal(before.is_masked, after.is_masked)
    row = press.report.to_dict()[0]
    assert (row["kept"], row["evicted"], row["merged"], row["most_merges"]) == (0, 2 * 2 * 64, 0, 0)
    assert str(press.report) == "4 layers: 1024 positions evicted, 0 merged (0%) into 0 kept"


@dataclass
class SumPress(MergeOnEvictPress):
    """A third merge rule: every survivor takes in the mean of what its head lost, times ``share``."""

    share: float = 0.1

    def fold(self, module, hidden_states, keys, values, kept_keys, kept_values, eviction, kwargs):
        index = eviction.evicted.unsqueeze(-1).expand(-1, -1, -1, values.shape[-1])
        lost = values.gather(2, index).mean(dim=2, keepdim=True)
        return kept_keys, kept_values + self.share * lost


def test_a_third_merge_rule_takes_a_dozen_lines(llama):
    input_ids = tokens(1, 96)
    full, bare = run(llama, None, input_ids), run(llama, KnormPress(0.5), input_ids)
    merged = run(llama, SumPress(KnormPress(0.5), share=0.2), input_ids)
    for layer_full, before, after in zip(full, bare, merged):
        lost = layer_full.values.sum(dim=2, keepdim=True) - before.values.sum(dim=2, keepdim=True)
        expected = before.values + 0.2 * lost / 48
        np.testing.assert_allclose(after.values.numpy(), expected.numpy(), atol=1e-5)
    assert SumPress(KnormPress(0.5), share=0.2) == SumPress(KnormPress(0.5), share=0.2)


def test_a_fold_that_returns_another_shape_is_an_error_and_the_cache_stays(llama):
    @dataclass
    class Careless(MergeOnEvictPress):
        def fold(self, module, hidden_states, keys, values, kept_keys, kept_values, eviction, kwargs):
            return keys, values

    cache = DynamicCache()
    with pytest.raises(ValueError, match=r"Careless\.fold must return tensors of the survivors' shape"):
        run(llama, Careless(KnormPress(0.5)), tokens(1, 64), cache=cache)
    assert cache.layers[0].keys.shape[2] == 64


@pytest.mark.parametrize("name", ["Knorm", "AdaKV", "KVzip layerwise", "third party, shrinks and masks"])
def test_the_report_has_the_figures_of_the_merges(name, llama, tmp_path):
    tiny_tokenizer(tmp_path)
    model = copy.deepcopy(llama)
    model.config._name_or_path = str(tmp_path)
    input_ids = tokens(1, 96)
    full, bare = run(model, None, input_ids), run(model, CASES[name].make(), input_ids)
    press = MergingPress(CASES[name].make())
    run(model, press, input_ids)
    for row, layer_full, layer_bare in zip(press.report.to_dict().values(), full, bare):
        expected = merge_in_float64(layer_full, layer_bare)
        similarity = np.array(expected.similarities)
        assert (row["kept"], row["evicted"]) == (expected.n_survivors, 2 * 96 - expected.n_survivors)
        assert row["merged"] == len(similarity)
        assert row["most_merges"] == expected.most_merges
        figures = [row["similarity_mean"], row["similarity_q05"], row["similarity_q50"], row["bound_mean"]]
        quantiles = np.quantile(similarity, [0.05, 0.5])
        bound = np.mean(1 / (1 + np.array(expected.weights)))
        np.testing.assert_allclose(figures, [similarity.mean(), *quantiles, bound], rtol=1e-5)


def test_the_report_tells_what_was_merged(llama):
    press = MergingPress(KnormPress(0.5), similarity_threshold=0.65)
    assert str(press.report) == "0 layers, nothing evicted"
    run(llama, press, tokens(2, 96))
    rows = press.report.to_dict()
    assert list(rows) == [0, 1, 2, 3]
    for row in rows.values():
        assert row["kept"] == row["evicted"] == 2 * 2 * 48
        assert 0 < row["merged"] < row["evicted"]
        assert 0.65 <= row["similarity_q05"] <= row["similarity_q50"] <= 1
        assert 0.65 <= row["similarity_mean"] <= 1
        assert 0.5 <= row["bound_mean"] <= 1
        assert 1 <= row["most_merges"] <= 48
    frame = press.report.to_frame()
    assert frame.index.name == "layer"
    assert list(frame["merged"]) == [row["merged"] for row in rows.values()]
    line = str(press.report)
    assert "\n" not in line
    assert line.startswith("4 layers: 768 positions evicted, ")
    run(llama, press, tokens(1, 64))
    assert press.report.to_dict()[0]["evicted"] == 2 * 32


@pytest.mark.parametrize("merge_keys", [False, True])
@pytest.mark.parametrize("value_dim", [16, 8])
def test_merge_takes_what_kvpress_own_merge_takes(merge_keys, value_dim):
    """All positions come back, the kept ones as a prefill would leave them."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 3, 40, 16, generator=generator)
    values = torch.randn(2, 3, 40, value_dim, generator=generator)
    indices = torch.rand(2, 3, 40, generator=generator).topk(15, dim=-1).indices
    press = MergingPress(KnormPress(0.5), merge_keys=merge_keys)
    keys_before, values_before = keys.clone(), values.clone()
    new_keys, new_values = press.merge(keys, values, indices)
    assert torch.equal(keys, keys_before)
    assert torch.equal(values, values_before)
    blend = cosine_blend(
        keys,
        values,
        keys.gather(2, indices[..., None].expand(-1, -1, -1, 16)),
        values.gather(2, indices[..., None].expand(-1, -1, -1, value_dim)),
        Eviction.from_kept(indices, 40),
        merge_keys=merge_keys,
    )
    is_kept = torch.zeros(2, 3, 40, dtype=torch.bool).scatter(-1, indices, True)
    for new, old, kept in ((new_keys, keys, blend.keys), (new_values, values, blend.values)):
        assert torch.equal(new[~is_kept], old[~is_kept])
        assert torch.equal(new.gather(2, indices[..., None].expand(-1, -1, -1, new.shape[-1])), kept)
    assert (new_keys is keys) != merge_keys
    assert not torch.equal(new_values[is_kept], values[is_kept])


def test_merge_is_kvpress_own_merge():
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 40, 16, generator=generator)
    indices = torch.rand(1, 2, 40, generator=generator).topk(15, dim=-1).indices
    theirs = kvpress.MergingPress(KnormPress(0.5)).merge(keys, values, indices)
    ours = MergingPress(KnormPress(0.5)).merge(keys, values, indices)
    assert ours[0] is theirs[0] is keys
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-5)
