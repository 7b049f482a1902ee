# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Folders as runs leave them, with scores that a test has thought up."""

import json

import pandas as pd

from evaluation.config import EvaluationConfig

VERSIONS = {"python": "3.11", "torch": "2.13.0", "kvpress": "0.5.5", "kvpress-merging": "0.1.0"}


def write_run(
    root,
    press_name,
    press,
    scores,
    *,
    seconds=0.5,
    identity="a",
    said="1",
    nll=None,
    n_questions=1,
    versions=VERSIONS,
    **settings,
):
    """A run's folder; ``scores`` is a mapping of tasks to lists, or the KLs of windows; ``nll`` has one a sample."""
    is_fidelity = not isinstance(scores, dict)
    config = EvaluationConfig(
        dataset="fidelity" if is_fidelity else "ruler-synthetic",
        press_name=press_name,
        output_dir=root,
        n_questions=n_questions,
        **settings,
    )
    rows = []
    for task, values in {"fidelity": scores}.items() if is_fidelity else scores.items():
        for score in values:
            row = {"sample": len(rows), "task": task, "compression_ratio": config.compression_ratio}
            if is_fidelity:
                row |= {"start": 100 * len(rows), "kl": score, "nll": 2 + score, "nll_full": 2.0}
                row |= {"top1_agreement": 1 - score, "attention_error": score / 2, "prefill_seconds": seconds}
            else:
                row |= {"question": "?", "answer": json.dumps([identity]), "predicted_answer": said}
                row |= {"seconds": seconds, "string_match": score}
                if n_questions > 1:
                    row |= {"context_number": len(rows) // n_questions, "turn": len(rows) % n_questions + 1}
            if nll is not None:
                row["answer_nll"] = nll[len(rows)]
            rows.append(row)
    predictions = pd.DataFrame(rows)
    names = ["kl", "nll", "nll_full", "top1_agreement", "attention_error"] if is_fidelity else ["string_match"]
    names += ["answer_nll"] if nll is not None else []
    metrics = {task: group[names].mean().to_dict() for task, group in predictions.groupby("task")}
    folder = root / config.folder_name()
    number = 0
    while folder.exists():
        number += 1
        folder = root / config.folder_name() / str(number)
    folder.mkdir(parents=True)
    config.press_init_command = str(press)
    config.save(folder / "config.yaml", versions)
    predictions.to_csv(folder / "predictions.csv", index=False)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder
