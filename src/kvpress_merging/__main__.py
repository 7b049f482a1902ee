# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
``python -m kvpress_merging``: what is installed, what of it was tested, and whether merging works here.

It merges and matches once on a tiny random model, and compares the merge with that of one position after the other.
The exit status is 0 if both come out right, else 1. A bug report should carry what it prints.
"""

from __future__ import annotations

import platform
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from kvpress import BasePress, KnormPress
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvpress_merging import AttentionMatchingPress, MergingPress, __version__
from kvpress_merging.environment import installed_packages, is_python_tested
from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels.blend import naive_cosine_blend

_HEAD_DIM = 64
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def main() -> int:
    """Print what there is to know, and return the exit status."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"kvpress-merging {__version__} on {platform.platform()}")
    packages = installed_packages()
    rows = [("python", platform.python_version(), _verdict(not packages or is_python_tested()))]
    for package in packages:
        reason = f"allowed are {package.allowed}" if not package.is_allowed else f"tested are {package.tested}"
        rows.append((package.name, package.version, _verdict(package.is_tested, reason)))
    rows.append(("triton", _version("triton"), "used on a GPU, where kernel='triton' asks for it"))
    rows.append(("GPU", torch.cuda.get_device_name() if device.type == "cuda" else "none", ""))
    for name, found, remark in rows:
        print(f"  {name:13} {found:20} {remark}".rstrip())
    if not packages:
        print("  This package runs from its source, and was not installed: its metadata tells nothing of versions.")

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(f"Nearest survivors are searched by the kernel 'torch' ({str(dtype)[6:]} on {device.type}).")
    try:
        self_test(device, dtype)
    except Exception:
        traceback.print_exc(file=sys.stdout)
        print("The self-test failed: this package does not work here.")
        return 1
    print("The self-test passed: merging and matching on a tiny model give what they should.")
    return 0


def self_test(device: torch.device, dtype: torch.dtype) -> None:
    """
    Merge and match once on a tiny random model.

    Raises
    ------
    ValueError
        If what comes out is not the blend that MergingPress defines, to the dtype's precision, or matching moved
        nothing or left more error than eviction.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=4 * _HEAD_DIM,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.1,
        )
        model_class: Any = LlamaForCausalLM
        model = model_class(config).eval().to(device, dtype)
    full, bare = _prefill(model, None), _prefill(model, KnormPress(0.5))
    merged = _prefill(model, MergingPress(KnormPress(0.5)))
    for layer_idx, (of_full, of_bare, of_merged) in enumerate(zip(full, bare, merged)):
        if not torch.equal(of_merged[0], of_bare[0]):
            raise ValueError(f"layer {layer_idx}: the survivors' keys are not those that the press left")
        is_at = (of_bare[0][..., None, :] == of_full[0][..., None, :, :]).all(dim=-1)  # (bsz, heads, n_kept, k_len)
        eviction = Eviction.from_kept(is_at.int().argmax(dim=-1), of_full[0].shape[2])
        expected = naive_cosine_blend(*of_full, *of_bare, eviction).values
        error = (of_merged[1] - expected).double().abs().max() / expected.double().abs().max()
        if not error < _TOLERANCE[dtype]:
            raise ValueError(f"layer {layer_idx}: merged values are off by {error:.2g} of the largest value")

    press = AttentionMatchingPress(KnormPress(0.5))
    _prefill(model, press)
    for layer_idx, row in press.report.to_dict().items():
        if not (row.get("heads_fitted") and row["error_after"] < row["error_before"]):
            raise ValueError(f"layer {layer_idx}: matching leaves the error of eviction: {row}")


@torch.no_grad()
def _prefill(model: PreTrainedModel, press: BasePress | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer after a prefill of tokens that all differ."""
    cache: Any = DynamicCache()
    input_ids = torch.arange(3, 99, device=model.device)[None]
    if press is None:
        model(input_ids, past_key_values=cache)
    else:
        with press(model):
            model(input_ids, past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


def _verdict(is_tested: bool, reason: str = "") -> str:
    return "tested" if is_tested else f"not tested{reason and '; '}{reason}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    raise SystemExit(main())
