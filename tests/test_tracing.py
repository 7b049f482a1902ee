# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Tensors that remember which positions they hold."""

import operator

import pytest
import torch

from kvpress_merging.following.tracing import (
    FOREIGN,
    TracedTensor,
    has_foreign_rows,
    plain,
    positions_of,
    trace,
)

BSZ, HEADS, K_LEN, HEAD_DIM = 2, 3, 10, 4
INDEX = torch.stack([torch.randperm(K_LEN, generator=torch.Generator().manual_seed(i))[:6] for i in range(6)])
INDEX = INDEX.view(BSZ, HEADS, 6)
KEEP = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0, 1, 0], dtype=torch.bool)


@pytest.fixture
def rows():
    """Rows that say where they stand: batch row, head, position."""
    b, h, k = torch.meshgrid(torch.arange(BSZ), torch.arange(HEADS), torch.arange(K_LEN), indexing="ij")
    return torch.stack([b, h, k, torch.zeros_like(k)], dim=-1).float()


# Each takes (bsz, heads, k_len, head_dim) and picks, moves or joins rows.
FOLLOWED = {
    "slice": lambda x: x[:, :, 2:7],
    "slice with a step": lambda x: x[..., ::3, :],
    "integer index": lambda x: x[1],
    "several integers": lambda x: x[0, 2],
    "ellipsis": lambda x: x[..., 1:3, :],
    "new axis": lambda x: x[:, None, :, 4:],
    "tensor index": lambda x: x[:, :, torch.tensor([7, 0, 3])],
    "list index": lambda x: x[:, :, [7, 0, 3]],
    "boolean index": lambda x: x[:, :, KEEP],
    "boolean index of one head": lambda x: x[0, 1][:8][KEEP[:8]],
    "advanced indices": lambda x: x[torch.arange(2)[:, None, None], torch.arange(3)[None, :, None], INDEX],
    "gather": lambda x: x.gather(2, INDEX[..., None].expand(-1, -1, -1, HEAD_DIM)),
    "torch.gather, spelled out": lambda x: torch.gather(x, dim=2, index=INDEX[..., None].repeat(1, 1, 1, HEAD_DIM)),
    "gather of heads": lambda x: x.gather(1, torch.tensor([2, 0]).view(1, 2, 1, 1).expand(BSZ, 2, K_LEN, HEAD_DIM)),
    "gather of what was picked": lambda x: x[:, :, 3:].gather(
        2, INDEX[..., :2, None].remainder(7).expand(-1, -1, -1, 4)
    ),
    "take_along_dim": lambda x: torch.take_along_dim(x, INDEX[..., None], dim=2),
    "index_select": lambda x: torch.index_select(x, 2, torch.tensor([9, 1])),
    "narrow": lambda x: x.narrow(2, 3, 4),
    "select": lambda x: x.select(1, 2),
    "split": lambda x: x.split([3, 7], dim=2)[1],
    "chunk": lambda x: torch.chunk(x, 3, dim=2)[0],
    "unbind": lambda x: x.unbind(1)[2],
    "cat": lambda x: torch.cat([x[:, :, 8:], x[:, :, :2]], dim=-2),
    "stack": lambda x: torch.stack([x[0, h][KEEP] for h in range(HEADS)], dim=0).unsqueeze(0),
    "squeeze": lambda x: x[:1].squeeze(0),
    "flip": lambda x: x.flip(2),
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: x.permute(2, 0, 1, 3),
    "reshape": lambda x: x.reshape(BSZ * HEADS, K_LEN, HEAD_DIM)[:, 5:],
    "view and back": lambda x: x.view(BSZ, HEADS, 2, 5, HEAD_DIM)[:, :, 1].contiguous().view(BSZ, HEADS, 5, HEAD_DIM),
    "flatten": lambda x: x.flatten(0, 1),
    "expand": lambda x: x[:, :, None].expand(BSZ, HEADS, 2, K_LEN, HEAD_DIM).reshape(BSZ, HEADS * 2, K_LEN, HEAD_DIM),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=2),
    "clone, to, detach": lambda x: x[:, :, 3:].clone().to(torch.float64).detach().float().contiguous(),
    "data": lambda x: x.data[:, :, 1:],
    "a slice written in place": lambda x: x[:, :, 4:].mul_(1.0),
    "a slice scaled by an operator": lambda x: operator.imul(x[:, :, 4:], 1.0),
    "channels set to zero": lambda x: x.clone().scatter_(-1, torch.full((*x.shape[:3], 1), 3), 0.0)[:, :, :5],
    "channels set by index": lambda x: _set_last_channel(x)[:, :, :5],
}


def _set_last_channel(x):
    x = x.clone()
    x[..., 3] = 0
    return x


@pytest.mark.parametrize("name", FOLLOWED)
def test_positions_follow_the_rows(name, rows):
    out = FOLLOWED[name](trace(rows.clone()))
    expected = FOLLOWED[name](rows.clone())
    assert torch.equal(plain(out), expected)
    assert torch.equal(positions_of(out), expected[..., 2].long())
    assert not has_foreign_rows(out)


