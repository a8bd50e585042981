"""Whatever can die is killed in the middle of a run on a cluster of several raylets, and the run is counted.

What a run comes to does not depend on what was killed: it is compared with a run that was left alone.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from chaos import (
    BOOKED,
    IN_FLIGHT,
    LEASE_ROWS,
    TICKETS_IN_FLIGHT,
    CountingTeacher,
    Result,
    ToyCluster,
    ToyRun,
    kill,
)
from toys import config_tree, write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

POOL, TEST, ROUNDS = 400, 120, 3
SECONDS_PER_TEXT = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    write_corpus(folder / "pool.parquet", POOL, seed=1)
    write_corpus(folder / "test.parquet", TEST, seed=2)
    return folder


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[ToyCluster]:
    before, place = os.environ.get("RAY_TMPDIR"), tempfile.mkdtemp(prefix="lk-")  # Ray wants a short path
    Path(place, "ray").mkdir()
    os.environ["RAY_TMPDIR"] = place
    cluster = ToyCluster()
    yield cluster
    cluster.lose_all()
    del os.environ["RAY_TMPDIR"]
    if before is not None:
        os.environ["RAY_TMPDIR"] = before
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def cluster(shared_cluster: ToyCluster) -> ToyCluster:
    """With all its nodes, whatever the test before has lost."""
    shared_cluster.replace_lost()
    return shared_cluster


@pytest.fixture(scope="module")
def new_run(folder: Path, tiny_encoder: str) -> Callable[..., ToyRun]:
    def make(name: str, teacher: CountingTeacher, **student: Any) -> ToyRun:
        server = {"base_url": teacher.base_url, "scores": "top_logprobs", "concurrency": 16}
        settings = config_tree(
            corpus={"uri": str(folder / "pool.parquet"), "id": "id", "gold": "label"},
            test={"uri": str(folder / "test.parquet"), "id": "id", "gold": "label"},
            teacher={
                "kind": "openai",
                "model": "some-llm",
                "server": server,
                "ticket_size": LEASE_ROWS,
                "tickets_in_flight": TICKETS_IN_FLIGHT,
                "cache": None,  # runs must not learn from each other
                **BOOKED["teacher"],
            },
            student={
                "model": tiny_encoder,
                "epochs": 10,
                "min_steps": 60,
                "learning_rate": 3e-3,
                "max_tokens": 32,
                **BOOKED["student"],
                **student,
            },
            budget={"rounds": ROUNDS, "train": 150},
            evaluation={"holdout": 40},
        )
        return ToyRun(folder, settings, name)

    return make


@pytest.fixture(scope="module")
def undisturbed(shared_cluster: ToyCluster, new_run: Callable[..., ToyRun]) -> Result:
    with CountingTeacher(SECONDS_PER_TEXT) as teacher:
        began = time.monotonic()
        run = new_run("undisturbed", teacher)
        run.start(shared_cluster.address)
        result = run.finish()
        print(f"\nundisturbed: macro-F1 {result.macro_f1:.3f}, {time.monotonic() - began:.0f} s")
        assert teacher.asked_again == 0
    assert result.macro_f1 > 0.8
    return result


def check(
    result: Result,
    undisturbed: Result,
    teacher: CountingTeacher,
    may_be_asked_again: int,
    damaged: int = 0,
) -> None:
    """Nothing lost, nothing twice, the same rounds and the same student.

    ``damaged`` is how many answers were there and were spoilt.
    """
    times_labelled = Counter(result.labelled)
    assert set(times_labelled) == set(range(POOL + TEST)), "labels are lost"
    assert max(times_labelled.values()) == 1, "a text has two labels"
    assert teacher.asked_again <= may_be_asked_again
    assert teacher.asked_again <= result.sent_for_nothing + damaged, "more was asked than the marks tell"
    trained_on = Counter(row for batch in result.batches for row in batch)
    assert max(trained_on.values()) == 1
    assert result.batches == undisturbed.batches
    assert result.macro_f1 == pytest.approx(undisturbed.macro_f1, abs=0.02)


@dataclass(frozen=True)
class Kill:
    """Who is killed, and when: some time after so many files are there."""

    victim: str
    pattern: str
    number: int
    within_s: float


COSTS = {"teacher": IN_FLIGHT, "node of teacher": IN_FLIGHT, "driver": 2 * IN_FLIGHT, "head": 2 * IN_FLIGHT}
"""Texts that may be asked again for a kill: what its victims have under way. The others are no teachers."""


def kills(seed: int) -> dict[str, list[Kill]]:
    """Several runs' kills, at moments that the seed decides."""
    rng = random.Random(seed)

    def teaching(victim: str) -> Kill:
        return Kill(victim, "labels/*.parquet", rng.randrange(2, 16), rng.uniform(0, 0.5))

    def training(victim: str, round_number: int) -> Kill:
        return Kill(victim, f"rounds/{round_number:04d}/selected.json", 1, rng.uniform(0, 1))

    # Once a round is trained, the selector is given the scores of the next one.
    scoring = Kill("selector", "rounds/0001/trained.json", 1, rng.uniform(0, 0.5))
    return {
        "actors": [teaching("teacher"), training("student", 1), scoring],
        "helpers": [teaching("leaser"), teaching("selector"), training("controller", 1)],
        "nodes": [teaching("node of teacher"), training("node of student", 1)],
        "driver": [teaching("driver"), training("driver", 1)],
        "head": [training("head", 1)],
    }


