# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Measure many configurations on the workers of a Ray cluster."""

from __future__ import annotations

import logging
import os
import traceback
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kvpress_merging
from evaluation.config import EvaluationConfig
from evaluation.sweep.here import Failed, Measured, Outcomes, RunnerError, Worker


def run_on_ray(
    cells: Sequence[EvaluationConfig], threads: int, address: str | None = None, num_workers: int | None = None
) -> Outcomes:
    """
    Measure cells on the workers of a Ray cluster, each with a model and so many threads of its own.

    They come in the order in which they are ready. A worker that dies has failed its cell, and another takes its place.

    Without the address of a cluster that is there, one is started on this machine, and ended in the end. By default
    there is a worker for each GPU, or where there is none, as many as have their threads on cores of their own. A
    RunnerError says if Ray is not installed, there is no such cluster, or no worker starts.
    """
    try:
        import ray
    except ImportError as error:
        raise RunnerError("--runner ray needs ray: pip install 'kvpress-merging[ray]'") from error
    try:
        if address is None:
            ray.init("local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        else:
            # The machines of the cluster need not have these packages.
            packages = [str(Path(__file__).parents[1]), str(Path(kvpress_merging.__file__).parent)]
            ray.init(address, runtime_env={"py_modules": packages}, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        # Ray tells of a wrong token in its own log alone.
        hint = "" if address is None else "; a cluster that asks for a token needs RAY_AUTH_MODE=token set here as well"
        raise RunnerError(f"cannot reach a Ray cluster at {address or 'this machine'}: {error}{hint}") from error
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        count, resources = _share_out(nodes, len(cells), threads, num_workers)
        actor_class = ray.remote(Worker).options(**resources)
        yield from _spread(cells, lambda: actor_class.remote(threads, os.getcwd()), count)
    finally:
        ray.shutdown()


def _share_out(
    nodes: Sequence[dict[str, float]], n_cells: int, threads: int, num_workers: int | None
) -> tuple[int, dict[str, float]]:
    """How many workers there are, and what each takes of the cluster."""
    n_gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if n_gpus:
        if num_workers is not None and num_workers > n_gpus:
            raise RunnerError(f"--num_workers must be at most {n_gpus}, one for each GPU, got {num_workers}")
        return min(num_workers or n_gpus, n_cells), {"num_gpus": 1, "num_cpus": 1}
    cpus = [node.get("CPU", 0) for node in nodes]
    count = min(num_workers or max(1, sum(int(cpu // threads) for cpu in cpus)), n_cells)
    share = min(threads, sum(cpus) / count)
    # Ray takes whole CPUs, or a part of one.
    return count, {"num_cpus": int(share) if share >= 1 else int(share * 1000) / 1000}


def _spread(cells: Sequence[EvaluationConfig], make_worker: Any, count: int) -> Outcomes:
    import ray

    waiting = deque(cells)
    starting = {worker.start.remote(): worker for worker in (make_worker() for _ in range(count))}
    running: dict[Any, tuple[Any, EvaluationConfig]] = {}
    while waiting or running:
        (ready,), _ = ray.wait([*starting, *running], num_returns=1)
        outcome: Measured | Failed | None = None
        worker, config = (starting.pop(ready), None) if ready in starting else running.pop(ready)
        try:
            outcome = ray.get(ready)
        except ray.exceptions.RayError as error:
            if config is None:
                if not starting and not running:
                    raise RunnerError(f"no worker starts on the Ray cluster: {error}") from error
                continue
            outcome = Failed(f"the worker died: {type(error).__name__}: {error}", traceback.format_exc())
            worker = make_worker()
            starting[worker.start.remote()] = worker
        else:
            if waiting:
                following = waiting.popleft()
                running[worker.measure.remote(following)] = (worker, following)
        if config is not None and outcome is not None:
            yield config, outcome
