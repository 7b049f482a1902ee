# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Every press of kvpress: how to make one for a tiny model, and how it evicts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import version

import kvpress
import numpy as np
import pytest
import torch
from kvpress import (
    AdaKVPress,
    BasePress,
    BlockPress,
    CAMPress,
    CapPress,
    ChunkKVPress,
    ChunkPress,
    CompactorPress,
    ComposedPress,
    CompressionRatioDecodingPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    CURPress,
    DecodingPress,
    DMSPress,
    DuoAttentionPress,
    ExpectedAttentionPress,
    ExpectedAttentionStatsPress,
    FastKVzipPress,
    FinchPress,
    KeyDiffPress,
    KeyRerotationPress,
    KnormPress,
    KVComposePress,
    KVzapPress,
    KVzipPress,
    LagKVPress,
    LeverageScorePress,
    LUKVPress,
    MergingPress,
    NonCausalAttnPress,
    ObservedAttentionPress,
    PerLayerCompressionPress,
    PrefillDecodingPress,
    PyramidKVPress,
    QFilterPress,
    RandomPress,
    SimLayerKVPress,
    SnapKVPress,
    StreamingLLMPress,
    ThinKPress,
    TOVAPress,
)
from kvpress.presses.fastkvzip_press import FastKVzipGate
from kvpress.presses.kvzap_press import KVzapConfig, KVzapModel
from transformers.cache_utils import DynamicLayer


def newer(name: str) -> type[BasePress]:
    """A press of kvpress by its name; a test that asks for one that this kvpress has not yet is skipped."""
    if not hasattr(kvpress, name):
        pytest.skip(f"kvpress {version('kvpress')} has no {name}")
    return getattr(kvpress, name)


def kvzip_by_chunks() -> KVzipPress:
    if "chunk_size" not in {field.name for field in fields(KVzipPress)}:
        pytest.skip(f"KVzipPress of kvpress {version('kvpress')} has no chunk_size")
    return KVzipPress(0.5, chunk_size=40)


# Presses that load weights from a hub get small random ones; the rest of their code runs as it is.


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


class LocalKVzapPress(KVzapPress):
    def post_init_from_model(self, model):
        if getattr(self, "kvzap_model", None) is None:
            with torch.random.fork_rng():
                torch.manual_seed(7)
                config = model.config
                self.kvzap_model = KVzapModel(
                    KVzapConfig(
                        input_dim=config.hidden_size,
                        output_dim=config.num_key_value_heads,
                        hidden_dim=8,
                        n_modules=config.num_hidden_layers,
                    )
                )


class LocalFastKVzipPress(FastKVzipPress):
    def post_init_from_model(self, model):
        if self.gates is None:
            config = model.config
            n_groups = config.num_attention_heads // config.num_key_value_heads
            with torch.random.fork_rng():
                torch.manual_seed(7)
                self.gates = [
                    FastKVzipGate(idx, config.hidden_size, config.num_key_value_heads, n_groups, model.dtype)
                    for idx in range(config.num_hidden_layers)
                ]


class LocalLUKVPress(LUKVPress):
    def _load_budget_curves(self, model):
        shape = (99, model.config.num_hidden_layers, model.config.num_key_value_heads)
        spread = np.random.default_rng(7).uniform(0.6, 1.3, shape)
        return np.clip(spread * np.arange(1, 100)[:, None, None] / 100, 0, 1)


class LocalRestoreKVPress(getattr(kvpress, "RestoreKVPress", BasePress)):
    def post_init_from_model(self, model):
        from peft import LoraConfig

        if self.restore_embeddings is None:
            self.restore_embeddings = torch.randn(4, model.config.hidden_size, generator=_generator())
            if self.adapter_name not in getattr(model, "peft_config", {}):
                lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
                model.add_adapter(lora, adapter_name=self.adapter_name)
            model.disable_adapters()


class LocalExpectedAttentionStatsPress(ExpectedAttentionStatsPress):
    def post_init_from_model(self, model):
        if self.mu is None:
            config = model.config
            shape = (config.num_hidden_layers, config.num_attention_heads, config.head_dim)
            self.mu = torch.randn(*shape, generator=_generator())
            root = torch.randn(*shape, config.head_dim, generator=_generator()) / config.head_dim
            self.cov = root @ root.mT


class LocalQFilterPress(QFilterPress):
    def post_init_from_model(self, model):
        config = model.config
        shape = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        self.q_filters = torch.randn(*shape, generator=_generator())