def each_kill() -> Iterator[Any]:
    """Those that ``make test`` leaves out are marked."""
    for name in kills(seed=0):
        yield pytest.param(name, marks=[] if name in ("actors", "nodes", "head") else pytest.mark.long)


@pytest.mark.parametrize("name", list(each_kill()))
def test_a_run_survives(name, cluster, new_run, undisturbed):
    rng, blows = random.Random(name), kills(seed=0)[name]
    with CountingTeacher(SECONDS_PER_TEXT) as teacher:
        began = time.monotonic()
        run = new_run(name, teacher)
        run.start(cluster.address)
        for blow in blows:
            run.wait_for(blow.pattern, blow.number)
            time.sleep(blow.within_s)
            told = f"{len(run.labelled())} labels there, {teacher.asked_again} asked again"
            strike(blow.victim, cluster, run, rng)
            print(f"\n{blow.victim}, {blow.within_s:.1f} s after {blow.number} of {blow.pattern}: {told}")
        result = run.finish()
        tell(name, result, undisturbed, teacher, began)
        check(result, undisturbed, teacher, sum(COSTS.get(blow.victim, 0) for blow in blows))


def strike(victim: str, cluster: ToyCluster, run: ToyRun, rng: random.Random) -> None:
    """Kill somebody, and do what whoever watches over a cluster does then."""
    if victim == "driver":
        run.kill_driver()
        run.start(cluster.address)
    elif victim == "head":
        cluster.lose_all()
        run.kill_driver()  # it would wait for the head for a while
        cluster.start()
        run.start(cluster.address)
    else:
        process, node = rng.choice(cluster.wait_for(victim.removeprefix("node of ")))
        if victim.startswith("node of "):
            cluster.lose(node)
            cluster.replace_lost()
        else:
            kill(process)


def tell(name: str, result: Result, undisturbed: Result, teacher: CountingTeacher, began: float) -> None:
    same = result.batches == undisturbed.batches
    print(
        f"\n{name}: {len(set(result.labelled))} texts labelled, {teacher.asked_again} asked again, "
        f"{result.sent_for_nothing} by the marks, rounds {'the same' if same else 'DIFFERENT'}, "
        f"macro-F1 {result.macro_f1:.3f}, {time.monotonic() - began:.0f} s"
    )


