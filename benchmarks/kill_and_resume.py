"""Kill a run's driver with SIGKILL at random moments, resume it, and count what was asked twice.

    python benchmarks/kill_and_resume.py CONFIG.yaml [--kills 3] [--seed 0] [--within 40 90] [--set a.b=c …]

Prints texts labelled, different ones among them, and texts that were sent to the teacher and not answered
(those in flight at a kill: they are asked again).
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

from llkd_ray.store import ENGINES_DIR, LABELS_DIR, SENT_DIR, RunStore

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--within", type=float, nargs=2, default=(40.0, 90.0), metavar=("FROM", "TO"))
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    rng = random.Random(options.seed)
    folder = tempfile.mkdtemp(prefix="llkd-kill-")
    overrides = [*options.set, f"run.dir={folder}", "run.name=run"]
    first = [options.config, *(word for one in overrides for word in ("--set", one))]
    run_dir = Path(folder) / "run"
    store = RunStore(str(run_dir))
    for kill in range(options.kills):
        arguments = ["--resume", str(run_dir)] if (run_dir / "config.yaml").exists() else first
        driver = start(arguments)
        wait = rng.uniform(*options.within)
        try:
            driver.wait(timeout=wait)
            print(f"ended by itself after less than {wait:.0f} s, with status {driver.returncode}")
        except subprocess.TimeoutExpired:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            labels, rounds = len(store.names(LABELS_DIR)), len(list(run_dir.glob("rounds/*/trained.json")))
            print(f"kill {kill + 1} after {wait:.0f} s: {labels} tickets labelled, {rounds} rounds trained")
        time.sleep(5)  # what the driver had started notices and goes
    driver = start(["--resume", str(run_dir)])
    print(f"the last driver ended with status {driver.wait()}")
    rows = [r for f in run_dir.glob("labels/*.parquet") for r in pq.read_table(f)["row"].to_pylist()]
    marks = {name: int(store.read_bytes(f"{SENT_DIR}/{name}")) for name in store.names(SENT_DIR)}
    print(f"labelled {len(rows)} texts, {len(set(rows))} different")
    print(f"sent and not answered: {sum(marks.values())} texts in {len(marks)} tickets")
    print(f"engines started: {len(store.names(ENGINES_DIR))}; files: {run_dir}")


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs/distill.py"), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=sys.stderr,
    )


if __name__ == "__main__":
    main()
