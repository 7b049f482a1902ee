# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
Runs kvpress's own evaluate.py with our registry, in a process of its own: its modules' names clash with others.

Arguments: the ``evaluation`` folder of kvpress's source, a folder with a tiny model, a folder for results, and a JSON
list of configurations. Prints a JSON line with both registries, and then one for each configuration: the folder that
was written and what became of the press.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import transformers.utils.import_utils  # noqa: F401 (looks for what is stood in for below)

evaluation_folder, model_folder, output_folder, configurations = sys.argv[1:]
sys.path.insert(0, evaluation_folder)
# Libraries of benchmarks that are not run here.
for name in ("rouge", "jieba", "fuzzywuzzy", "bert_score", "nltk", "nltk.translate", "nltk.translate.bleu_score"):
    sys.modules.setdefault(name, mock.MagicMock())
for name in ("nltk.tokenize", "nltk.translate.meteor_score", "rouge_score", "evaluate_metric", "math_verify"):
    sys.modules.setdefault(name, mock.MagicMock())

import evaluate  # noqa: E402
from datasets import Dataset  # noqa: E402
from every_press import LocalDuoAttentionPress  # noqa: E402
from kvpress import BasePress, DMSPress, KnormPress  # noqa: E402

from kvpress_merging import PRESS_REGISTRY, MergingPress  # noqa: E402


def settings(press):
    """A press's class and configuration, and those of the presses inside, as JSON."""
    if isinstance(press, (list, tuple)):
        return [settings(item) for item in press]
    if not isinstance(press, BasePress):
        return press if isinstance(press, (str, int, float, bool, type(None))) else str(press)
    return {"class": type(press).__name__} | {name: settings(value) for name, value in vars(press).items()}


theirs = {name: settings(press) for name, press in evaluate.PRESS_REGISTRY.items()}
ours = {name: settings(press.press) for name, press in PRESS_REGISTRY.items()}
print(json.dumps({"theirs": theirs, "ours": ours}))

evaluate.PRESS_REGISTRY |= PRESS_REGISTRY
evaluate.PRESS_REGISTRY["merging_dms_knorm"] = MergingPress(DMSPress(KnormPress(), sliding_window_size=16))
evaluate.PRESS_REGISTRY["merging_duo_attention"] = MergingPress(LocalDuoAttentionPress())

CONTEXT = "the quick brown fox jumps over the lazy dog while many other animals look on in wonder " * 2
ROWS = [
    {
        "context": CONTEXT,
        "question": question,
        "answer_prefix": "",
        "answer": ["fox"],
        "max_new_tokens": 3,
        "task": "niah",
    }
    for question in ("a", "b")
]
evaluate.load_dataset = lambda *args, **kwargs: Dataset.from_list(ROWS)

for configuration in json.loads(configurations):
    config = evaluate.EvaluationConfig(
        dataset="ruler", model=model_folder, device="cpu", output_dir=output_folder, log_level="ERROR", **configuration
    )
    runner = evaluate.EvaluationRunner(config)
    runner.run_evaluation()
    inner = runner.press.press
    (folder,) = [path.parent for path in Path(output_folder).rglob("metrics.json") if config.press_name in str(path)]
    print(
        json.dumps(
            {
                "folder": str(folder),
                "press": type(runner.press).__name__,
                "inner": type(inner).__name__,
                "threshold": getattr(inner, "threshold", None),
                "head_compression_ratio": getattr(inner, "head_compression_ratio", None),
                "merged": sum(row["merged"] for row in runner.press.report.to_dict().values()),
            }
        )
    )
