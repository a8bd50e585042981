"""What doctor says of Ray: tokens, addresses that do not answer, and room; a real cluster: tests/cluster."""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path

import pytest
from toys import make_config

from llkd_ray.doctor.cluster import (
    View,
    _join_problem,
    check_cluster_resources,
    check_ray,
    check_shared_folders,
    check_token,
    cluster_address,
    describe,
    query_cluster,
)
from llkd_ray.doctor.findings import Finding
from llkd_ray.doctor.findings import describe as describe_finding

# --- the token


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".ray").mkdir()
    return tmp_path


def token_file(folder: Path, content: str = "secret", mode: int = 0o600) -> str:
    file = folder / ".ray" / "auth_token"
    file.write_text(content)
    file.chmod(mode)
    return str(file)


def told(finding: Finding | None, state: str, *words: str) -> None:
    """It is of this state, its line holds the words, and no secret stands there."""
    assert finding is not None
    assert finding.state == state, finding
    assert [word for word in words if word not in describe_finding(finding)] == [], finding
    assert "secret" not in finding.found + finding.remedy


def token(home: Path, joins: bool = True, **environ: str) -> Finding:
    return check_token({"HOME": str(home), **environ}, joins=joins)


def test_a_token_that_is_used_or_not_needed(home):
    told(token(home), "ok")  # the cluster may ask for none
    told(token(home, joins=False, RAY_AUTH_MODE="token"), "ok")  # Ray makes one
    told(token(home, RAY_AUTH_TOKEN="secret", RAY_AUTH_TOKEN_PATH="/nowhere/at-all"), "ok")
    token_file(home)
    told(token(home, RAY_AUTH_MODE="token"), "ok")
    token_file(home, mode=0o644)
    told(token(home, RAY_AUTH_MODE="Disabled"), "ok")


def test_a_token_that_is_missing(home):
    remedy = "ray get-auth-token --generate"
    told(token(home, RAY_AUTH_MODE="token"), "problem", str(home / ".ray/auth_token"), remedy)
    told(token(home, RAY_AUTH_MODE="tokens", RAY_AUTH_TOKEN="x"), "problem", "'tokens'")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_token_that_others_may_read(home, mode):
    file = token_file(home, mode=mode)
    told(token(home), "warning", f"{mode:04o}", f"; to do: chmod 600 {file}")


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_a_path_that_leads_to_no_token(home, content):
    token_file(home)  # which Ray does not read then
    other = home / "token"
    if content is not None:
        other.write_text(content)
    told(token(home, RAY_AUTH_TOKEN_PATH=str(other)), "problem", f"RAY_AUTH_TOKEN_PATH is {str(other)!r}")


# --- addresses


def test_the_config_goes_before_the_environment():
    config = make_config(run={"address": "a:1"})
    assert cluster_address(config, {"RAY_ADDRESS": "b:2"}) == ("a:1", "run.address")
    assert cluster_address(make_config(), {"RAY_ADDRESS": "b:2"}) == ("b:2", "RAY_ADDRESS")
    assert cluster_address(None, {})[0] is None
    assert cluster_address(None, {"RAY_ADDRESS": "local"})[0] is None


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:8265", "is a dashboard's address"),
        ("127.0.0.1", "is no address"),
        ("127.0.0.1:port", "is no address"),
        ("no-such-host.invalid:6379", "does not answer"),
        ("127.0.0.1:99999", "does not answer"),
        ("127.0.0.1:CLOSED", "does not answer"),
    ],
)
def test_an_address_that_cannot_be(address, words):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = address.replace("CLOSED", str(one.getsockname()[1]))
    view = query_cluster(address, "RAY_ADDRESS", {})
    told(view.problem, "problem", f"RAY_ADDRESS {address!r} {words}", "; to do: ")


@pytest.mark.timeout(120)
def test_something_else_listens_and_says_nothing(tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        view = query_cluster(address, "RAY_ADDRESS", {"HOME": str(tmp_path)}, join_s=8.0)
    told(view.problem, "problem", "does not answer as a Ray cluster in 8 s", "HOST:PORT")


def test_what_ray_says_of_versions_is_told_in_its_words():
    said = "Version mismatch: The cluster was started with: Ray: 2.59.0 Python: 3.11.7"
    told(_join_problem("RAY_ADDRESS 'h:1'", "RuntimeError", said, ""), "problem", said)


@pytest.mark.timeout(120)
def test_without_an_address_it_is_this_machine(tmp_path):
    view = query_cluster(None, "RAY_ADDRESS", dict(os.environ))
    assert view.problem is None
    assert view.nodes[0]["CPU"] >= 1
    assert "a run starts Ray on this machine" in check_ray(None, "RAY_ADDRESS", lambda: view).found


@pytest.mark.timeout(120)
def test_a_ray_that_cannot_be_imported(tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError('libray is broken')\n")
    hook = tmp_path / "sitecustomize.py"  # as a broken installation: before everything else on the path
    hook.write_text(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n")
    view = query_cluster(None, "RAY_ADDRESS", {**os.environ, "PYTHONPATH": str(tmp_path)})
    told(view.problem, "problem", "libray is broken")


# --- room


def room(config, nodes, **environ):
    look = functools.cache(lambda: View("2.60.0", tuple(nodes)))
    return check_cluster_resources(config, environ, look)


def test_room_is_judged_by_a_runs_own_sums():
    config = make_config(student={"workers": 2, "gpus": 1})
    said = "2 student rank(s) need 2 = 2 GPUs, but the cluster has 1"
    told(room(config, [{"CPU": 8.0, "GPU": 1.0}]), "problem", "student.gpus", said)
    told(room(config, [{"CPU": 8.0, "GPU": 2.0}]), "ok")
    told(room(config, [], LLKD_AUTOSCALING="1"), "ok")
    lost = View(problem=query_cluster("nowhere", "RAY_ADDRESS", {}).problem)
    assert check_cluster_resources(config, {}, lambda: lost) is None, "room that is not there is not judged"


def test_nodes_in_words():
    nodes = (
        {"CPU": 2.0, "node:10.0.0.1": 1.0, "memory": 1e9, "object_store_memory": 1e9},
        {"CPU": 4.0, "GPU": 1.0},
    )
    assert describe(View("2.60.0", nodes)) == "2 node(s), 6 CPU, 1 GPU"


def test_folders_of_one_machine_on_a_cluster_of_several(tmp_path):
    sources = {"corpus": {"uri": "s3://bucket/pool.parquet"}, "test": {"uri": "gold.csv"}}
    config = make_config(**sources, student={"model": str(tmp_path)}, run={"dir": "/runs"})
    alone, two = View(nodes=({"CPU": 1.0},)), View(nodes=({"CPU": 1.0}, {"CPU": 1.0}))
    assert check_shared_folders(config, lambda: alone) is None
    named = f"run.dir '/runs', test.uri 'gold.csv', student.model '{tmp_path}'"
    told(check_shared_folders(config, lambda: two), "warning", named)
    shared = {"test": None, "student": {"model": "m"}, "run": {"dir": "s3://b/r"}}
    told(check_shared_folders(make_config(corpus=sources["corpus"], **shared), lambda: two), "ok")