class LocalDuoAttentionPress(DuoAttentionPress):
    @staticmethod
    def load_attention_pattern(model):
        shape = (model.config.num_hidden_layers, model.config.num_key_value_heads)
        return 4, 8, np.random.default_rng(7).uniform(size=shape)


class ReadyFinchPress(FinchPress):
    """Finch with the delimiter that its user would have put into the tokenizer."""

    delimiter_token_id = 5


# Presses of a third party, by what they may do.


class GatheringPress(BasePress):
    """Keeps every second position, and the last ones, by an index of its own."""

    compression_ratio = 0.5

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        index = torch.arange(0, keys.shape[2], 2, device=keys.device).flip(0)
        return keys[:, :, index], torch.index_select(values, 2, index)


class SlicingPress(BasePress):
    """Keeps both ends by slices, joined again."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        head, _, tail = keys.split([8, keys.shape[2] - 24, 16], dim=2)
        return torch.cat([head, tail], dim=2), torch.cat([values.narrow(2, 0, 8), values[..., -16:, :]], dim=-2)


class ReshapingPress(BasePress):
    """Flattens heads into the batch, drops by a boolean mask, and shapes the result back."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        bsz, num_key_value_heads, k_len, head_dim = keys.shape
        keep = torch.arange(k_len, device=keys.device) % 3 != 1
        shape = (bsz, num_key_value_heads, -1, head_dim)
        rows = [
            tensor.reshape(bsz * num_key_value_heads, k_len, head_dim)[:, keep].reshape(shape)
            for tensor in (keys, values)
        ]
        return rows[0], rows[1].clone()


class MaskingPress(BasePress):
    """Masks a different number of positions in every head."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        norms = keys.norm(dim=-1)
        module.masked_key_indices = torch.where(norms < norms.mean(dim=(0, 2), keepdim=True))
        return keys, values


class ShrinkingAndMaskingPress(BasePress):
    """Drops the first positions, and masks some of those left."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        keys, values = keys[:, :, 10:].contiguous(), values[:, :, 10:].contiguous()
        norms = keys.norm(dim=-1)
        module.masked_key_indices = torch.where(norms < norms.mean(dim=(0, 2), keepdim=True))
        return keys, values


class SummarizingPress(BasePress):
    """Keeps every second position, behind a token of its own."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        def shorten(tensor):
            return torch.cat([tensor.mean(dim=2, keepdim=True), tensor[:, :, ::2]], dim=2)

        return shorten(keys), shorten(values)


class HookPress(BasePress):
    """Writes to the cache in a hook of its own."""

    def forward_hook(self, module, input, kwargs, output):
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        if layer.keys.shape[2] == kwargs["hidden_states"].shape[1]:
            bsz, num_key_value_heads = layer.keys.shape[:2]
            kept = layer.keys.norm(dim=-1).topk(40, dim=-1).indices
            where = torch.arange(bsz)[:, None, None], torch.arange(num_key_value_heads)[:, None], kept
            layer.keys, layer.values = layer.keys[where], layer.values[where]
        return output


class NewLayerPress(BasePress):
    """Puts a new layer into the cache."""

    def forward_hook(self, module, input, kwargs, output):
        layers = kwargs["past_key_values"].layers
        old, new = layers[module.layer_idx], DynamicLayer()
        new.update(old.keys, old.values)
        new.keys, new.values = old.keys[:, :, 1::2], old.values[:, :, 1::2]
        layers[module.layer_idx] = new
        return output


class OneBudgetPress(BasePress):
    """Shares one budget among all layers, once the last has run: by mask or by shrinking them."""

    def __init__(self, by_mask: bool):
        self.by_mask = by_mask
        self.norms: dict = {}

    def forward_hook(self, module, input, kwargs, output):
        layers = kwargs["past_key_values"].layers
        self.norms[module] = layers[module.layer_idx].keys.norm(dim=-1)
        if module.layer_idx == module.config.num_hidden_layers - 1:
            mean = torch.stack(list(self.norms.values())).mean()
            for other, norms in self.norms.items():
                layer = layers[other.layer_idx]
                if self.by_mask:
                    other.masked_key_indices = torch.where(norms < mean)
                else:
                    kept = norms[0].mean(dim=0) > mean - 0.5
                    layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
            self.norms = {}
        return output


class ModelHookPress(BasePress):
    """Shrinks all layers in a hook on the model, when it has prefilled."""

    @contextmanager
    def __call__(self, model):
        def halve(module, args, kwargs, output):
            for layer in kwargs["past_key_values"].layers:
                if layer.keys.shape[2] == output.last_hidden_state.shape[1]:
                    layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]

        handle = model.model.register_forward_hook(halve, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


class AveragingPress(BasePress):
    """Rebuilds the cache from averages: no position survives as it was."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        def halve(tensor):
            return (tensor[:, :, 0::2] + tensor[:, :, 1::2]) / 2

        return halve(keys), halve(values)


@dataclass(frozen=True)
class Case:
    """
    A press for a tiny Llama of 4 layers, 4 query and 2 KV heads.

    ``moment`` is when it evicts: "prefill", "exit" (when its context is left) or "decoding". ``needs`` is "tokenizer"
    (on disk, where ``model.config.name_or_path`` points), "own model" (it changes the model) or "delimiter" (in the
    input) or "eager prefill" (it prefills in eager attention).
    """

    make: Callable[[], BasePress]
    moment: str = "prefill"
    attn_implementation: str = "sdpa"
    needs: str = ""


CASES: dict[str, Case] = {
    # scorers
    "Knorm": Case(lambda: KnormPress(0.5)),
    "Random": Case(lambda: RandomPress(0.4, seed=3)),
    "SnapKV": Case(lambda: SnapKVPress(0.5, window_size=16)),
    "ExpectedAttention": Case(lambda: ExpectedAttentionPress(0.5)),
    "ExpectedAttentionStats": Case(lambda: LocalExpectedAttentionStatsPress(0.5)),
    "StreamingLLM": Case(lambda: StreamingLLMPress(0.6)),
    "TOVA": Case(lambda: TOVAPress(0.5)),
    "ObservedAttention": Case(lambda: ObservedAttentionPress(0.5), attn_implementation="eager"),
    "QFilter": Case(lambda: LocalQFilterPress(0.5)),
    "LagKV": Case(lambda: LagKVPress(0.5, lag_size=16)),
    "KeyDiff": Case(lambda: KeyDiffPress(0.7)),
    "CUR": Case(lambda: CURPress(0.5)),
    "LeverageScore": Case(lambda: LeverageScorePress(0.5)),
    "NonCausalAttn": Case(lambda: NonCausalAttnPress(0.5, chunk_size=32)),
    "Compactor": Case(lambda: CompactorPress(0.5, chunk_size=32)),
    "Cap": Case(lambda: CapPress(0.5)),
    "KVzap": Case(lambda: LocalKVzapPress(0.5)),
    "CriticalKV": Case(lambda: CriticalKVPress(SnapKVPress(0.5, window_size=16))),
    "PyramidKV": Case(lambda: PyramidKVPress(0.5, window_size=8)),
    # other presses that shrink the cache in compress
    "Chunk": Case(lambda: ChunkPress(KnormPress(0.5), chunk_length=30)),
    "ChunkKV": Case(lambda: ChunkKVPress(SnapKVPress(0.5, window_size=16), chunk_length=10)),
    "EntropyGatedChunkKV": Case(lambda: newer("EntropyGatedChunkKVPress")(SnapKVPress(0.5, window_size=16))),
    "Block": Case(lambda: BlockPress(KeyDiffPress(0.5), block_size=20)),
    "KeyRerotation": Case(lambda: KeyRerotationPress(KnormPress(0.5))),
    "Finch rerotating": Case(lambda: ReadyFinchPress(0.5), needs="delimiter"),
    "Finch": Case(lambda: ReadyFinchPress(0.5, rerotate_keys=False), needs="delimiter"),
    "Finch by chunks": Case(lambda: ReadyFinchPress(0.5, chunk_length=40), needs="delimiter"),
    "SimLayerKV": Case(lambda: SimLayerKVPress(lazy_threshold=0.3, n_recent=32, n_initial=4)),
    # by mask in compress
    "AdaKV": Case(lambda: AdaKVPress(SnapKVPress(0.5, window_size=16))),
    "CriticalAdaKV": Case(lambda: CriticalAdaKVPress(SnapKVPress(0.5, window_size=16))),
    "LUKV": Case(lambda: LocalLUKVPress(ExpectedAttentionPress(epsilon=2e-2), compression_ratio=0.5)),
    "DuoAttention": Case(lambda: LocalDuoAttentionPress(head_compression_ratio=0.5)),
    # by mask in the forward hook
    "DMS": Case(lambda: DMSPress(KnormPress(), threshold=-3.2, sliding_window_size=16)),
    "DMS(KVzap)": Case(lambda: DMSPress(LocalKVzapPress(), threshold=0.0, sliding_window_size=16)),
    # after the context exits
    "KVzip": Case(lambda: KVzipPress(0.5), "exit", needs="tokenizer"),
    "KVzip layerwise": Case(lambda: KVzipPress(0.5, layerwise=True), "exit", needs="tokenizer"),
    "KVzip plus": Case(lambda: KVzipPress(0.5, kvzip_plus_normalization=True), "exit", needs="tokenizer"),
    "KVzip by chunks": Case(kvzip_by_chunks, "exit", needs="tokenizer"),
    "KVgrad": Case(lambda: newer("KVgradPress")(0.5), "exit", needs="tokenizer"),
    "FastKVzip": Case(lambda: LocalFastKVzipPress(0.5), "exit"),
    "FastKVzip layerwise": Case(lambda: LocalFastKVzipPress(0.5, layerwise=True), "exit"),
    "RestoreKV": Case(
        lambda: newer("RestoreKVPress") and LocalRestoreKVPress(0.5), "exit", needs="tokenizer, own model"
    ),
    "KVCompose": Case(lambda: KVComposePress(compression_ratio=0.5), "exit", needs="eager prefill"),
    "KVCompose unstructured": Case(
        lambda: KVComposePress(structured=False, compression_ratio=0.5), "exit", needs="eager prefill"
    ),
    # per layer, and composed
    "PerLayerCompression": Case(lambda: PerLayerCompressionPress(KnormPress(), [0.1, 0.0, 0.5, 0.8])),
    "Composed": Case(lambda: ComposedPress([KnormPress(0.3), KeyDiffPress(0.5)])),
    "Composed, then ThinK": Case(lambda: ComposedPress([SnapKVPress(0.5, window_size=16), ThinKPress(0.3)])),
    "Composed, ThinK first": Case(lambda: ComposedPress([ThinKPress(0.3), SnapKVPress(0.5, window_size=16)])),
    "Composed with rerotation": Case(lambda: ComposedPress([KnormPress(0.3), KeyRerotationPress(KnormPress(0.5))])),
    # while decoding
    "Decoding": Case(lambda: DecodingPress(KnormPress(), compression_interval=4, target_size=60), "decoding"),
    "Decoding(AdaKV)": Case(
        lambda: DecodingPress(AdaKVPress(KnormPress()), compression_interval=4, target_size=60), "decoding"
    ),
    "CompressionRatioDecoding": Case(
        lambda: CompressionRatioDecodingPress(KnormPress(), compression_interval=4, target_compression_ratio=0.4),
        "decoding",
    ),
    "PrefillDecoding": Case(
        lambda: PrefillDecodingPress(
            SnapKVPress(0.3, window_size=16), DecodingPress(KnormPress(), compression_interval=4, target_size=40)
        ),
        "decoding",
    ),
    "DMS while decoding": Case(
        lambda: DMSPress(KnormPress(), threshold=-3.2, sliding_window_size=8, decoding=True), "decoding"
    ),
    # a third party's
    "third party, gathers": Case(GatheringPress),
    "third party, slices and joins": Case(SlicingPress),
    "third party, reshapes": Case(ReshapingPress),
    "third party, masks": Case(MaskingPress),
    "third party, shrinks and masks": Case(ShrinkingAndMaskingPress),
    "third party, appends a token": Case(SummarizingPress),
    "third party, by a hook": Case(HookPress),
    "third party, by a new layer": Case(NewLayerPress),
}

