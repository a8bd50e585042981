"""Kill a run's driver with SIGKILL at random moments, resume it, and count what was asked twice.

    python benchmarks/kill_and_resume.py CONFIG.yaml [--kills 3] [--seed 0] [--set a.b=c …]

The first kill comes at a random moment of the first third of the teaching, and so on. Prints how many texts
are labelled, how many of them are different, and how many were sent to the teacher and not answered (those in
flight at a kill: they are asked again).
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

from llkd_ray.storage.run_dir import ENGINES_DIR, LABELS_DIR, MANIFEST, SENT_DIR, RunStore
from llkd_ray.teacher.labels import count_unanswered

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    rng = random.Random(options.seed)
    folder = tempfile.mkdtemp(prefix="llkd-kill-")
    overrides = [*options.set, f"run.dir={folder}", "run.name=run"]
    first = [options.config, *(word for one in overrides for word in ("--set", one))]
    run_dir = Path(folder) / "run"
    store = RunStore(str(run_dir))
    for kill in range(options.kills):
        moment = (kill + rng.random()) / options.kills
        driver = start(["--resume", str(run_dir)] if kill else first)
        while not taught(store, moment) and driver.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        labels, rounds = len(store.names(LABELS_DIR)), len(list(run_dir.glob("rounds/*/trained.json")))
        print(f"kill {kill + 1}: {labels} tickets labelled, {rounds} rounds trained", flush=True)
        time.sleep(5)  # what the driver had started notices and goes
    driver = start(["--resume", str(run_dir)])
    print(f"the last driver ended with status {driver.wait()}")
    rows = [r for f in run_dir.glob("labels/*.parquet") for r in pq.read_table(f)["row"].to_pylist()]
    print(f"labelled {len(rows)} texts, {len(set(rows))} different")
    print(f"sent and not answered: {count_unanswered(store)} texts in {len(store.names(SENT_DIR))} tickets")
    print(f"engines started: {len(store.names(ENGINES_DIR))}; files: {run_dir}")


def taught(store: RunStore, share: float) -> bool:
    """Whether more than a share of the run's tickets is labelled."""
    if not store.exists(MANIFEST):
        return False
    return len(store.names(LABELS_DIR)) > share * store.read_json(MANIFEST)["tickets"]


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs/distill.py"), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=sys.stderr,
    )


if __name__ == "__main__":
    main()
