"""Corpus and run directory on an S3 server: the whole run, a killed driver, and what it costs in requests."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import yaml
from failing_store import failing
from transformers import pipeline

from llkd_ray.storage.run_dir import RunStore

pytest.importorskip("moto.server", reason="the dev extra is not installed")

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PATIENCE_S = 1500
BUCKET = "texts"
SECRET = "the-key-that-nobody-may-find"
REQUEST = re.compile(r'"(?:\x1b\[[\d;]*m)*(GET|PUT|HEAD|POST|DELETE) /(\S*) HTTP')
"""A line of the server's log, coloured by status."""
WORK = "^(?!.*(sessions|epochs)/)"
"""Not the driver's signs of life, which come by the clock."""


@dataclass
class Server:
    """A real S3 server on this machine."""

    port: int
    log: Path

    @property
    def env(self) -> dict[str, str]:
        """What a user sets to reach it."""
        return self.keys | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}

    @property
    def keys(self) -> dict[str, str]:
        """What is secret, and nothing of where the server is."""
        # The last one: on a machine that is no EC2 nobody is asked who we are.
        return {
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def options(self) -> str:
        """The server's address as options of a URI."""
        return f"?endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"

    def requests(self, pattern: str) -> Counter[str]:
        """Requests so far for targets in which the pattern is found, by what they do."""
        found: Counter[str] = Counter()
        for method, target in REQUEST.findall(self.log.read_text()):
            if re.search(pattern, target):
                found["LIST" if "list-type" in target else method] += 1
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("s3") / "requests.log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 120
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.1)
        yield Server(port, log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def bucket(server: Server, monkeypatch: pytest.MonkeyPatch) -> pafs.FileSystem:
    """The server's filesystem, with an empty bucket."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    fs, _ = pafs.FileSystem.from_uri(f"s3://{BUCKET}?allow_bucket_creation=true")
    fs.create_dir(BUCKET)
    fs.delete_dir_contents(BUCKET)
    return fs


def on_s3(settings: dict, fs: pafs.FileSystem, options: str = "") -> dict:
    """The toy settings with all that they name in the bucket."""

    def moved(uri: str) -> str:
        name = Path(uri).name
        pafs.copy_files(uri, f"{BUCKET}/in/{name}", destination_filesystem=fs)
        return f"s3://{BUCKET}/in/{name}{options}"

    recorded = settings["teacher"]["recorded"]
    return settings | {
        "corpus": settings["corpus"] | {"uri": moved(settings["corpus"]["uri"])},
        "test": settings["test"] | {"uri": moved(settings["test"]["uri"])},
        "teacher": settings["teacher"] | {"recorded": recorded | {"uri": moved(recorded["uri"])}},
        "student": settings["student"] | {"epochs": 2},  # how good it is does not matter here
        "run": {"dir": f"s3://{BUCKET}/runs{options}", "name": "run"},
    }


@dataclass
class Driver:
    """Starts jobs/distill.py, in a folder where nothing but its log may be left."""

    folder: Path
    started: list[subprocess.Popen]

    def start(self, *arguments: str, env: dict[str, str]) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "jobs/distill.py"), *arguments]
        with (self.folder / "log.txt").open("ab") as output:
            one = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=self.folder, env=env)
        self.started.append(one)
        return one

    def said(self) -> str:
        return (self.folder / "log.txt").read_text()


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    folder = tmp_path / "driver"
    folder.mkdir()
    driver = Driver(folder, [])
    yield driver
    for one in driver.started:
        one.kill()
        one.wait()


def copied_model(fs: pafs.FileSystem, target: Path) -> str:
    target.mkdir()
    pafs.copy_files(f"{BUCKET}/runs/run/model", str(target), source_filesystem=fs)
    return str(target)


def holds(store: RunStore, path: str, content: bytes) -> bool:
    with store.fs.open_input_stream(path) as stream:
        return content in stream.read()


def test_a_run_with_everything_on_s3(toy_settings, own_cluster_env, server, bucket, tmp_path, driver):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(on_s3(toy_settings, bucket)))
    before = server.requests(WORK)
    run = driver.start(str(tmp_path / "config.yaml"), env=own_cluster_env | server.env)
    assert run.wait(timeout=PATIENCE_S) == 0, driver.said()
    assert f"s3://{BUCKET}/runs/run/report.html" in driver.said()
    assert [path.name for path in driver.folder.iterdir()] == ["log.txt"], "something was written locally"
    asked = server.requests(WORK) - before  # before this test asks for anything itself

    store = RunStore(f"s3://{BUCKET}/runs/run")
    tickets = store.names("labels", ".parquet")
    labels = [row for name in tickets for row in store.read_table(f"labels/{name}")["row"].to_pylist()]
    assert len(labels) == len(set(labels)) == 500 + 120
    assert len(store.read_metrics()) == 3
    assert b"<html" in store.read_bytes("report.html")
    whole = store.fs.get_file_info(pafs.FileSelector(store.root, recursive=True))
    found = [info.path for info in whole if info.is_file and holds(store, info.path, SECRET.encode())]
    assert found == []
    assert SECRET not in driver.said()
    classify = pipeline("text-classification", model=copied_model(bucket, tmp_path / "model"))
    assert classify("anchor boat captain deck")[0]["label"] in toy_settings["labels"]["names"]

    # What grows with the run is not looked at for each of its files again.
    listed = server.requests("prefix=runs/run/labels/$")["LIST"]
    print(f"{len(tickets)} tickets: {dict(asked)}, labels/ listed {listed} times")
    assert listed <= 8
    assert sum(asked.values()) <= 25 * len(tickets) + 150 * 3


@pytest.fixture
def unsteady(server: Server) -> Iterator[Server]:
    """The server, which fails one request in twenty."""
    with failing("127.0.0.1", server.port) as front:
        yield replace(server, port=front.server_port)
        print(f"{front.failed} requests failed")
        assert front.failed > 10


@pytest.mark.long
def test_driver_killed_in_mid_run_on_an_unsteady_server(
    toy_settings, own_cluster_env, unsteady, bucket, tmp_path, driver
):
    """The server's address is in the URIs this time, not in the environment."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(on_s3(toy_settings, bucket, unsteady.options)))
    env = own_cluster_env | unsteady.keys
    store = RunStore(f"s3://{BUCKET}/runs/run")
    killed = driver.start(str(tmp_path / "config.yaml"), env=env)
    while not store.exists("rounds/0000/trained.json"):
        assert killed.poll() is None, driver.said()
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = {name: store.read_bytes(f"labels/{name}") for name in store.names("labels", ".parquet")}
    first_round = store.read_bytes("rounds/0000/batch.parquet")
    assert before

    resumed = driver.start("--resume", f"s3://{BUCKET}/runs/run{unsteady.options}", env=env)
    assert resumed.wait(timeout=PATIENCE_S) == 0, driver.said()
    tables = {name: store.read_table(f"labels/{name}") for name in store.names("labels", ".parquet")}
    rows = Counter(row for table in tables.values() for row in table["row"].to_pylist())
    assert set(rows.values()) == {1}, "a text was labelled twice"
    assert len(rows) == 500 + 120
    assert {name: store.read_bytes(f"labels/{name}") for name in before} == before
    assert store.read_bytes("rounds/0000/batch.parquet") == first_round
    batches = [
        pq.read_table(f"{BUCKET}/runs/run/rounds/{k:04d}/batch.parquet", filesystem=bucket) for k in range(3)
    ]
    trained = Counter(row for batch in batches for row in batch["row"].to_pylist())
    assert set(trained.values()) == {1}
    assert len(store.read_metrics()) == 3
    pipeline("text-classification", model=copied_model(bucket, tmp_path / "model"))
