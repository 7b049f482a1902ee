# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
What one evaluation measures, what is saved of it, and the name of the folder that holds its results.

A new setting is a field of ``EvaluationConfig``, and nothing more: what else there is to know of it is its metadata.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from kvpress import BasePress, DecodingPress, DMSPress, DuoAttentionPress, ThinKPress

from evaluation.cli import closest
from evaluation.models import BUILT_IN_MODEL, BUILT_IN_MODELS, RESERVED_KWARGS
from evaluation.settings import ABOVE_0, BELOW_1, POSITIVE, UP_TO_1, Setting, integer, setting
from kvpress_merging import AttentionMatchingPress, MergeOnEvictPress, MergingPress

NO_PRESS = "no_press"
"""The press name that means the full cache."""

MADE_HERE = ("ruler-synthetic", "fidelity")
"""Datasets that need no download; their ``data_dir`` is a number of tokens."""

DATASETS = (*MADE_HERE, "ruler", "longbench", "needle_in_haystack")

DEFAULT_LENGTH = "1024"
"""``data_dir`` of the datasets that are made here."""

RECORDED = ("press_init_command", "versions")
"""What a saved configuration says beside the settings."""

# File systems take 255 bytes, and there must be room for an ending.
_MAX_NAME_BYTES = 180

_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_HOW: dict[str, Any] = {"is_shared": False, "is_measured": False}
_ASKED: dict[str, Any] = {"datasets": tuple(name for name in DATASETS if name != "fidelity")}
_MERGING: dict[str, Any] = {"press": MergingPress, "is_shared": False}
_MATCHING: dict[str, Any] = {"press": AttentionMatchingPress, "is_shared": False}


def _parts(model_kwargs: dict[str, Any]) -> str:
    given = {name: value for name, value in model_kwargs.items() if value is not None}
    return "__".join(f"{name}{value}" for name, value in given.items() if (name, value) != ("dtype", "auto"))


def _stem(file: str) -> str:
    return Path(file).stem


def _switch(name: str) -> Callable[[bool], str]:
    return lambda is_on: name if is_on else f"no_{name}"


