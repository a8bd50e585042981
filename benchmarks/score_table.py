"""The score table at 10 and 100 million rows: bytes, thresholds, the best of each class, updates, snapshots.

Everything runs on one core, except polars and DuckDB, which take all there are and are left out where they
are not installed. Each figure against another is the median of pairs that take turns. Besides the time on the
clock, the processor time of all cores is given: on a machine that others use, too, only that says much.

    python benchmarks/score_table.py --rows 10_000_000 100_000_000

Prints Markdown tables for each number of rows, a million at least. Takes 8 GB at 100 million.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llkd_ray.metrics.uncertainty import Floats, Ints, StudentScores
from llkd_ray.selection.policies import SELECTION
from llkd_ray.selection.recovery import Snapshot
from llkd_ray.selection.search import TopK, class_thresholds
from llkd_ray.selection.table import COLUMNS, UNIT, ScoreTable, class_sums, slices

Step = Callable[[], Any]

N_CLASSES, OF_EACH, UPDATED = 16, 625, 1_000_000


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time the score table.")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000_000])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    for n in options.rows:
        table = filled(n)
        print(f"\n## {n:,} rows, {N_CLASSES} classes, all labelled, scored and untrained\n")
        print(f"{table.nbytes / n:.0f} bytes a row. numpy {np.__version__}, median of {options.repeats}.\n")
        print("| step | ms | of processor time |\n|---|---|---|")
        for name, step in steps(table).items():
            clock, processor = median([timed(step) for _ in range(options.repeats)])
            print(f"| {name} | {clock:,.0f} | {processor:,.0f} |", flush=True)
        print(f"\nBest {OF_EACH} by confidence in each class:\n")
        print("| against | ms | ours | ratio | processor ms | ours | ratio |\n|---|---|---|---|---|---|---|")
        for name, step in others(table).items():
            compare(name, step, table, options.repeats)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"\nPeak memory of the process so far, the others included: {peak:.1f} GiB.")
        del table


def filled(n: int) -> ScoreTable:
    """A table of random figures, a million rows at a time. Confidences crowd near 1, as a teacher's do."""
    rng = np.random.default_rng(0)
    table = ScoreTable(N_CLASSES, n)
    if n < UPDATED:
        raise ValueError(f"--rows is {n}: give {UPDATED} or more, for as many are updated")
    for start in range(0, n, UPDATED):
        row_M = np.arange(start, min(start + UPDATED, n))
        table.lease(0, row_M)
        label_M = rng.integers(0, N_CLASSES, row_M.size)
        table.put_labels(row_M, label_M, 1 - rng.random(row_M.size) ** 3, np.zeros(row_M.size))
        table.refresh(0, row_M, StudentScores(table.label[row_M], *rng.random((3, row_M.size))))
    return table


