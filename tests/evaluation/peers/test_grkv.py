# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""GRKV's regression against plain loops, and what it must leave alone."""

from __future__ import annotations

import numpy as np
import peer_oracle as oracle
import pytest
import torch
from kvpress import AdaKVPress, KeyRerotationPress, KnormPress, KVzipPress, SnapKVPress
from test_kvfold import lists, scores_as_given
from tiny import tiny_model

from evaluation.peers import grkv
from evaluation.peers.grkv import GRKVPress, stratified_positions
from evaluation.prefill import prefill

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = {
    "even": lambda: SnapKVPress(0.5, window_size=8),
    "ragged": lambda: AdaKVPress(SnapKVPress(0.6, window_size=8)),
    "when the context exits": lambda: KVzipPress(0.6),
}


def folds(monkeypatch) -> dict[int, tuple]:
    """What ``fold`` is given and gives in each layer."""
    seen, original = {}, GRKVPress.fold

    def fold(self, module, *args):
        seen[module.layer_idx] = (module, *args, original(self, module, *args))
        return seen[module.layer_idx][-1]

    monkeypatch.setattr(GRKVPress, "fold", fold)
    return seen


def queries_at_the_end(module, hidden_states: torch.Tensor, positions: list[int], at: int, head: int) -> np.ndarray:
    """Queries of a KV head's query heads, made in float64 and rotated to one position."""
    weight = np.array(module.q_proj.weight.tolist()).reshape(4, 16, -1)
    rows = []
    for query_head in (2 * head, 2 * head + 1):
        for position in positions:
            query = weight[query_head] @ np.array(hidden_states[0, position].tolist())
            rotated = np.empty(16)
            for i in range(8):
                angle = at * 10000.0 ** (-2 * i / 16)
                rotated[i] = query[i] * np.cos(angle) - query[i + 8] * np.sin(angle)
                rotated[i + 8] = query[i + 8] * np.cos(angle) + query[i] * np.sin(angle)
            rows.append(rotated)
    return np.array(rows)


@pytest.mark.parametrize("case", CASES)
def test_keys_and_values_are_those_of_plain_loops(case, llama, input_ids, monkeypatch):
    # As many steps as float32 can follow, and caps that are never reached: see the next test.
    monkeypatch.setattr(grkv, "_MAX_ITERATIONS", 4)
    press = GRKVPress(CASES[case](), query_count=3, guard=0.3, window=16, value_cap=1e3, key_cap=1e3)
    given, seen = scores_as_given(monkeypatch), folds(monkeypatch)
    inputs: dict[int, torch.Tensor] = {}

    def note_input(module, args, kwargs):
        inputs.setdefault(module.layer_idx, kwargs["hidden_states"])

    hooks = [layer.self_attn.register_forward_pre_hook(note_input, with_kwargs=True) for layer in llama.model.layers]
    try:
        prefill(llama, input_ids, press)
    finally:
        for hook in hooks:
            hook.remove()
    positions = [(k * 96 // 3 + (k + 1) * 96 // 3 - 1) // 2 for k in range(3)]
    assert stratified_positions(96, 3).tolist() == positions
    n_moved = 0
    for layer, (module, _, keys, values, kept_keys, kept_values, eviction, _, new) in seen.items():
        heads, places = [], []
        for head in range(2):
            survivors, slots, _ = lists(eviction, head)
            free = oracle.free_survivors(survivors, given[layer][0, head].tolist(), 96, 16, 0.3)
            queries = queries_at_the_end(module, inputs[layer], positions, 95, head) * module.scaling
            of_head = [np.array(rows[0, head].tolist()) for rows in (keys, values)]
            _, full = oracle.attend(queries, *of_head, np.zeros((len(queries), 96)))
            heads.append(
                {
                    "queries": queries,
                    "full": full,
                    "keys": of_head[0][survivors],
                    "values": of_head[1][survivors],
                    "free": [survivors.index(i) for i in free],
                }
            )
            places.append(slots)
        *expected, objectives = oracle.grkv(heads, weight=6 / 3, ridge=0.01, n_iterations=4)
        assert objectives[1] < objectives[0]
        for head, slots in enumerate(places):
            for new_rows, kept, rows in zip(new, (kept_keys, kept_values), expected):
                assert new_rows[0, head, slots].numpy() == pytest.approx(rows[head], rel=1e-3, abs=1e-4)
                fixed = torch.ones(kept.shape[2], dtype=torch.bool)
                fixed[[slots[i] for i in heads[head]["free"]]] = False
                assert new_rows[0, head, fixed].equal(kept[0, head, fixed])
                n_moved += int((new_rows[0, head] != kept[0, head]).any(dim=-1).sum())
    assert n_moved > 100


def test_no_head_moves_farther_than_its_caps_in_half_precision_too(input_ids, monkeypatch):
    model, press = tiny_model().to(torch.bfloat16), GRKVPress(KnormPress(0.5), query_count=16)
    seen = folds(monkeypatch)
    prefill(model, input_ids, press)
    shares: dict[str, list[float]] = {"keys": [], "values": []}
    for _, _, _, _, kept_keys, kept_values, eviction, _, new in seen.values():
        is_free = torch.zeros(kept_keys.shape[:3], dtype=torch.bool)
        scores = -kept_keys.norm(dim=-1)
        for head in range(2):
            survivors, slots, _ = lists(eviction, head)
            of_position = dict(zip(survivors, scores[0, head, slots].tolist()))
            free = oracle.free_survivors(survivors, [of_position.get(i, 0.0) for i in range(96)], 96, 32, 0.1)
            is_free[0, head, [slots[survivors.index(i)] for i in free]] = True
        for name, cap, new_rows, kept in zip(shares, (0.025, 0.1), new, (kept_keys, kept_values)):
            moved = (new_rows.float() - kept.float()).norm(dim=(-2, -1))
            share = moved / (kept.float() * is_free[..., None]).norm(dim=(-2, -1))
            assert (share <= cap * (1 + 1e-6)).all()
            shares[name] += share.flatten().tolist()
    # Such caps are what holds it back.
    assert max(shares["keys"]) > 0.8 * 0.025
    assert max(shares["values"]) > 0.8 * 0.1


def test_a_short_context_without_a_survivor_to_move_stays_as_it_was(llama):
    input_ids = torch.arange(20, 50)[None]
    bare, fitted = (prefill(llama, input_ids, press) for press in (KnormPress(0.5), GRKVPress(KnormPress(0.5))))
    for ours, theirs in zip(fitted.cache.layers, bare.cache.layers):
        assert ours.keys.equal(theirs.keys)
        assert ours.values.equal(theirs.values)


def test_a_row_of_a_batch_is_as_it_would_be_alone(llama, input_ids):
    batch = torch.cat([input_ids, input_ids.flip(1)])
    together = prefill(llama, batch, GRKVPress(KnormPress(0.5)))
    for row in range(2):
        alone = prefill(llama, batch[row : row + 1], GRKVPress(KnormPress(0.5)))
        for ours, theirs in zip(together.cache.layers, alone.cache.layers):
            assert ours.keys[row].allclose(theirs.keys[0], atol=1e-4)
            assert ours.values[row].allclose(theirs.values[0], atol=1e-4)


def test_a_press_that_rotates_keys_is_a_clear_error(llama, input_ids):
    with pytest.raises(ValueError, match="GRKVPress fits keys where the context put them"):
        prefill(llama, input_ids, GRKVPress(KeyRerotationPress(SnapKVPress(0.5))))
