"""A cluster of several raylets on this machine whose parts can be killed, and a run on it that is counted.

Who runs where follows from what nodes have: ranks fit on student nodes alone, and teachers book a GPU, which
teacher nodes claim to have. Whatever is killed is found among the children of this cluster's own raylets.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import yaml
from ray.cluster_utils import Cluster
from ray.experimental.internal_kv import _internal_kv_reset
from stub_server import Request, Response, StubServer, likeliest, usage
from toys import NAMES, WORDS

from llkd_ray.config.teacher import ANSWER_LETTERS
from llkd_ray.storage.run_dir import RunStore
from llkd_ray.teacher.labels import count_unanswered

ROOT = Path(__file__).parents[2]
RESOURCES: dict[str, dict[str, Any]] = {
    "student": {"num_cpus": 2},
    "teacher": {"num_cpus": 1, "num_gpus": 1},
}
"""What a node of each kind has; there are two of each."""
BOOKED: dict[str, dict[str, Any]] = {
    "student": {"cpus": 1.9, "workers": 2, "threads": 1},
    "teacher": {"cpus": 0.9, "gpus": 1, "actors": 2},
}
"""What actors ask for, so that one fits on a node, and only on one of its kind."""
TITLES = {
    "student": "RayTrainWorker",
    "teacher": "OnlyStage",
    "selector": "Selector",
    "leaser": "Leaser",
    "controller": "TrainController",  # Ray Train's own
}
"""A word in the title that Ray gives to the process of an actor of each part."""
HEALTH = {
    # A dead node is noticed in five seconds rather than fifteen; a node that is merely slow must not be.
    "health_check_initial_delay_ms": 10_000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 5_000,
    "health_check_failure_threshold": 10,
}
LEASE_ROWS, TICKETS_IN_FLIGHT = 16, 2
IN_FLIGHT = LEASE_ROWS * TICKETS_IN_FLIGHT
"""Texts that one teacher actor has under way at most."""


class ToyCluster:
    """A head and two nodes of each kind; lost ones can be replaced, as a cloud replaces spot nodes.

    RAY_TMPDIR must name a folder with a short path that holds a folder ``ray``.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin with a new head, at another address than a head before it."""
        # With the dashboard: what cleans up after Ray Train asks it who is alive.
        head = {"num_cpus": 1, "include_dashboard": True, "_system_config": HEALTH}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self._cluster.address
        self._nodes: dict[str, list[Any]] = {kind: [] for kind in RESOURCES}
        self.replace_lost()

    def replace_lost(self) -> None:
        for kind, nodes in self._nodes.items():
            while len(nodes) < 2:
                nodes.append(self._cluster.add_node(wait=False, **RESOURCES[kind]))

    def processes(self, part: str) -> list[tuple[psutil.Process, Any]]:
        """The processes of the actors of a part of the run, each with its node."""
        return [
            (process, node)
            for node in self._cluster.list_all_nodes()
            for process in workers_of(node)
            if TITLES[part] in title_of(process)
        ]

    def wait_for(self, part: str, timeout_s: float = 240) -> list[tuple[psutil.Process, Any]]:
        """The processes of a part, once there are any."""
        give_up = time.monotonic() + timeout_s
        while not (found := self.processes(part)):
            assert time.monotonic() < give_up, f"nobody runs a {part}"
            time.sleep(0.1)
        return found

    def lose(self, node: Any) -> None:
        """SIGKILL for all that runs on a node, its workers a little later than its raylet."""
        workers = workers_of(node)
        for nodes in self._nodes.values():
            if node in nodes:
                nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)
        for worker in workers:
            kill(worker)

    def lose_all(self) -> None:
        """The head first, so that nobody is told anything."""
        for node in self._cluster.list_all_nodes():
            self.lose(node)
        # The head had made itself what this process asks; a test that uses its own Ray would ask in vain.
        _internal_kv_reset()


def workers_of(node: Any) -> list[psutil.Process]:
    (raylet,) = node.all_processes["raylet"]
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(raylet.process.pid).children(recursive=True)
    return []


def title_of(process: psutil.Process) -> str:
    """The title that Ray has given to a worker; empty where it has none yet, or the process has gone."""
    with suppress(psutil.Error):
        title = " ".join(process.cmdline())
        return title if title.startswith("ray::") else ""
    return ""


def kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)


def end_head(pid: int) -> None:
    """A head of ``ray start --block`` and all below it; asked to end, it takes half a minute."""
    process = psutil.Process(pid)
    for one in [process, *process.children(recursive=True)]:
        kill(one)


class CountingTeacher(StubServer):
    """A model server on loopback that is mostly right, always gives a text the same answer, and counts."""

    def __init__(self, seconds_per_text: float) -> None:
        super().__init__(self._say)
        self.times_asked: Counter[str] = Counter()
        """By text: what whoever runs the server would send a bill for."""
        self.seconds_per_text = seconds_per_text

    def __enter__(self) -> CountingTeacher:
        super().__enter__()
        self._server.handle_error = lambda request, client: None  # clients are killed on purpose
        return self

    def _say(self, request: Request) -> Response:
        text = request.text.rpartition("Text: ")[2].partition("\n")[0]
        self.times_asked[text] += 1
        seed = int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "big")
        rng = np.random.default_rng(seed)
        right = max(range(3), key=lambda i: len(set(text.split()) & set(WORDS[NAMES[i]].split())))
        said = right if rng.uniform() < 0.9 else int(rng.integers(3))
        top = rng.uniform(0.5, 0.95)
        probs = {letter: top if i == said else 0.02 for i, letter in enumerate(ANSWER_LETTERS[:3])}
        reply = likeliest(probs, usage=usage(50, 1))
        return Response(reply.content, wait_s=self.seconds_per_text)

    @property
    def asked_again(self) -> int:
        """Requests beyond the first for a text."""
        return self.times_asked.total() - len(self.times_asked)


@dataclass(frozen=True)
class Result:
    """What a finished run has left."""

    labelled: list[int]
    """The rows of all label files."""
    batches: list[list[int]]
    """The rows of each round, in the order of its batch."""
    macro_f1: float
    sent_for_nothing: int
    """Texts in attempts that a mark says were never answered."""


class ToyRun:
    """A run by ``jobs/distill.py`` in a process of its own, which can be killed and resumed."""

    def __init__(self, folder: Path, settings: dict[str, Any], name: str = "run") -> None:
        self.folder, self.dir, self.log = folder, folder / name, folder / f"{name}.log"
        settings = settings | {"run": {"dir": str(folder), "name": name}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        self._first = str(folder / f"{name}.yaml")
        self.driver: subprocess.Popen[bytes] | None = None

    def start(self, address: str) -> None:
        """Start the run on a cluster, or resume it where its directory is there."""
        arguments = ["--resume", str(self.dir)] if self.dir.exists() else [self._first]
        with self.log.open("ab") as output:
            self.driver = subprocess.Popen(
                [sys.executable, str(ROOT / "jobs/distill.py"), *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=os.environ | {"RAY_ADDRESS": address},
            )

    def kill_driver(self) -> None:
        assert self.driver is not None
        self.driver.kill()
        self.driver.wait()

    def count(self, pattern: str) -> int:
        """Files of the run directory."""
        return len(list(self.dir.glob(pattern)))

    def wait_for(self, pattern: str, number: int, timeout_s: float = 500) -> None:
        """Return when there are so many files; a run that ends before is an error."""
        assert self.driver is not None
        give_up = time.monotonic() + timeout_s
        while self.count(pattern) < number:
            assert self.driver.poll() is None, self.log.read_text()
            assert time.monotonic() < give_up, f"{pattern}: {self.log.read_text()}"
            time.sleep(0.02)

    def progress(self) -> int:
        """Grows whenever something is labelled, scored, selected or trained."""
        return self.count("labels/*.parquet") + self.count("rounds/*/*")

    def labelled(self) -> list[int]:
        files = sorted(self.dir.glob("labels/*.parquet"))
        return [row for file in files for row in pq.read_table(file)["row"].to_pylist()]

    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.dir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def finish(self, timeout_s: float = 500) -> Result:
        """Wait for the driver, which must succeed, and read what the run has left."""
        assert self.driver is not None
        try:
            assert self.driver.wait(timeout=timeout_s) == 0, self.log.read_text()
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not finished in {timeout_s} s: {self.log.read_text()}") from None
        finally:
            self.driver.kill()
        batches = sorted(self.dir.glob("rounds/*/batch.parquet"))
        return Result(
            labelled=self.labelled(),
            batches=[pq.read_table(file)["row"].to_pylist() for file in batches],
            macro_f1=self.metrics()[-1]["macro_f1"],
            sent_for_nothing=count_unanswered(RunStore(str(self.dir))),
        )