NOT_FOLLOWED = {
    "arithmetic": lambda x: x * 2,
    "a channel": lambda x: x[..., 0],
    "some channels": lambda x: x[..., :2],
    "some channels, narrowed": lambda x: x.narrow(-1, 1, 2),
    "every row by channel": lambda x: x[:, :, :, torch.tensor([0, 1])],
    "transposed rows": lambda x: x.transpose(2, 3),
    "rows cut in two": lambda x: x.reshape(BSZ, HEADS, K_LEN * 2, HEAD_DIM // 2),
    "rows joined": lambda x: x.reshape(BSZ, HEADS, K_LEN // 2, HEAD_DIM * 2),
    "averages": lambda x: (x[:, :, ::2] + x[:, :, 1::2]) / 2,
    "a gather that differs by channel": lambda x: x.gather(
        2, torch.arange(40).view(1, 1, 10, 4).expand(2, 3, 10, 4) % 10
    ),
    "a gather along channels": lambda x: x.gather(3, torch.zeros(2, 3, 10, 4, dtype=torch.long)),
    "rows written over": lambda x: _write_over(x),
    "rows copied over": lambda x: x.clone().copy_(x.flip(2)),
    "a product": lambda x: x @ x.transpose(-1, -2),
    "sorted": lambda x: x.sort(dim=2).values,
    "cat along channels": lambda x: torch.cat([x, x], dim=-1),
    "stacked with what is not of the cache": lambda x: torch.stack([x, torch.zeros(x.shape)]),
    "copied to elsewhere": lambda x: torch.zeros(x.shape).copy_(x),
    "written as a result": lambda x: _write_as_result(x),
    "written as one of two results": lambda x: _write_as_one_of_two_results(x),
}


def _write_over(x):
    x = x.clone()
    x[:, :, :5] = x[:, :, 5:]
    return x


def _write_as_result(x):
    out = x.clone()
    torch.add(x.flip(2), 0, out=out)
    return out


def _write_as_one_of_two_results(x):
    out = x.clone()
    torch.sort(x, 2, descending=True, out=(out, torch.zeros(0, dtype=torch.int64)))
    return out


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_what_is_no_selection_of_rows_has_no_positions(name, rows):
    out = NOT_FOLLOWED[name](trace(rows.clone()))
    assert torch.equal(plain(out), NOT_FOLLOWED[name](rows.clone()))
    assert positions_of(out) is None


def test_everything_else_gives_plain_tensors(rows):
    traced = trace(rows)
    out = rows.clone(), torch.zeros(0, dtype=torch.int64)
    written = torch.sort(rows, 2, out=(trace(out[0]), out[1]))
    for out in (traced.norm(dim=-1), traced + 1, traced.mean(), torch.topk(traced, 2).values, traced > 0, *written):
        assert type(out) is torch.Tensor
    assert isinstance(traced[:, :, 1:], TracedTensor)
    assert type(plain(traced[:, :, 1:])) is torch.Tensor


def test_rows_that_a_press_appends_are_foreign(rows):
    own = torch.zeros(BSZ, HEADS, 2, HEAD_DIM)
    out = torch.cat([trace(rows)[:, :, 4:7], own], dim=2)
    assert positions_of(out)[1, 2].tolist() == [4, 5, 6, FOREIGN, FOREIGN]
    assert has_foreign_rows(out)
    assert has_foreign_rows(out[:, :, 1:])
    assert positions_of(torch.cat([torch.tensor([]), trace(rows)], dim=-2)) is not None


def test_two_traced_tensors_joined_have_no_positions(rows):
    assert positions_of(torch.cat([trace(rows), trace(rows)], dim=2)) is None


def test_the_index_is_read_at_once_and_may_be_written_later(rows):
    index = INDEX.clone()
    out = trace(rows).gather(2, index[..., None].expand(-1, -1, -1, HEAD_DIM))
    index.zero_()
    assert torch.equal(positions_of(out), INDEX)


def test_writing_in_place_reaches_the_source_and_its_original_is_kept(rows):
    source = rows.clone()
    traced = trace(source)
    assert traced._origin.original is source
    traced[:, :, 3:].mul_(2)
    assert torch.equal(source[:, :, 3:], rows[:, :, 3:] * 2)
    assert torch.equal(traced._origin.original, rows)
    traced._origin.undo_writes()
    assert torch.equal(source, rows)


@pytest.mark.parametrize(
    "write",
    [
        lambda x: operator.imul(x, 2),
        lambda x: torch.mul(plain(x), 2, out=x),
        lambda x: torch.sort(plain(x).clone(), 2, descending=True, out=(x, torch.zeros(0).long())),
    ],
    ids=["by an operator", "as a result", "as one of two results"],
)
def test_whatever_writes_to_the_source_can_be_undone(write, rows):
    source = rows.clone()
    traced = trace(source)
    write(traced)
    assert not torch.equal(source, rows)
    assert traced._origin.is_modified
    assert torch.equal(traced._origin.original, rows)
    traced._origin.undo_writes()
    assert torch.equal(source, rows)


def test_writing_to_a_copy_keeps_no_original(rows):
    traced = trace(rows)
    traced[:, :, 3:].clone().mul_(2)
    assert traced._origin.original is rows


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_tracing_works_without_gradients_and_in_inference_mode(context, rows):
    with context():
        assert positions_of(trace(rows.clone())[:, :, 5:])[0, 0].tolist() == [5, 6, 7, 8, 9]


def test_positions_are_known_on_meta_tensors():
    out = trace(torch.empty(1, 8, 131_072, 128, device="meta"))[:, :, ::2]
    assert positions_of(out).shape == (1, 8, 65_536)
