# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Measure many configurations on the workers of a Ray cluster."""

from __future__ import annotations

import logging
import os
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import kvpress_merging
from evaluation.config import EvaluationConfig
from evaluation.sweep.here import Worker, split
from evaluation.sweep.outcomes import Failed, Measured, Outcomes, Rows, RunnerError, describe


def run_on_ray(
    units: Sequence[Sequence[EvaluationConfig]],
    threads: int,
    finished: Mapping[str, Rows],
    address: str | None = None,
    num_workers: int | None = None,
) -> Outcomes:
    """
    Measure cells on the workers of a Ray cluster, each with a model and so many threads of its own.

    Units are those of ``Worker.measure``, halved where there are more workers than units; ``finished`` is what is
    measured of cells already, and whoever takes the outcomes adds to it. Where a worker dies, another takes its place
    and measures the cells one by one; one that a worker dies of alone has failed.

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
        count, resources = _share_out(nodes, sum(map(len, units)), threads, num_workers)
        actor_class = ray.remote(Worker).options(**resources)
        yield from _spread(split(units, count), lambda: actor_class.remote(threads, os.getcwd()), count, finished)
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


def _spread(
    units: Sequence[Sequence[EvaluationConfig]], make_worker: Any, count: int, finished: Mapping[str, Rows]
) -> Outcomes:
    import ray

    waiting = deque(units)
    ready: Any
    starting: dict[Any, Any] = {worker.start.remote(): worker for worker in (make_worker() for _ in range(count))}
    # What comes of the units that are being measured: of whom, and which cells have not ended.
    running: dict[Any, tuple[Any, dict[str, EvaluationConfig]]] = {}
    while waiting or running:
        (ready,), _ = ray.wait([*starting, *running], num_returns=1)
        is_new = ready in starting
        worker, cells = (starting.pop(ready), {}) if is_new else running[ready]
        try:
            if is_new:
                ray.get(ready)
            else:
                config, outcome = ray.get(next(ready))
                if isinstance(outcome, (Measured, Failed)):
                    del cells[config.folder_name()]
                yield config, outcome
                continue
        except StopIteration:
            del running[ready]
        except ray.exceptions.RayError as error:
            if is_new:
                if not starting and not running:
                    raise RunnerError(f"no worker starts on the Ray cluster: {error}") from error
                continue
            del running[ready]
            if len(cells) == 1:
                failed = Failed(f"the worker died: {describe(error)}", traceback.format_exc())
                yield from ((config, failed) for config in cells.values())
            else:
                waiting.extend([config] for config in cells.values())
            worker = make_worker()
            starting[worker.start.remote()] = worker
            continue
        if waiting:
            cells = {config.folder_name(): config for config in waiting.popleft()}
            so_far = {name: finished.get(name, {}) for name in cells}
            outcomes = worker.measure.options(num_returns="streaming").remote(list(cells.values()), so_far)
            running[outcomes] = worker, cells