def steps(table: ScoreTable) -> dict[str, Step]:
    """What the table and the policies do, by what it is."""
    rng, n = np.random.default_rng(1), len(table)
    scattered = np.sort(rng.choice(n, UPDATED, replace=False))
    dense = np.arange(n // 2 - UPDATED // 2, n // 2 + UPDATED // 2)
    signals = rng.random((3, UPDATED))
    p = rng.dirichlet(np.ones(N_CLASSES), UPDATED)
    labels, members = rng.integers(0, N_CLASSES, UPDATED), np.zeros(UPDATED)
    found = {
        "thresholds of the confidence": lambda: thresholds(table),
        f"best {OF_EACH} of each class by confidence": lambda: top_of_each(table),
        "labelled texts of each class": lambda: table.labelled_of_class(1),
        "rows that are untrained": table.untrained,
    }
    for name in ("random", "llkd", "llkd_sample"):
        found[f"`{name}`: 10,000 of all, statistics and search"] = lambda name=name: choose(table, name)
    for where, row_M in (("scattered, sorted", scattered), ("dense", dense)):
        found[f"note 1M scores, {where}"] = lambda rows=row_M: table.refresh(
            0, rows, StudentScores(labels, *signals)
        )
        found[f"note 1M labels, {where}"] = lambda rows=row_M: table.relabel(
            rows, labels, signals[0], members
        )
        found[f"note 1M tickets, {where}"] = lambda rows=row_M: table.lease(0, rows)
    found["scores of 1M answers (entropy and margin of 16 classes)"] = lambda: StudentScores.of(p, labels)
    found["copy for a snapshot"] = lambda: list(table.copy_into({}))
    found["write a snapshot and read it"] = lambda: there_and_back(table)
    return found


def others(table: ScoreTable) -> dict[str, Step]:
    """The best of each class by other means; each gives one array of rows for each class."""
    label_N, confidence_N = table.label, table.confidence

    def by(places: Callable[[Floats], Ints]) -> list[Ints]:
        of_class = (np.flatnonzero(label_N == c) for c in range(N_CLASSES))
        return [rows[places(confidence_N[rows])] for rows in of_class]

    found: dict[str, Step] = {
        "numpy argsort of each class": lambda: by(lambda value: np.argsort(value)[-OF_EACH:]),
        "numpy argpartition of each class": lambda: by(
            lambda value: np.argpartition(value, value.size - OF_EACH)[-OF_EACH:]
        ),
    }
    try:
        import polars as pl
    except ImportError:
        print("polars is not installed: left out", file=sys.stderr)
    else:
        frame = pl.DataFrame({"label": label_N, "value": confidence_N}).with_row_index("row")
        best = frame.lazy().group_by("label").agg(pl.col("row").top_k_by("value", OF_EACH))
        found[f"polars {pl.__version__} top_k_by"] = lambda: best.collect()["row"].to_list()
    try:
        import duckdb
    except ImportError:
        print("duckdb is not installed: left out", file=sys.stderr)
    else:
        there = {"label": label_N, "value": confidence_N, "row": np.arange(len(table), dtype=np.int32)}
        base = duckdb.connect()
        base.register("there", there)
        base.execute("create table scores as select * from there")
        query = f"select arg_max(row, value, {OF_EACH}) from scores group by label"
        found[f"duckdb {duckdb.__version__} arg_max"] = lambda: [r for (r,) in base.execute(query).fetchall()]
    return found


def thresholds(table: ScoreTable) -> Floats:
    count_C = sum(np.bincount(table.label[part], minlength=N_CLASSES) for part in slices(len(table)))
    return class_thresholds(class_sums(table.confidence, table.label, N_CLASSES) * UNIT, count_C)


def top_of_each(table: ScoreTable) -> Ints:
    top = TopK(0, np.full(N_CLASSES, OF_EACH))
    for part in slices(len(table)):
        top.add(np.arange(part.start, part.stop), table.confidence[part], table.label[part])
    return top.best().row_M


def choose(table: ScoreTable, policy: str) -> Any:
    return SELECTION[policy].choose(table.candidate_chunks(1), 10_000, np.random.default_rng(0), quota=0.25)


def there_and_back(table: ScoreTable) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "snapshot.npz"
        columns = {name: getattr(table, name) for name in COLUMNS}
        with file.open("wb") as out:
            Snapshot(columns, np.empty(0, dtype=np.int64), rounds=0, usage={}, unasked=0).write(out)
        with file.open("rb") as source:
            Snapshot.read(source)


def compare(name: str, theirs: Step, table: ScoreTable, repeats: int) -> None:
    """One line: medians of runs that take turns. The values found have to be the same."""
    pairs = [(timed(theirs), timed(lambda: top_of_each(table))) for _ in range(repeats)]
    rows = np.concatenate([np.asarray(of_class) for of_class in theirs()])
    values, ours = (np.sort(table.confidence[found]) for found in (rows, top_of_each(table)))
    if not np.array_equal(values, ours):
        raise AssertionError(f"{name} finds other texts")
    (clock, processor), (our_clock, our_processor) = (
        median(list(times)) for times in zip(*pairs, strict=True)
    )
    print(
        f"| {name} | {clock:,.0f} | {our_clock:,.0f} | {clock / our_clock:.1f} "
        f"| {processor:,.0f} | {our_processor:,.0f} | {processor / our_processor:.1f} |",
        flush=True,
    )


def median(times: list[tuple[float, float]]) -> tuple[float, float]:
    """The medians of both kinds of time, each for itself."""
    clock, processor = (statistics.median(kind) for kind in zip(*times, strict=True))
    return clock, processor


def timed(step: Step) -> tuple[float, float]:
    """Milliseconds on the clock and of the processor."""
    began, used = time.perf_counter(), time.process_time()
    step()
    return 1e3 * (time.perf_counter() - began), 1e3 * (time.process_time() - used)


if __name__ == "__main__":
    main()