@dataclass
class EvaluationConfig:
    """
    One model, one press, one dataset. Each field is a flag of ``python -m evaluation run`` that ``--help`` explains.

    Names and meanings are those of kvpress's evaluation, up to ``fp8``.

    Raises
    ------
    ValueError
        For a value that is not allowed; the message names the flag. Whether there are such a press and such tasks is
        for ``evaluation.evaluate_registry.check_names`` to say.
    """

    # fmt: off
    dataset: str = setting("ruler-synthetic", f"one of {', '.join(DATASETS)}")
    data_dir: str | None = setting(None,
        "which part of the dataset: its folder on the hub (ruler: the length, longbench: the task), or a local folder "
        f"with its parquet files; for {' and '.join(MADE_HERE)} the tokens in a context, by default {DEFAULT_LENGTH}")
    model: str = setting(BUILT_IN_MODEL, f"a built-in one ({', '.join(BUILT_IN_MODELS)}), a folder, or a hub id")
    device: str | None = setting(None, "torch device, or 'auto' to use all GPUs; by default what there is", **_HOW)
    press_name: str = setting("knorm",
        "a press of kvpress, by the name in kvpress's evaluation, or the same with merging_ or matching_ before it, or "
        f"kvfold_, grkv_ or kvpress_merging_, which are others' merges; {NO_PRESS} for the full cache", is_shared=False)
    compression_ratio: float = setting(0.5,
        "share of the cache that the press evicts, in [0, 1)", BELOW_1, press=BasePress, eviction="amount")
    key_channel_compression_ratio: float | None = setting(None,
        "ThinKPress: share of the key channels, in [0, 1)", BELOW_1, (4, "key_channel_cr{:.2f}"),
        press=ThinKPress, is_needed=True, eviction="amount")
    head_compression_ratio: float | None = setting(None,
        "DuoAttentionPress: share of the heads, in [0, 1]", UP_TO_1,
        press=DuoAttentionPress, is_needed=True, eviction="amount")
    threshold: float | None = setting(None,
        "DMSPress: the score below which a position is evicted", ("a finite number", math.isfinite),
        press=DMSPress, is_needed=True, eviction="amount")
    fraction: float = setting(1.0,
        "share of the samples, drawn with the seed, in (0, 1]", ABOVE_0, (1, "fraction{:.3f}"))
    max_new_tokens: int | None = setting(None,
        "longest answer, in tokens; by default the dataset's own; with 0 reference answers are read and none is given",
        integer(0), (20, "max_new_tokens{}"), **_ASKED)
    max_context_length: int | None = setting(None,
        "cut contexts to so many tokens; by default to what the model can take", POSITIVE, (2, "max_context{}"),
        **_ASKED)
    query_aware: bool = setting(False,
        "let the press see the question: put it into the context", None, (3, "query_aware"), **_ASKED)
    needle_depth: list[int] | None = setting(None,  # noqa: RUF009
        "needle_in_haystack: where the needle is, in percent; one or more", integer(0, 100),
        (5, lambda depths: f"needle_depth{'-'.join(map(str, depths))}"), datasets=("needle_in_haystack",))
    compression_interval: int | None = setting(None,
        "DecodingPress: steps between two evictions", POSITIVE, (21, "compression_interval{}"),
        press=DecodingPress, eviction="moment")
    target_size: int | None = setting(None,
        "DecodingPress: positions that an eviction leaves", POSITIVE, (22, "target_size{}"),
        press=DecodingPress, eviction="amount")
    hidden_states_buffer_size: int | None = setting(None,
        "DecodingPress: steps whose hidden states are kept for the scores", integer(0),
        (23, "hidden_states_buffer_size{}"), press=DecodingPress, eviction="moment")
    output_dir: str = setting("results", "where the folder with the results goes", **_HOW)
    log_level: str = setting("INFO", "DEBUG, INFO, WARNING or ERROR", **_HOW)
    model_kwargs: dict[str, Any] | str | None = setting(None,  # noqa: RUF009
        """more arguments for from_pretrained, as JSON or YAML, for instance '{"dtype": "bfloat16"}'""",
        None, (40, _parts))
    trust_remote_code: bool = setting(False, "let the model's repository run code of its own", is_measured=False)
    seed: int = setting(42, "draws samples and whatever a press draws", integer(0, 2**32 - 1), (33, "seed{}"))
    fp8: bool = setting(False, "quantize the weights to FP8 (needs a GPU)", None, (41, "fp8"))

    similarity_threshold: float | None = setting(None,
        "merging presses: min cosine similarity for a merge, in [0, 1]", None, (10, "similarity_threshold{:g}"),
        **_MERGING)
    merge_keys: bool | None = setting(None,
        "merging presses: blend keys too", None, (11, _switch("merge_keys")), **_MERGING)
    value_norm_weighting: bool | None = setting(None,
        "merging presses: scale a merge by the evicted value's share of both norms", None,
        (12, _switch("value_norm_weighting")), **_MERGING)
    max_merge_per_token: int | None = setting(None,
        "merging presses: max that one survivor takes; 0 is no limit", None, (13, "max_merge_per_token{:g}"),
        **_MERGING)
    merge_fraction: float | None = setting(None,
        "merging presses: share of the evicted that is merged, in (0, 1]", None, (14, "merge_fraction{:g}"),
        **_MERGING)
    n_queries: int | None = setting(None,
        "matching presses: reference queries of each KV head, at least 1", None, (15, "n_queries{:g}"), **_MATCHING)
    key_ridge: float | None = setting(None,
        "matching presses: how strongly keys are held where they were, above 0", None, (16, "key_ridge{:g}"),
        **_MATCHING)

    tasks: list[str] | None = setting(None,  # noqa: RUF009
        "ruler, ruler-synthetic: these tasks only; by default all", None, (30, "-".join),
        datasets=("ruler", "ruler-synthetic"))
    n_samples: int = setting(25,
        "ruler-synthetic: samples of each task; fidelity: windows", POSITIVE, (31, "n_samples{}"), datasets=MADE_HERE)
    n_questions: int = setting(1,
        "ruler-synthetic: questions about each context", POSITIVE, (37, "n_questions{}"), datasets=("ruler-synthetic",))
    text_file: str | None = setting(None,
        "fidelity: UTF-8 text to measure on; ruler-synthetic: to hide needles in; by default built in", None,
        (34, _stem), datasets=MADE_HERE)
    squad_file: str | None = setting(None,
        "ruler-synthetic: SQuAD's JSON file, for the task qa_1", None, (35, _stem), datasets=("ruler-synthetic",))
    hotpotqa_file: str | None = setting(None,
        "ruler-synthetic: HotpotQA's JSON file, for the task qa_2", None, (36, _stem), datasets=("ruler-synthetic",))
    answer_kl: bool = setting(False,
        "measure the KL from the full cache too, with one more prefill a context, which cells of a sweep share", None,
        (24, "answer_kl"), **_ASKED)
    continuation_length: int = setting(129,
        "fidelity: tokens that follow a context; all but the first are scored", integer(2),
        (32, "continuation_length{}"), datasets=("fidelity",))
    quiet: bool = setting(False, "no progress bars, only warnings", **_HOW)
    # fmt: on

    press_init_command: str | None = field(default=None, init=False, metadata={"setting": Setting(**_HOW)})

    def __post_init__(self) -> None:
        self.log_level = str(self.log_level).upper()
        for name, valid in (("dataset", DATASETS), ("log_level", _LOG_LEVELS)):
            if (value := getattr(self, name)) not in valid:
                raise ValueError(f"--{name}: there is no {value!r}{closest(str(value), valid)}")
        for name, about in SETTINGS.items():
            if about.datasets and self.dataset not in about.datasets and getattr(self, name) != FIELDS[name].default:
                useful = ", ".join(sorted(about.datasets))
                raise ValueError(f"--{name} is of no use for the dataset {self.dataset}, only for {useful}")
        self._fill_in()
        for name in SETTINGS:
            self._check(name)
        if self.dataset == "needle_in_haystack":
            for name in ("needle_depth", "max_context_length"):
                if getattr(self, name) is None:
                    raise ValueError(f"the dataset needle_in_haystack needs --{name}")

    def folder_name(self) -> str:
        """
        The name that kvpress's evaluation gives to the folder of the results, and after it what kvpress does not know.

        What has its default value is left out: for a field of our presses, the press's own.
        """
        levels = (self.threshold, self.head_compression_ratio, self.compression_ratio)
        level = next(value for value in levels if value is not None)
        parts = [self.dataset, self.data_dir, self.model, self.press_name, f"{level:.2f}"]
        for _, form, name in sorted((*about.folder, name) for name, about in SETTINGS.items() if about.folder):
            value = getattr(self, name)
            if value is not None and value != default_of(name):
                parts.append(form.format(value) if isinstance(form, str) else form(value))
        name = "__".join(part.replace("/", "--") for part in parts if part)
        if len(name.encode()) > _MAX_NAME_BYTES:
            digest = hashlib.sha256(name.encode()).hexdigest()[:16]
            name = f"{name.encode()[:_MAX_NAME_BYTES].decode(errors='ignore')}-{digest}"
        return name

    def save(self, file: Path, versions: dict[str, str]) -> None:
        """Write the configuration as YAML, as kvpress's evaluation does, and ``versions``: name to what was used."""
        record = {**self.record(), "versions": versions}
        file.write_text(yaml.safe_dump(record, sort_keys=False, allow_unicode=True), encoding="utf-8")

    def record(self) -> dict[str, Any]:
        """The settings as a saved configuration has them: without a ratio where something else takes its place."""
        record = {name: getattr(self, name) for name in SETTINGS}
        if self.threshold is not None or self.head_compression_ratio is not None:
            del record["compression_ratio"]
        for name in ("threshold", "head_compression_ratio"):
            if record[name] is None:
                del record[name]
        if self.needle_depth is not None and len(self.needle_depth) == 1:
            record["needle_depth"] = self.needle_depth[0]
        return record

    def _fill_in(self) -> None:
        for name in ("data_dir", "model", "output_dir", "text_file", "squad_file", "hotpotqa_file"):
            if getattr(self, name) is not None:
                setattr(self, name, str(getattr(self, name)))
        if self.press_name == NO_PRESS:
            self.compression_ratio = 0.0
        if self.dataset in MADE_HERE:
            self.data_dir = DEFAULT_LENGTH if self.data_dir is None else self.data_dir
            if not self.data_dir.isdecimal() or int(self.data_dir) == 0:
                raise ValueError(
                    f"--data_dir of the dataset {self.dataset} must be a number of tokens, got {self.data_dir!r}"
                )
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

    def _check(self, name: str) -> None:
        """Raise a ValueError if a value is not of a type or in a range that is allowed, or a file is not there."""
        value, default = getattr(self, name), FIELDS[name].default
        # A type is its text, or what HfArgumentParser has made of that. An optional setting may be None.
        if "bool" in str(FIELDS[name].type) and not isinstance(value, (bool, type(default))):
            raise ValueError(f"--{name} must be true or false, got {value!r}")
        if value is None:
            return
        if name == "tasks" and not (isinstance(value, list) and value and all(isinstance(task, str) for task in value)):
            raise ValueError(f"--tasks must be names of tasks, got {value!r}")
        if name.endswith("_file") and not Path(value).expanduser().is_file():
            raise ValueError(f"--{name}: there is no file {value!r}")
        if allowed := SETTINGS[name].allowed:
            for number in value if isinstance(value, list) and name == "needle_depth" else [value]:
                if isinstance(number, bool) or not isinstance(number, (int, float)) or not allowed[1](number):
                    raise ValueError(f"--{name} must be {allowed[0]}, got {number!r}")


