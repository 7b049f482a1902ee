# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What an installed kvpress-merging must do, in an environment with nothing but what it asks for."""

import importlib.util
from importlib.metadata import version
from importlib.resources import files

import torch
from kvpress import KnormPress
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvpress_merging
from kvpress_merging import AttentionMatchingPress, MergingPress

assert kvpress_merging.__version__ == version("kvpress-merging")
assert "site-packages" in kvpress_merging.__file__, kvpress_merging.__file__
assert files("kvpress_merging").joinpath("py.typed").is_file()
assert importlib.util.find_spec("evaluation") is None, "evaluation belongs to the checkout"

config = LlamaConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(config).eval()
for press in (MergingPress(KnormPress(0.5), record_pairs=True), AttentionMatchingPress(KnormPress(0.5))):
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        model(torch.arange(40)[None], past_key_values=cache)
    assert cache.get_seq_length() == 20
    print(press.report)
    if importlib.util.find_spec("matplotlib") is None:
        message = ""
        try:
            press.report.plot_layers()
        except ImportError as error:
            message = str(error)
        assert "kvpress-merging[plot]" in message
