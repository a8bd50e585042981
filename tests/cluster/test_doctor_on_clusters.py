"""Doctor before a real cluster with a token, and before a real object store."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos import end_head
from ports import free_ports

from llkd_ray.doctor.cluster import View, check_ray, query_cluster
from llkd_ray.doctor.inputs import check_storage

BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def head(own_cluster_env: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """A private head with a token; gives the environment of its clients, with its address."""
    home = tmp_path / "home"  # the token is kept there
    home.mkdir()
    env = {name: value for name, value in own_cluster_env.items() if not name.startswith("RAY_AUTH")}
    env |= {"RAY_AUTH_MODE": "token", "HOME": str(home)}
    subprocess.run([BIN / "ray", "get-auth-token", "--generate"], env=env, check=True, capture_output=True)
    port, client, agent = free_ports(3)
    command = [
        BIN / "ray", "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2",
        "--include-dashboard=false", "--node-ip-address=127.0.0.1", f"--port={port}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        f"--temp-dir={own_cluster_env['RAY_TMPDIR']}",
    ]  # fmt: skip
    address = f"127.0.0.1:{port}"
    with (tmp_path / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while look(address, env).problem is not None:
                assert process.poll() is None, (tmp_path / "head.log").read_text()
                assert time.monotonic() < deadline, "the head did not come up"
                time.sleep(1)
            yield env | {"RAY_ADDRESS": address}
        finally:
            end_head(process.pid)
            process.wait(timeout=60)


def look(address: str, env: dict[str, str]) -> View:
    return query_cluster(address, "RAY_ADDRESS", env)


CLAIM = """
import json, sys, ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
ray.init(address=sys.argv[1], log_to_driver=False)
key = b"CLUSTER_METADATA"
facts = json.loads(_internal_kv_get(key, namespace=b"cluster"))
_internal_kv_put(key, json.dumps(facts | {"ray_version": "2.1.0"}).encode(), True, namespace=b"cluster")
"""
"""Makes a cluster say that another version of Ray started it."""


def test_a_cluster_with_a_token(head, tmp_path):
    address = head["RAY_ADDRESS"]
    view = look(address, head)
    assert [node["CPU"] for node in view.nodes] == [2.0]
    finding = check_ray(address, "RAY_ADDRESS", lambda: view)
    assert finding.state == "ok"
    assert f"RAY_ADDRESS '{address}' answers: 1 node(s), 2 CPU" in finding.found

    wrong = look(address, head | {"RAY_AUTH_TOKEN": "of-another-cluster"}).problem
    none = look(address, head | {"HOME": str(tmp_path / "nobody")}).problem
    for finding in (wrong, none):
        assert "asks for a token, and ours is missing or wrong" in finding.found
        assert "RAY_AUTH_MODE=token" in finding.remedy
        assert "of-another-cluster" not in finding.found

    subprocess.run([sys.executable, "-c", CLAIM, address], env=head, check=True, timeout=120)
    other = look(address, head).problem
    assert other.state == "problem"
    assert "Version mismatch" in other.found
    assert "Ray: 2.1.0" in other.found
    assert "\n" not in other.found


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The options that lead to a real S3 server on this machine, with the bucket ``texts``."""
    pytest.importorskip("moto.server", reason="the dev extra is not installed")
    import pyarrow.fs as pafs

    (port,) = free_ports(1)
    keys = {
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (tmp_path / "s3.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ))
    try:
        deadline = time.monotonic() + 120
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None, (tmp_path / "s3.log").read_text()
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.1)
        options = f"?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        fs, _ = pafs.FileSystem.from_uri(f"s3://texts{options}&allow_bucket_creation=true")
        fs.create_dir("texts")
        yield options
    finally:
        process.kill()
        process.wait()


def test_an_object_store(s3):
    import pyarrow.fs as pafs

    finding = check_storage(f"s3://texts/runs{s3}")
    assert finding.state == "ok", finding
    fs, _ = pafs.FileSystem.from_uri(f"s3://texts{s3}")
    left = [
        info.path for info in fs.get_file_info(pafs.FileSelector("texts", recursive=True)) if info.is_file
    ]
    assert left == []

    finding = check_storage(f"s3://no-such-bucket/runs{s3}")
    assert finding.state == "problem"
    assert "no-such-bucket" in finding.found
    assert "bucket" in finding.remedy
    assert json.dumps(finding.found).count("\\n") == 0
