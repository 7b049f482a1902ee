# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Datasets from the Hugging Face hub, or the same files in a local folder."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

REPOSITORIES = {
    "ruler": "simonjegou/ruler",
    "longbench": "Xnhyacinth/LongBench",
    "needle_in_haystack": "alessiodevoto/paul_graham_essays",
}
"""Name of a dataset to its repository: those of kvpress's evaluation."""


class DatasetUnavailableError(RuntimeError):
    """A dataset could not be fetched or read. The message says which and what can be done."""


def load_hub_dataset(name: str, data_dir: str | None, columns: tuple[str, ...], *, quiet: bool = False) -> pd.DataFrame:
    """
    Read the test split of one of ``REPOSITORIES``, lists as Python lists.

    ``data_dir`` is the repository's folder to read (for ``ruler`` the length, for ``longbench`` the task), or a folder
    on this machine with the dataset's parquet files. A DatasetUnavailableError says if it cannot be read, or lacks one
    of the columns.
    """
    # A late import: it takes a second that the datasets made here do without.
    from datasets import disable_progress_bars, load_dataset

    if quiet:
        disable_progress_bars()
    repository = REPOSITORIES[name]
    folder = None if data_dir is None else Path(data_dir).expanduser()
    try:
        if folder is not None and folder.is_dir():
            source = str(folder)
            dataset = load_dataset(source, split="test")
        else:
            source = repository if data_dir is None else f"{repository}, {data_dir}"
            dataset = load_dataset(repository, data_dir=data_dir, split="test")
    # Many kinds of errors, from several libraries, that differ between versions; all say that the data are not there.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DatasetUnavailableError(
            f"could not load the dataset {name!r} ({source}): {reason}. Check --data_dir and the network, or give a "
            "local folder with its parquet files as --data_dir; 'ruler-synthetic' and 'fidelity' need no download."
        ) from error
    if missing := [column for column in columns if column not in dataset.column_names]:
        raise DatasetUnavailableError(
            f"the dataset {name!r} ({source}) lacks the columns {', '.join(missing)}; it has "
            f"{', '.join(dataset.column_names)}"
        )
    # Not to_pandas: it makes arrays of lists.
    return pd.DataFrame(dataset.to_list())