def test_a_full_disk_and_damaged_files(cluster, new_run, undisturbed):
    """The run ends with a reason; on resume, what cannot be read is asked again."""
    with CountingTeacher(SECONDS_PER_TEXT) as teacher:
        began = time.monotonic()
        run = new_run("disk", teacher)
        run.start(cluster.address)
        run.wait_for("labels/*.parquet", 4)
        # The second may be late: labels come as soon as there is one.
        while len(teachers := cluster.processes("teacher")) < 2:
            assert run.driver.poll() is None, run.log.read_text()
            time.sleep(0.1)
        for process, _ in teachers:
            # Marks are smaller than this, label files larger: the system refuses to let them grow.
            process.rlimit(psutil.RLIMIT_FSIZE, (1_000, -1))
        assert run.driver.wait(timeout=240) != 0, "a disk without room is no success"
        assert "the teacher has given up, all 2 actor(s): no room to write labels" in run.log.read_text()
        damaged, emptied, *_ = sorted(run.dir.glob("labels/*.parquet"))
        damaged.write_bytes(damaged.read_bytes()[:-100])
        emptied.write_bytes(b"")
        for place in ("labels", "leases", "rounds/0000"):
            (run.dir / place).mkdir(parents=True, exist_ok=True)
            (run.dir / place / "half-written.parquet.0123456789abcdef.tmp").write_bytes(b"PAR1")
        run.start(cluster.address)
        result = run.finish()
        tell("disk", result, undisturbed, teacher, began)
        damaged_rows = 2 * LEASE_ROWS
        check(result, undisturbed, teacher, 4 * IN_FLIGHT + damaged_rows, damaged_rows)
        assert run.count("quarantine/broken/*.parquet") == 2


@pytest.mark.long
def test_a_round_whose_end_was_not_noted_is_trained_again(cluster, folder, new_run, undisturbed):
    """As where a rank dies after its checkpoint is in place and before the selector knows; twice."""
    shutil.copytree(folder / "undisturbed", folder / "unnoted")
    with CountingTeacher(SECONDS_PER_TEXT) as teacher:
        run = new_run("unnoted", teacher)
        for _ in range(2):
            lines = (run.dir / "metrics.jsonl").read_text().splitlines(keepends=True)
            (run.dir / "metrics.jsonl").write_text("".join(lines[:-1]))
            (run.dir / f"rounds/{ROUNDS - 1:04d}/trained.json").unlink()
            run.start(cluster.address)
            check(run.finish(), undisturbed, teacher, 0)
            assert len(run.metrics()) == ROUNDS
        assert not teacher.times_asked


@pytest.mark.long
def test_soak(cluster, new_run, undisturbed):
    """LLKD_KILLS random kills of random victims in one run."""
    n, rng = int(os.environ.get("LLKD_KILLS", "5")), random.Random(0)
    weights = {"teacher": 3, "student": 3, "selector": 3, "node of teacher": 2, "node of student": 2}
    weights |= {"leaser": 1, "controller": 1, "driver": 1, "head": 1}
    struck: list[str] = []
    with CountingTeacher(SECONDS_PER_TEXT * 4) as teacher:
        began = time.monotonic()
        run = new_run("soak", teacher, max_failures=n)
        run.start(cluster.address)
        run.wait_for("labels/*.parquet", 1)
        while len(struck) < n and run.driver.poll() is None:
            (victim,) = rng.choices(list(weights), list(weights.values()))
            print(f"\n{time.monotonic() - began:.0f} s, progress {run.progress()}: {victim}")
            struck.append(victim)
            before = run.progress()
            strike(victim, cluster, run, rng)
            until = time.monotonic() + 20
            while run.progress() == before and time.monotonic() < until and run.driver.poll() is None:
                time.sleep(0.1)
            time.sleep(rng.uniform(0, 2))
        result = run.finish()
        tell(f"soak, {len(struck)} kills ({dict(Counter(struck))})", result, undisturbed, teacher, began)
        check(result, undisturbed, teacher, sum(COSTS.get(victim, 0) for victim in struck))
    assert len(struck) == n, "the run was over before all were killed"
