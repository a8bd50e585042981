"""Pools on a cluster whose nodes come and go: teachers, ranks, and a run that only just has room.

Several raylets on this machine. A gate at the teacher's server decides when labels come, so nothing here
depends on how fast anything is: a test opens it when the pools are as it wants them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from ray.cluster_utils import Cluster
from stub_server import Request, Response, StubServer, likeliest, usage
from toys import NAMES, WORDS

from llkd_ray.config.teacher import ANSWER_LETTERS
from llkd_ray.storage.run_dir import predictions_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
PATIENCE_S = 600
TEACHER, STUDENT = "Stage", "RayTrainWorker"
"""Words in the titles that Ray gives the processes of teacher actors and student ranks."""


@pytest.fixture
def start_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Cluster]]:
    """Starts a cluster whose head has the given resources; it is taken down after the test."""
    folder = tempfile.mkdtemp(prefix="llkd-")  # Ray's sockets need a short path
    os.mkdir(f"{folder}/ray")
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    clusters: list[Cluster] = []

    def start(**head: Any) -> Cluster:
        clusters.append(Cluster(initialize_head=True, head_node_args=head | {"include_dashboard": False}))
        return clusters[-1]

    yield start
    for cluster in clusters:
        cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


class Gate:
    """A model server that answers while it is open."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.open = self._open.set
        self.close = self._open.clear

    def __call__(self, request: Request) -> Response:
        self._open.wait(PATIENCE_S)
        words = set(request.text.rpartition("Text: ")[2].split())
        best = max(range(3), key=lambda i: len(words & set(WORDS[NAMES[i]].split())))
        probs = {letter: 0.9 if i == best else 0.03 for i, letter in enumerate(ANSWER_LETTERS[:3])}
        return likeliest(probs, usage=usage(50, 1))