# Presses that evict from a layer in a hook of another module.
ELSEWHERE: dict[str, Callable[[], BasePress]] = {
    "masks all layers in the last one's hook": lambda: OneBudgetPress(by_mask=True),
    "shrinks all layers in the last one's hook": lambda: OneBudgetPress(by_mask=False),
    "in a hook on the model": ModelHookPress,
}

REFUSED: dict[str, Callable[[], BasePress]] = {
    "ThinK": lambda: ThinKPress(0.5),
    "CAM": lambda: CAMPress(base_press=KnormPress()),
    "kvpress's Merging": lambda: MergingPress(KnormPress(0.5)),
    "Composed of ThinK alone": lambda: ComposedPress([ThinKPress(0.5)]),
    "ThinK at prefill, then nothing": lambda: PrefillDecodingPress(ThinKPress(0.5)),
    "DMS around kvpress's Merging": lambda: DMSPress(MergingPress(KnormPress(0.5)), threshold=0.0),
}


def covered_classes() -> set[type]:
    """The classes of all presses above, and of those inside them."""
    covered: set[type] = set()
    waiting: list = [case.make() for case in CASES.values()] + [make() for make in REFUSED.values()]
    while waiting:
        press = waiting.pop()
        covered.update(type(press).__mro__)
        for value in vars(press).values():
            items = value if isinstance(value, list) else [value]
            waiting.extend(item for item in items if isinstance(item, BasePress))
    return covered
