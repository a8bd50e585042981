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

# --- the token


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".ray").mkdir()
    return tmp_path


def token_file(folder: Path, content: str = "abc", mode: int = 0o600) -> str:
    file = folder / ".ray" / "auth_token"
    file.write_text(content)
    file.chmod(mode)
    return str(file)


def token(home: Path, joins: bool = True, **environ: str):
    return check_token({"HOME": str(home), **environ}, joins=joins)


def test_a_token_that_is_used_or_not_needed(home):
    assert token(home).state == "ok", "the cluster may ask for none"
    assert token(home, joins=False, RAY_AUTH_MODE="token").state == "ok", "Ray makes one"
    finding = token(home, RAY_AUTH_TOKEN="secret", RAY_AUTH_TOKEN_PATH="/nowhere/at-all")
    assert (finding.state, "secret" in finding.found) == ("ok", False)
    token_file(home)
    assert token(home, RAY_AUTH_MODE="token").state == "ok"
    token_file(home, mode=0o644)
    assert token(home, RAY_AUTH_MODE="Disabled").state == "ok"


def test_a_token_that_is_missing(home):
    finding = token(home, RAY_AUTH_MODE="token")
    assert finding.state == "problem"
    assert str(home / ".ray/auth_token") in finding.found
    assert "ray get-auth-token --generate" in finding.remedy
    finding = token(home, RAY_AUTH_MODE="tokens", RAY_AUTH_TOKEN="x")
    assert (finding.state, "'tokens'" in finding.found) == ("problem", True)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_token_that_others_may_read(home, mode):
    file = token_file(home, mode=mode)
    finding = token(home)
    assert (finding.state, finding.remedy) == ("warning", f"chmod 600 {file}")
    assert f"{mode:04o}" in finding.found
    assert "abc" not in finding.found


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_a_path_that_leads_to_no_token(home, content):
    token_file(home)  # which Ray does not read then
    other = home / "token"
    if content is not None:
        other.write_text(content)
    finding = token(home, RAY_AUTH_TOKEN_PATH=str(other))
    assert finding.state == "problem"
    assert f"RAY_AUTH_TOKEN_PATH is {str(other)!r}" in finding.found


# --- addresses


def test_the_config_goes_before_the_environment():
    config = make_config(run={"address": "a:1"})
    assert cluster_address(config, {"RAY_ADDRESS": "b:2"}) == ("a:1", "run.address")
    assert cluster_address(make_config(), {"RAY_ADDRESS": "b:2"}) == ("b:2", "RAY_ADDRESS")
    assert cluster_address(None, {})[0] is None
    assert cluster_address(None, {"RAY_ADDRESS": "local"})[0] is None


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:8265", "is a dashboard's address"),
        ("127.0.0.1", "is no address"),
        ("127.0.0.1:port", "is no address"),
        ("no-such-host.invalid:6379", "does not answer"),
        ("127.0.0.1:99999", "does not answer"),
    ],
)
def test_an_address_that_cannot_be(address, words):
    view = query_cluster(address, "RAY_ADDRESS", {})
    assert view.problem is not None
    assert f"RAY_ADDRESS {address!r} {words}" in view.problem.found
    assert view.problem.remedy


def test_nobody_listens():
    address = f"127.0.0.1:{closed_port()}"
    view = query_cluster(address, "run.address", {})
    assert view.problem.state == "problem"
    assert f"run.address {address!r} does not answer" in view.problem.found
    assert "refused" in view.problem.found


@pytest.mark.timeout(120)
def test_something_else_listens_and_says_nothing(tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        view = query_cluster(address, "RAY_ADDRESS", {"HOME": str(tmp_path)}, join_s=8.0)
    assert "does not answer as a Ray cluster in 8 s" in view.problem.found
    assert "HOST:PORT" in view.problem.remedy


def test_what_ray_says_of_versions_is_told_in_its_words():
    said = "Version mismatch: The cluster was started with: Ray: 2.59.0 Python: 3.11.7"
    finding = _join_problem("RAY_ADDRESS 'h:1'", "RuntimeError", said, "")
    assert (finding.state, said in finding.found) == ("problem", True)


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
    assert view.problem.state == "problem"
    assert "libray is broken" in view.problem.found


# --- room


def room(config, nodes, **environ):
    look = functools.cache(lambda: View("2.60.0", tuple(nodes)))
    return check_cluster_resources(config, environ, look)


def test_room_is_judged_by_a_runs_own_sums():
    config = make_config(student={"workers": 2, "gpus": 1})
    finding = room(config, [{"CPU": 8.0, "GPU": 1.0}])
    assert finding.state == "problem"
    assert "student.gpus" in finding.found
    assert "2 student rank(s) need 2 = 2 GPUs, but the cluster has 1" in finding.found
    assert room(config, [{"CPU": 8.0, "GPU": 2.0}]).state == "ok"
    assert room(config, [], LLKD_AUTOSCALING="1").state == "ok"


def test_room_of_a_cluster_that_is_not_there_is_not_judged():
    lost = View(problem=query_cluster("nowhere", "RAY_ADDRESS", {}).problem)
    assert check_cluster_resources(make_config(), {}, lambda: lost) is None


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
    finding = check_shared_folders(config, lambda: two)
    assert finding.state == "warning"
    assert f"run.dir '/runs', test.uri 'gold.csv', student.model '{tmp_path}'" in finding.found
    anywhere = make_config(
        corpus=sources["corpus"], test=None, student={"model": "m"}, run={"dir": "s3://b/r"}
    )
    assert check_shared_folders(anywhere, lambda: two).state == "ok"
