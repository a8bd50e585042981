"""The cluster is looked at before a run starts: nodes that are there count, dead ones do not."""

from __future__ import annotations

import pytest
from toys import make_config

from llkd_ray import cluster
from llkd_ray.cluster import check_fit
from llkd_ray.config import ConfigError

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


def test_all_living_nodes_count(nodes):
    nodes += [node(CPU=1.0), node(CPU=1.0)]
    check_fit(LARGE)


def test_a_dead_node_does_not(nodes):
    nodes += [node(CPU=1.0), node(alive=False, CPU=1.0)]
    with pytest.raises(ConfigError, match=r"= 1\.55 CPUs, but the cluster has 1 on 1 node\(s\)"):
        check_fit(LARGE)


def test_a_head_without_cpus_is_no_place(nodes):
    nodes += [node(), node(CPU=1.0)]
    with pytest.raises(ConfigError, match=r"but the cluster has 1 on 2 node\(s\)"):
        check_fit(LARGE)


def test_where_nodes_may_still_come_nothing_is_refused(nodes, monkeypatch):
    monkeypatch.setenv("LLKD_AUTOSCALING", "1")
    check_fit(LARGE)
