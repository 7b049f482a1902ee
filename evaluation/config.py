# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What one evaluation measures: flags, what is saved of them, and the name of the folder that holds its results."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from evaluation.checks import check_names, check_values
from evaluation.evaluate_registry import DATASET_REGISTRY, NO_PRESS, PRESS_REGISTRY
from evaluation.models import BUILT_IN_MODEL, RESERVED_KWARGS

PRESS_FIELDS = (
    "similarity_threshold",
    "merge_keys",
    "value_norm_weighting",
    "max_merge_per_token",
    "merge_fraction",
    "n_queries",
    "key_ridge",
)
"""Settings that are fields of our presses, by the same names."""

DEFAULT_LENGTH = "1024"
"""``data_dir`` of the datasets that are made here."""

RECORDED = ("press_init_command", "versions")
"""What a saved configuration says beside the settings."""

# File systems take 255 bytes, and there must be room for an ending.
_LONGEST_NAME = 180


@dataclass
class EvaluationConfig:
    """
    One model, one press, one dataset. Each field is a flag of ``python -m evaluation run`` that ``--help`` explains.

    Names and meanings are those of kvpress's evaluation, up to ``fp8``.

    Raises
    ------
    ValueError
        For an unknown name or a value that is not allowed; the message names the flag.
    """

    dataset: str = field(default="ruler-synthetic", metadata={"help": f"one of {', '.join(DATASET_REGISTRY)}"})
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": (
                "which part of the dataset: its folder on the hub (ruler: the length, longbench: the task), or a local "
                "folder with its parquet files; for ruler-synthetic and fidelity the tokens in a context, by default "
                f"{DEFAULT_LENGTH}"
            )
        },
    )
    model: str = field(default=BUILT_IN_MODEL, metadata={"help": "the built-in 'smollm2', a folder, or a hub id"})
    device: str | None = field(
        default=None, metadata={"help": "torch device, or 'auto' to use all GPUs; by default what there is"}
    )
    press_name: str = field(
        default="knorm",
        metadata={
            "help": "a press of kvpress, by the name in kvpress's evaluation, or the same with merging_ or matching_ "
            f"before it; {NO_PRESS} for the full cache"
        },
    )
    compression_ratio: float = field(
        default=0.5, metadata={"help": "share of the cache that the press evicts, in [0, 1)"}
    )
    key_channel_compression_ratio: float | None = field(
        default=None, metadata={"help": "ThinKPress: share of the key channels, in [0, 1)"}
    )
    head_compression_ratio: float | None = field(
        default=None, metadata={"help": "DuoAttentionPress: share of the heads, in [0, 1]"}
    )
    threshold: float | None = field(
        default=None, metadata={"help": "DMSPress: the score below which a position is evicted"}
    )
    fraction: float = field(default=1.0, metadata={"help": "share of the samples, drawn with the seed, in (0, 1]"})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "longest answer, in tokens; by default the dataset's own"}
    )
    max_context_length: int | None = field(
        default=None, metadata={"help": "cut contexts to so many tokens; by default to what the model can take"}
    )
    query_aware: bool = field(
        default=False, metadata={"help": "let the press see the question: put it into the context"}
    )
    needle_depth: list[int] | None = field(
        default=None, metadata={"help": "needle_in_haystack: where the needle is, in percent; one or more"}
    )
    compression_interval: int | None = field(
        default=None, metadata={"help": "DecodingPress: steps between two evictions"}
    )
    target_size: int | None = field(default=None, metadata={"help": "DecodingPress: positions that an eviction leaves"})
    hidden_states_buffer_size: int | None = field(
        default=None, metadata={"help": "DecodingPress: steps whose hidden states are kept for the scores"}
    )
    output_dir: str = field(default="results", metadata={"help": "where the folder with the results goes"})
    log_level: str = field(default="INFO", metadata={"help": "DEBUG, INFO, WARNING or ERROR"})
    model_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": """more arguments for from_pretrained, as JSON or YAML, for instance '{"dtype": "bfloat16"}'"""
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "let the model's repository run code of its own"})
    seed: int = field(default=42, metadata={"help": "draws samples and whatever a press draws"})
    fp8: bool = field(default=False, metadata={"help": "quantize the weights to FP8 (needs a GPU)"})

    similarity_threshold: float | None = field(
        default=None, metadata={"help": "merging presses: least cosine similarity for a merge, in [0, 1]"}
    )
    merge_keys: bool | None = field(
        default=None, metadata={"help": "merging presses: blend keys too", "nargs": "?", "const": True}
    )
    value_norm_weighting: bool | None = field(
        default=None,
        metadata={
            "help": "merging presses: scale a merge by the evicted value's share of both norms",
            "nargs": "?",
            "const": True,
        },
    )
    max_merge_per_token: int | None = field(
        default=None, metadata={"help": "merging presses: most that one survivor takes; 0 is no limit"}
    )
    merge_fraction: float | None = field(
        default=None, metadata={"help": "merging presses: share of the evicted that is merged, in (0, 1]"}
    )

    n_queries: int | None = field(
        default=None, metadata={"help": "matching presses: reference queries of each KV head, at least 1"}
    )
    key_ridge: float | None = field(
        default=None, metadata={"help": "matching presses: how strongly keys are held where they were, above 0"}
    )

    tasks: list[str] | None = field(
        default=None, metadata={"help": "ruler, ruler-synthetic: these tasks only; by default all"}
    )
    n_samples: int = field(default=25, metadata={"help": "ruler-synthetic: samples of each task; fidelity: windows"})
    text_file: str | None = field(
        default=None,
        metadata={
            "help": "fidelity: UTF-8 text to measure on; ruler-synthetic: to hide needles in; by default built in"
        },
    )
    squad_file: str | None = field(
        default=None, metadata={"help": "ruler-synthetic: SQuAD's JSON file, for the task qa_1"}
    )
    hotpotqa_file: str | None = field(
        default=None, metadata={"help": "ruler-synthetic: HotpotQA's JSON file, for the task qa_2"}
    )
    continuation_length: int = field(
        default=129, metadata={"help": "fidelity: tokens that follow a context; all but the first are scored"}
    )
    quiet: bool = field(default=False, metadata={"help": "no progress bars, only warnings"})

    press_init_command: str | None = field(default=None, init=False)

    def __post_init__(self):
        self.log_level = str(self.log_level).upper()
        check_names(self)
        self._fill_in()
        check_values(self)

    def folder_name(self) -> str:
        """
        The name that kvpress's evaluation gives to the folder of the results, and after it what kvpress does not know.

        Of that, what has its default value is left out: for ``PRESS_FIELDS``, the press's own.
        """
        level = self.compression_ratio
        if self.threshold is not None:
            level = self.threshold
        elif self.head_compression_ratio is not None:
            level = self.head_compression_ratio
        parts = [self.dataset, self.data_dir, self.model, self.press_name, f"{level:.2f}"]
        if self.fraction < 1.0:
            parts.append(f"fraction{self.fraction:.3f}")
        if self.max_context_length is not None:
            parts.append(f"max_context{self.max_context_length}")
        if self.query_aware:
            parts.append("query_aware")
        if self.key_channel_compression_ratio is not None:
            parts.append(f"key_channel_cr{self.key_channel_compression_ratio:.2f}")
        if self.needle_depth is not None:
            parts.append(f"needle_depth{'-'.join(map(str, self.needle_depth))}")

        press = PRESS_REGISTRY[self.press_name]
        for name in PRESS_FIELDS:
            value = getattr(self, name)
            if value is None or value == getattr(press, name, None):
                continue
            if isinstance(value, bool):
                parts.append(name if value else f"no_{name}")
            else:
                parts.append(f"{name}{value:g}")
        for name in ("max_new_tokens", "compression_interval", "target_size", "hidden_states_buffer_size"):
            if getattr(self, name) is not None:
                parts.append(f"{name}{getattr(self, name)}")
        if self.tasks is not None:
            parts.append("-".join(self.tasks))
        for name in ("n_samples", "continuation_length", "seed"):
            if getattr(self, name) != _default(name):
                parts.append(f"{name}{getattr(self, name)}")
        parts += [Path(file).stem for file in (self.text_file, self.squad_file, self.hotpotqa_file) if file is not None]
        assert isinstance(self.model_kwargs, dict)
        for name, value in self.model_kwargs.items():
            if value is not None and (name, value) != ("dtype", "auto"):
                parts.append(f"{name}{value}")
        if self.fp8:
            parts.append("fp8")
        name = "__".join(part.replace("/", "--") for part in parts if part)
        if len(name.encode()) > _LONGEST_NAME:
            digest = hashlib.sha256(name.encode()).hexdigest()[:16]
            name = f"{name.encode()[:_LONGEST_NAME].decode(errors='ignore')}-{digest}"
        return name

    def save(self, file: Path, versions: dict[str, str]) -> None:
        """
        Write the configuration as YAML, as kvpress's evaluation does.

        Parameters
        ----------
        file : Path
            Where to.
        versions : dict
            Package or part of the machine to its version or name, to be noted too.
        """
        record = {**self.record(), "versions": versions}
        file.write_text(yaml.safe_dump(record, sort_keys=False, allow_unicode=True), encoding="utf-8")

    def record(self) -> dict[str, Any]:
        """The settings as a saved configuration has them: without a ratio where something else takes its place."""
        record = {field.name: getattr(self, field.name) for field in dataclasses.fields(EvaluationConfig)}
        if self.threshold is not None or self.head_compression_ratio is not None:
            del record["compression_ratio"]
        for name in ("threshold", "head_compression_ratio"):
            if record[name] is None:
                del record[name]
        if self.needle_depth is not None and len(self.needle_depth) == 1:
            record["needle_depth"] = self.needle_depth[0]
        return record

    def _fill_in(self) -> None:
        for name in ("model", "output_dir", "text_file", "squad_file", "hotpotqa_file"):
            if getattr(self, name) is not None:
                setattr(self, name, str(getattr(self, name)))
        if self.press_name == NO_PRESS:
            self.compression_ratio = 0.0
        if self.dataset in ("ruler-synthetic", "fidelity"):
            self.data_dir = DEFAULT_LENGTH if self.data_dir is None else str(self.data_dir)
            if not self.data_dir.isdecimal() or int(self.data_dir) == 0:
                raise ValueError(
                    f"--data_dir of the dataset {self.dataset} must be a number of tokens, got {self.data_dir!r}"
                )
        elif self.data_dir is not None:
            self.data_dir = str(self.data_dir)
        if isinstance(self.needle_depth, int):
            self.needle_depth = [self.needle_depth]
        if isinstance(self.tasks, str):
            self.tasks = [self.tasks]
        if isinstance(self.model_kwargs, str):
            try:
                self.model_kwargs = yaml.safe_load(self.model_kwargs)
            except yaml.YAMLError as error:
                raise ValueError(f"--model_kwargs is neither JSON nor YAML: {error}") from error
        if self.model_kwargs is None:
            self.model_kwargs = {}
        if not isinstance(self.model_kwargs, dict):
            raise ValueError(f"--model_kwargs must be a mapping of names to values, got {self.model_kwargs!r}")
        for name, reason in RESERVED_KWARGS.items():
            if name in self.model_kwargs:
                raise ValueError(f"--model_kwargs cannot set {name}: {reason}")


def _default(name: str) -> Any:
    return EvaluationConfig.__dataclass_fields__[name].default