class Driver:
    """A run in a process of its own."""

    def __init__(self, settings: dict, folder: Path, cluster: Cluster) -> None:
        self.folder, self.log = folder / "runs/run", folder / "driver.log"
        run = {"dir": str(folder / "runs"), "name": "run", "address": cluster.address}
        (folder / "run.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(settings | {"run": run}))))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "jobs/distill.py"), str(folder / "run.yaml")],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )

    def until(self, what: Callable[[], Any]) -> Any:
        """Wait for something while the run lasts; returns it."""
        end = time.monotonic() + PATIENCE_S
        while not (answer := what()):
            assert self.process.poll() is None, f"the run ended: {self.log.read_text()[-3000:]}"
            assert time.monotonic() < end, f"waited in vain: {self.log.read_text()[-3000:]}"
            time.sleep(0.2)
        return answer

    def ranks(self) -> list[int]:
        """How many ranks trained each finished round."""
        files = sorted(self.folder.glob("rounds/*/trained.json"))
        return [json.loads(file.read_text())["ranks"] for file in files]

    def end(self) -> str:
        """Wait for the end; returns what was printed."""
        self.process.wait(PATIENCE_S)
        return self.log.read_text()

    def trained(self) -> list[list[int]]:
        """The rows of each round's batch."""
        files = sorted(self.folder.glob("rounds/*/batch.parquet"))
        return [pq.read_table(file)["row"].to_pylist() for file in files]


@contextmanager
def driver(settings: dict, folder: Path, cluster: Cluster) -> Iterator[Driver]:
    run = Driver(settings, folder, cluster)
    try:
        yield run
    finally:
        run.process.kill()
        run.process.wait()


def actors(title: str) -> int:
    """Processes of the cluster's that run actors of a kind."""
    found = 0
    for process in psutil.Process().children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:  # gone since
            continue
        found += line.startswith("ray::") and title in line
    return found


def asking(settings: dict, server: StubServer, **teacher: Any) -> dict:
    return settings["teacher"] | {
        "kind": "openai",
        "model": "toy",
        "recorded": None,
        "server": {"base_url": server.base_url, "tokenizer": None, "concurrency": 4},
        "prompt": {"answer": "letters"},
        "cache": None,
        **teacher,
    }


@pytest.mark.long
def test_teachers_come_while_all_are_busy_and_go_when_there_is_nothing_to_do(
    toy_settings, tmp_path, start_cluster, monkeypatch
):
    # Ranks find no room until the end, which is no fault where an autoscaler may still bring it.
    monkeypatch.setenv("LLKD_AUTOSCALING", "1")
    cluster, gate = start_cluster(num_cpus=1, num_gpus=2), Gate()
    with StubServer(gate) as server:
        # An engine in parts has a placement group: one too many would take the second actor's place.
        in_parts = {"cpus": 0.2, "gpus": 1, "tensor_parallel": 2}
        settings = toy_settings | {
            "teacher": asking(toy_settings, server, actors=(1, 2), **in_parts),
            "student": toy_settings["student"] | {"workers": 1, "resources": {"student": 1.0}},
            "budget": {"rounds": 4, "train": 100, "labels": 300},
        }
        with driver(settings, tmp_path, cluster) as run:
            run.until(lambda: len(server.requests) > 0)
            assert actors(TEACHER) == 1
            cluster.add_node(num_cpus=1, num_gpus=2)
            run.until(lambda: actors(TEACHER) == 2)
            gate.open()
            # All is labelled that the first rounds may ask for; what comes next is for the student to say.
            run.until(lambda: actors(TEACHER) == 1)
            assert run.ranks() == []
            cluster.add_node(num_cpus=1, resources={"student": 1})
            assert "macro-F1" in run.end()
        assert run.ranks() == [1, 1, 1, 1]


@pytest.mark.long
def test_ranks_join_and_leave_with_their_nodes(toy_settings, tmp_path, start_cluster):
    cluster, gate = start_cluster(num_cpus=1, resources={"student": 1}), Gate()
    gate.open()
    with StubServer(gate) as server:
        settings = toy_settings | {
            "teacher": asking(toy_settings, server, cpus=0.3),
            "student": toy_settings["student"]
            | {"workers": (1, 2), "cpus": 0.5, "resources": {"student": 1.0}, "resize_s": 3.0, "epochs": 5},
            "budget": {"rounds": 9, "train": 180, "growth": 1.0},
        }
        with driver(settings, tmp_path, cluster) as run:
            run.until(run.ranks)
            gate.close()
            node = cluster.add_node(num_cpus=1, resources={"student": 1})
            run.until(lambda: actors(STUDENT) == 2)
            gate.open()
            run.until(lambda: 2 in run.ranks())
            gate.close()
            cluster.remove_node(node, allow_graceful=False)
            run.until(lambda: actors(STUDENT) == 1)
            gate.open()
            assert "macro-F1" in run.end()
        ranks = run.ranks()
    assert len(ranks) == 9
    assert (ranks[0], ranks[-1]) == (1, 1)
    assert 2 in ranks
    batches = run.trained()
    assert all(batches)
    assert set(Counter(row for batch in batches for row in batch).values()) == {1}
    for k, n in enumerate(ranks):
        files = [run.folder / predictions_file(k, rank, n) for rank in range(n)]
        rows = [row for file in files for row in pq.read_table(file)["row"].to_pylist()]
        assert len(rows) == len(set(rows)) == 120 + 40, "test set and hold-out, each text by one rank"


@pytest.mark.parametrize("of_teacher", [0.5, 0.53])
def test_a_run_that_just_fits_ends_and_one_that_does_not_is_refused(
    toy_settings, tmp_path, start_cluster, of_teacher
):
    cluster = start_cluster(num_cpus=1)
    cluster.add_node(num_cpus=1)
    settings = toy_settings | {
        "teacher": toy_settings["teacher"] | {"actors": 2, "cpus": of_teacher},
        "student": toy_settings["student"] | {"workers": 2, "cpus": 0.45},
    }
    with driver(settings, tmp_path, cluster) as run:
        said = run.end()
    if of_teacher == 0.5:
        assert run.ranks() == [2, 2, 2]
    else:
        assert "need 1.06 + 0.05 + 0.9 = 2.01 CPUs, but the cluster has 2 on 2 node(s)" in said
        assert run.process.returncode != 0
