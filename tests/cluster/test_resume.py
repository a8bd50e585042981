"""SIGKILL or Ctrl-C of the driver, then --resume: nothing is lost, nothing is asked or trained twice."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(600)


def hear_ctrl_c() -> None:
    """Tests that run in the background ignore it, and a child would do the same."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(arguments: list[str], log: Path, env: dict[str, str]) -> subprocess.Popen:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "jobs/distill.py"), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env=env,
            preexec_fn=hear_ctrl_c,
        )


def count(run_dir: Path, pattern: str) -> int:
    return len(list(run_dir.glob(pattern)))


# Moments in the life of a run: some labels are there, a round is selected, two rounds are trained.
SOME_LABELS, SELECTED, TRAINED = (
    ("labels/*.parquet", 3),
    ("rounds/*/selected.json", 1),
    ("rounds/*/trained.json", 2),
)


@pytest.mark.parametrize(
    "moments",
    [(TRAINED,), pytest.param((SOME_LABELS, SELECTED, TRAINED), marks=pytest.mark.slow)],
    ids=["once", "three times"],
)
def test_killed_then_finished(toy_settings, own_cluster_env, tmp_path, moments):
    rng = random.Random(0)
    settings = toy_settings | {"run": {"dir": str(tmp_path), "name": "run"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    run_dir, log = tmp_path / "run", tmp_path / "log.txt"
    arguments = ["config.yaml"]
    for pattern, number in moments:
        driver = start(arguments, log, own_cluster_env)
        while count(run_dir, pattern) < number:
            assert driver.poll() is None, log.read_text()
            time.sleep(0.02)
        if pattern.startswith("labels"):
            refused = start(["--resume", str(run_dir)], tmp_path / "second.txt", own_cluster_env)
            assert refused.wait(timeout=120) == 2
            assert driver.poll() is None, "it has ended, so there was nothing to refuse"
            said = (tmp_path / "second.txt").read_text()
            assert f"another driver is at work on this run (process {driver.pid} on" in said
            assert "Traceback" not in said
        time.sleep(rng.uniform(0, 0.5))
        is_by_hand = pattern.startswith("labels")  # Ctrl-C
        driver.send_signal(signal.SIGINT if is_by_hand else signal.SIGKILL)
        status = driver.wait(timeout=120)
        if is_by_hand:
            assert status == 130, log.read_text()
            *_, last_line = log.read_text().splitlines()
            assert last_line == f"stopped; what is done is kept, continue with: llkd resume {run_dir}"
        arguments = ["--resume", str(run_dir)]
    trained_before = {f: f.stat().st_mtime_ns for f in run_dir.glob("rounds/*/trained.json")}
    assert len(trained_before) >= 2

    last = start(arguments, log, own_cluster_env)
    assert last.wait(timeout=500) == 0, log.read_text()

    labels = [row for f in run_dir.glob("labels/*.parquet") for row in pq.read_table(f)["row"].to_pylist()]
    assert max(Counter(labels).values()) == 1, "a text was labelled twice"
    assert len(labels) == 500 + 120
    assert count(run_dir, "metrics.jsonl") == 1
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 3
    trained = [r for f in run_dir.glob("rounds/*/batch.parquet") for r in pq.read_table(f)["row"].to_pylist()]
    assert max(Counter(trained).values()) == 1
    assert trained_before == {f: f.stat().st_mtime_ns for f in trained_before}, (
        "a finished round was repeated"
    )
    assert (run_dir / "model/config.json").exists()
