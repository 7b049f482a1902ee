# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
Compile the Triton kernel for GPUs that need not be there, assemble it, and print what ptxas says, as JSON.

Run it in a process of its own, without TRITON_INTERPRET: ``python tests/kernels/compile_for_gpus.py``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from inspect import signature as signature_of
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler
from triton.compiler import ASTSource

from kvpress_merging.kernels.nearest_triton import first_best_kernel, launch_options

CAPABILITIES = (80, 90, 100)
HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
TENSOR_CORE_INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
KEYS = ("queries", "survivors")
POINTERS = {"scales": "fp32", "counts": "i32", "best": "fp32", "index": "i32"}


def compile_one(capability: int, dtype: torch.dtype, head_dim: int) -> dict:
    """Registers, spilled bytes, shared memory and tensor-core instructions of one variant."""
    options = launch_options(dtype, head_dim)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    constants = {
        **options,
        "HEAD_DIM": head_dim,
        "N_CHANNELS": head_dim + 8,
        "HAS_SCALES": dtype != torch.float32,
        "AS_FLOAT32": False,
    }
    names = first_best_kernel.arg_names
    signature = {**dict.fromkeys(names, "i32"), **dict.fromkeys(constants, "constexpr")}
    pointers = {**dict.fromkeys(KEYS, DTYPES[dtype]), **POINTERS}
    signature |= {name: f"*{of}" for name, of in pointers.items()}
    # As at a launch, where PyTorch's memory is aligned.
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(first_best_kernel, signature, {(names.index(n),): c for n, c in constants.items()}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    ptx = compiled.asm["ptx"]
    (architecture,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        # Which of its assemblers Triton takes for a GPU, if it has more than one.
        ptxas = compiler.get_ptxas(capability) if signature_of(compiler.get_ptxas).parameters else compiler.get_ptxas()
        command = [ptxas.path, "-v", f"-arch={architecture}", str(file), "-o", str(Path(folder, "kernel.cubin"))]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", report)
    ((stored, loaded),) = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    return {
        "capability": capability,
        "dtype": DTYPES[dtype],
        "head_dim": head_dim,
        "registers": int(registers),
        "spilled_bytes": int(stored) + int(loaded),
        "shared_bytes": compiled.metadata.shared,
        "tensor_core_instructions": {name: ptx.count(name) for name in TENSOR_CORE_INSTRUCTIONS if name in ptx},
        "warps": launch["num_warps"],
    }


if __name__ == "__main__":
    # float16 differs from bfloat16 in the names of instructions alone: once is enough.
    kinds = [(dtype, d) for dtype in (torch.bfloat16, torch.float32) for d in HEAD_DIMS] + [(torch.float16, 128)]
    variants = [(capability, *kind) for capability in CAPABILITIES for kind in kinds]
    json.dump([compile_one(*variant) for variant in variants], sys.stdout, indent=1)
