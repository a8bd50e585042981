"""The cluster is looked at before a run starts: nodes that are there count, dead ones do not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group_table
from toys import make_config

from llkd_ray import cluster
from llkd_ray.cluster import check_fit, remove_left_groups
from llkd_ray.config.base import ConfigError

LARGE = make_config(teacher={"cpus": 0.5}, student={"workers": 2, "cpus": 0.5})


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What Ray says of its nodes."""
    said: list[dict] = []
    monkeypatch.setattr(cluster.ray, "nodes", lambda: said)
    monkeypatch.delenv("LLKD_AUTOSCALING", raising=False)
    return said


def node(alive: bool = True, **resources: float) -> dict:
    return {"Alive": alive, "Resources": resources | {"memory": 1e9, "node:10.0.0.1": 1.0}}


def test_all_living_nodes_with_cpus_count_and_no_others(nodes, monkeypatch):
    nodes += [node(CPU=1.0), node(CPU=1.0)]
    check_fit(LARGE)
    for other, count in ((node(alive=False, CPU=1.0), 1), (node(), 2)):
        nodes[:] = [node(CPU=1.0), other]
        with pytest.raises(ConfigError, match=rf"1\.55 CPUs, but the cluster has 1 on {count} node\(s\)"):
            check_fit(LARGE)
    monkeypatch.setenv("LLKD_AUTOSCALING", "1")  # nodes may still come
    check_fit(LARGE)


CALL_WITHOUT_RAY = """
import llkd_ray, ray
try:
    ray.put(1)
except Exception as error:
    print("refused:", error)
assert not ray.is_initialized()
"""


@pytest.mark.timeout(120)
def test_a_call_after_the_shutdown_does_not_start_ray_again():
    """Threads of Ray Data and Ray Train outlive the driver's part of a run for a moment."""
    command = [sys.executable, "-c", CALL_WITHOUT_RAY]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert said.startswith("refused:")


OTHER_JOB = """
import sys, ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
group = ray.util.placement_group([{"CPU": 0.25}], lifetime="detached")
ray.get(group.ready())
print(group.id.hex())
"""


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_groups_that_a_dead_controller_leaves_are_removed_and_no_others():
    left = [ray.util.placement_group([{"CPU": 0.25}] * n) for n in (1, 2)]
    named = ray.util.placement_group([{"CPU": 0.25}], name="teacher-1")
    larger = ray.util.placement_group([{"CPU": 0.25}, {"CPU": 0.5}])
    ray.get([group.ready() for group in (*left, named, larger)])
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", OTHER_JOB, address]
    elsewhere = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]
    try:
        assert remove_left_groups({"CPU": 0.25}) == 2
        assert remove_left_groups({"CPU": 0.25}) == 0
        there = {group for group, facts in placement_group_table().items() if facts["state"] == "CREATED"}
        assert there == {named.id.hex(), larger.id.hex(), elsewhere}
    finally:
        for group in (named, larger, PlacementGroup(ray.PlacementGroupID(bytes.fromhex(elsewhere)))):
            ray.util.remove_placement_group(group)
