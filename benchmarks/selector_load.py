"""A thousand teacher actors against one selector, without engines: how many calls it takes, and how soon.

    python benchmarks/selector_load.py [--actors 1000] [--tickets 20000] [--lease-rows 512]

The selector is the real one, an actor on a Ray of its own, with the run directory on the local disk; the pool
is made of numbers alone, for nobody reads its texts. A few client processes play the teachers' part of a
ticket: lease it, reserve its usage under a cap, write the label file, tell the selector. With
``--seconds-per-ticket 0`` they do nothing else, which gives the most calls that it can take; at a teacher's
real pace (512 texts at 200 a second: 2.5 s) the latency is what a teacher would see. It also says how long a
selector takes to start, its process included: one of another driver, which reads all label files, and one
that restarts under the same driver, which finds its snapshot.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from llkd_ray.config.loading import parse_config
from llkd_ray.config.schedule import Schedule
from llkd_ray.config.schema import Config
from llkd_ray.selection.selector import start_selector
from llkd_ray.storage.run_dir import EXAMPLES_INDEX, LABELS_DIR, SNAPSHOTS_DIR, RunStore
from llkd_ray.storage.tables import LABELS, list_column
from llkd_ray.teacher.base import Usage
from llkd_ray.teacher.labels import TicketLabels, write_ticket

N_CLASSES = 8
CLIENTS = 4
TOKENS = 100
"""Of each text's prompt."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--actors", type=int, default=1_000)
    parser.add_argument("--tickets", type=int, default=20_000)
    parser.add_argument("--lease-rows", type=int, default=512)
    parser.add_argument("--seconds-per-ticket", type=float, default=0.0)
    parser.add_argument("--no-files", action="store_true", help="leave the label files out")
    options = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="selector-load-")
    try:
        ray.init(include_dashboard=False, num_cpus=CLIENTS + 1, log_to_driver=False)
        measure(options, Path(folder) / "run")
    finally:
        ray.shutdown()
        shutil.rmtree(folder)


def measure(options: argparse.Namespace, run_dir: Path) -> None:
    config = make_config(options)
    store = RunStore(str(run_dir))
    rows = options.tickets * options.ticket_size
    store.write_json(EXAMPLES_INDEX, {"pool": [{"file": "examples/none.parquet", "rows": rows}], "test": []})
    selector = start_selector(config, store.root, "")
    ray.get(selector.stats.remote())
    tickets = list(Schedule.plan(config, rows, 0).in_order())
    began = time.monotonic()
    per_client = options.actors // CLIENTS
    remote: Any = ray.remote(num_cpus=1)(Client)
    clients = [remote.remote(config, store.root, selector, options) for _ in range(CLIENTS)]
    latencies = ray.get([c.teach.remote(tickets[i::CLIENTS], per_client) for i, c in enumerate(clients)])
    seconds = time.monotonic() - began
    print(f"{options.actors} teachers, {len(tickets)} tickets of {options.ticket_size} texts, {rows:,} rows")
    calls = 0
    for name in ("lease", "reserve", "put_labels"):
        every = np.concatenate([one[name] for one in latencies]) * 1_000
        calls += every.size
        p50, p95, p99 = np.percentile(every, [50, 95, 99])
        print(f"  {name}: {every.size} calls, ms at 50 / 95 / 99 %: {p50:.1f} / {p95:.1f} / {p99:.1f}")
    print(f"  {seconds:.1f} s: {calls / seconds:,.0f} calls/s, {rows / seconds:,.0f} labels/s")
    if not options.no_files:
        ray.get(selector.trained.remote(0, {}))
        while not store.names(SNAPSHOTS_DIR):
            time.sleep(0.1)
        for session, how in (("another", f"reading {len(tickets)} label files"), ("", "from its snapshot")):
            began = time.monotonic()
            again = start_selector(config, store.root, session)
            assert ray.get(again.stats.remote())["tickets_done"] == len(tickets)
            print(f"  a new selector, {how}: {time.monotonic() - began:.1f} s")
            ray.kill(again)


def make_config(options: argparse.Namespace) -> Config:
    rows = options.tickets * options.ticket_size
    return parse_config(
        {
            "corpus": {"uri": "none.parquet"},
            "labels": {"names": [f"class {c}" for c in range(N_CLASSES)]},
            "teacher": {
                "kind": "recorded",
                "recorded": {"uri": "none.parquet"},
                "ticket_size": options.ticket_size,
                "actors": options.actors,
            },
            "student": {"model": "none"},
            # All labels come before the first round, so that nobody waits for a student.
            "budget": {
                "rounds": 2,
                "first_labels": 1.0,
                "labels": rows,
                "train": 1_000,
                "cap": {"tokens": 10 * TOKENS * rows},
            },
            "acquisition": {"policy": "random"},
            "evaluation": {"holdout": 0},
        }
    )


class Client:
    """Some of the teachers, as coroutines of one process."""

    def __init__(self, config: Config, store_uri: str, selector: Any, options: argparse.Namespace) -> None:
        self.config, self.selector, self.options = config, selector, options
        self.store = RunStore(store_uri)
        self.seconds: dict[str, list[float]] = {"lease": [], "reserve": [], "put_labels": []}
        p_MC = np.random.default_rng(0).dirichlet(np.ones(N_CLASSES), options.ticket_size)
        self.probs_MC = p_MC.astype(np.float32)

    async def teach(self, tickets: list[int], teachers: int) -> dict[str, np.ndarray]:
        """All of the tickets, by so many teachers; returns the seconds of each call by its name."""
        left = iter(tickets)

        async def teacher() -> None:
            for ticket in left:  # shared: each takes the next
                await self._see_to(ticket)

        await asyncio.gather(*(teacher() for _ in range(teachers)))
        return {name: np.array(each) for name, each in self.seconds.items()}

    async def _see_to(self, ticket: int) -> None:
        _, row_M = await self._timed("lease", ticket)
        usage = {"teacher": Usage(texts=len(row_M), requests=len(row_M), prompt_tokens=TOKENS * len(row_M))}
        assert await self._timed("reserve", ticket, f"{ticket}", "teacher", usage["teacher"].as_dict())
        await asyncio.sleep(self.options.seconds_per_ticket)
        probs_MC = self.probs_MC[: len(row_M)]
        if not self.options.no_files:
            table = labels(row_M, probs_MC)
            names = self.config.labels.names
            await asyncio.to_thread(write_ticket, self.store, LABELS_DIR, ticket, table, usage, 0, 2, names)
        member_M = np.zeros(len(row_M), dtype=np.int64)
        said = TicketLabels(row_M, probs_MC, member_M, usage, 0)
        await self._timed("put_labels", ticket, said)

    async def _timed(self, method: str, *arguments: Any) -> Any:
        began = time.monotonic()
        answer = await getattr(self.selector, method).remote(*arguments)
        self.seconds[method].append(time.monotonic() - began)
        return answer


def labels(row_M: np.ndarray, probs_MC: np.ndarray) -> pa.Table:
    """LABELS of these rows; what nobody looks at is empty."""
    known = {"row": pa.array(row_M), "probs": list_column(probs_MC), "id": pa.array([""] * len(row_M))}
    zero = pa.array(np.zeros(len(row_M), dtype=np.int64))
    columns = [known.get(field.name, zero).cast(field.type) for field in LABELS]
    return pa.Table.from_arrays(columns, schema=LABELS)


if __name__ == "__main__":
    main()