FIELDS = {each.name: each for each in dataclasses.fields(EvaluationConfig)}
SETTINGS: dict[str, Setting] = {name: each.metadata["setting"] for name, each in FIELDS.items()}


def settings_that(are: Callable[[Setting], Any]) -> tuple[str, ...]:
    """Names of the settings of which something holds, in the order of the fields."""
    return tuple(name for name, about in SETTINGS.items() if are(about))


PRESS_FIELDS = settings_that(lambda about: about.press and issubclass(about.press, MergeOnEvictPress))
"""Fields of our presses, by the same names."""

EVICTION_SETTINGS = settings_that(lambda about: about.eviction)
"""Settings that say when and how much a press evicts. Each reaches presses of one kind only."""


def default_of(name: str) -> Any:
    """What a setting is where nobody sets it: for a field of our presses, the press's own."""
    return getattr(SETTINGS[name].press, name) if name in PRESS_FIELDS else FIELDS[name].default


def measured_settings(record: dict[str, Any]) -> dict[str, Any]:
    """Of a saved configuration, what says what is measured and is not default: equal where the same is measured."""
    told = [name for name in record if name not in RECORDED and SETTINGS.get(name, Setting()).is_measured]
    defaults = {name: default_of(name) for name in told if name in SETTINGS}
    return {name: record[name] for name in told if record[name] not in (None, {}, defaults.get(name))}
