# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Reference queries are those that the layer itself would ask, whatever the family."""

import pytest
import torch
from replay import attention_modules
from tiny import FAMILIES, tiny_model
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpress_merging.queries import prerope_queries, query_scaling, reference_positions, rotate


def watch(model, input_ids):
    """What enters each attention layer, and the queries that reach its attention function, after RoPE."""
    seen: list[dict] = []
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append({"module": module} | kwargs), with_kwargs=True
        )
        for module in attention_modules(model)
    ]
    with torch.no_grad():
        model.model(input_ids=input_ids, past_key_values=DynamicCache())
    for handle in handles:
        handle.remove()
    return seen


class Asked(Exception):
    pass


def queries_asked(module, kwargs, monkeypatch) -> torch.Tensor:
    """What one layer hands to attention, shape ``(bsz, num_heads, q_len, head_dim)``, times its scaling."""
    captured = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        captured.append(query.float() * kwargs["scaling"])
        raise Asked

    with monkeypatch.context() as patch, torch.no_grad(), pytest.raises(Asked):
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attention)
        module(**kwargs | {"past_key_values": None})
    return captured[0]


@pytest.mark.parametrize("bsz", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_reference_queries_are_those_that_the_layer_asks(family, bsz, monkeypatch):
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.stack([torch.randperm(240, generator=generator)[:24] + 10 for _ in range(bsz)])
    for seen in watch(model, input_ids):
        module = seen.pop("module")
        asked = queries_asked(module, seen, monkeypatch).unflatten(1, (-1, module.num_key_value_groups))
        positions = torch.tensor([0, 3, 8, 9, 23])
        with torch.no_grad():
            queries = prerope_queries(module, seen["hidden_states"][:, positions])
        cos, sin = seen["position_embeddings"]
        assert queries.shape == (bsz, asked.shape[1], len(positions), module.head_dim)
        assert queries.dtype == torch.float32
        for n, position in enumerate(positions.tolist()):
            rotated = rotate(queries[:, :, n : n + 1], cos[:, position], sin[:, position], query_scaling(module))
            torch.testing.assert_close(
                rotated[:, :, 0], asked[:, :, n % module.num_key_value_groups, position], rtol=1e-4, atol=1e-5
            )


def test_part_of_a_head_is_rotated_where_the_model_rotates_part():
    queries = torch.randn(1, 2, 3, 8)
    angle = torch.randn(1, 2)
    cos, sin = torch.cat([angle.cos()] * 2, dim=-1), torch.cat([angle.sin()] * 2, dim=-1)
    rotated = rotate(queries, cos, sin, 0.5) * 2
    assert torch.equal(rotated[..., 4:], queries[..., 4:])
    turned = torch.view_as_complex(torch.stack([queries[..., :2], queries[..., 2:4]], dim=-1)) * torch.exp(1j * angle)
    torch.testing.assert_close(rotated[..., :2], turned.real)
    torch.testing.assert_close(rotated[..., 2:4], turned.imag)


@pytest.mark.parametrize("n_queries", [1, 2, 64, 99, 100, 1000])
def test_positions_differ_and_lie_over_the_whole_context(n_queries):
    positions = reference_positions(100, n_queries, torch.device("cpu"))
    n = min(n_queries, 100)
    assert positions.dtype == torch.int64
    assert len(positions) == n
    assert (positions >= 0).all()
    assert (positions < 100).all()
    assert positions.unique().equal(positions)
    if 2 < n < 100:
        assert positions[0] < 100 / n * 2
        assert positions[-1] >= 100 - 100 / n


def test_a_layer_without_a_query_projection_is_an_error_that_names_it():
    module = torch.nn.Linear(4, 4)
    with pytest.raises(TypeError, match="Linear has neither q_proj nor qkv_proj"):
        prerope_queries(module, torch.ones(1, 2, 4))
