"""Peak memory of ingestion, labelling (recorded teacher, no student) and prediction, by the number of texts.

    python benchmarks/memory_of_a_run.py [--rows 100000 1000000] [--kind parquet|jsonl|csv] [--predict]

Each size is measured in a process of its own, with a Ray of its own. The texts are made on the spot (10
random words, about 2 % of them repeated) and so are the answers, to the texts that are read. Every 0.2 s the
proportional set sizes (PSS: private memory, and of shared memory a process's part) of the driver and all its
descendants are summed: Ray's daemons and workers, and the object store, which they map. What Ray takes before
there is work is told apart. ``--labels 0`` labels every text.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

INTERVAL_S = 0.2
SHARD_ROWS = 200_000
WORDS = [f"{start}{middle}{end}" for start in "bdlmt" for middle in ("ea", "oo", "i") for end in "nrtd"]
NAMES = ["sea", "kitchen", "garden"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=float, nargs="+", default=[1e5, 1e6])
    parser.add_argument("--kind", choices=["parquet", "jsonl", "csv"], default="parquet")
    parser.add_argument("--labels", type=int, default=20_000)
    parser.add_argument("--lease-rows", type=int, default=512)
    parser.add_argument(
        "--cpus", type=int, default=2, help="of Ray: tasks of ingestion take half of one each"
    )
    parser.add_argument("--predict", action="store_true", help="let a tiny classifier predict all texts, too")
    parser.add_argument("--folder", default=None, help="for texts and runs; a temporary one by default")
    parser.add_argument("--one", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    print(
        "| texts | phase | seconds | peak MiB | over idle MiB | driver MiB | largest other process | rows |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for rows in map(int, options.rows):
        child = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--one", str(rows)], check=True, stdout=subprocess.PIPE
        )
        for line in json.loads(child.stdout.splitlines()[-1]):
            print("| " + " | ".join(str(value) for value in [f"{rows:,}", *line]) + " |", flush=True)


def measure(rows: int, options: argparse.Namespace) -> list[list[object]]:
    """One line for each phase: name, seconds, MiB at the peak, over idle, driver, the largest other, rows."""
    import ray

    from llkd_ray.corpus.ingest import ingest
    from llkd_ray.storage.run_dir import RunStore

    folder = Path(tempfile.mkdtemp(prefix="llkd-memory-", dir=options.folder))
    temporary = tempfile.mkdtemp(prefix="llkd-")  # Ray's sockets need a short path
    labels = min(options.labels or rows, rows)
    # In another process, so that what the driver has held for making them is not counted.
    subprocess.run(
        [
            sys.executable,
            "-c",
            f"import memory_of_a_run as m; m.make({str(folder)!r}, {rows}, {options.kind!r})",
        ],
        cwd=Path(__file__).parent,
        check=True,
    )
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    ray.init(
        num_cpus=options.cpus,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        _temp_dir=temporary,
        object_store_memory=512 << 20,
    )
    lines: list[list[object]] = []
    try:
        config = make_config(folder, options.kind, labels, options.ticket_size)
        store = RunStore(str(folder / "run"))
        with watched() as idle:
            time.sleep(5)
        lines.append(["idle", *idle.line(0), ""])
        with watched() as phase:
            examples = ingest(config, store, lambda said: print(said, file=sys.stderr, flush=True))
        lines.append(["ingest", *phase.line(idle.peak), examples.n_pool])
        write_answers(store, folder / "answers.parquet", labels)
        with watched() as phase:
            done = label(config, store)
        lines.append(["label", *phase.line(idle.peak), done])
        if options.predict:
            with watched() as phase:
                predicted = predict_all(folder, options.kind)
            lines.append(["predict", *phase.line(idle.peak), predicted])
    finally:
        ray.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
    return lines


def make(folder: str, rows: int, kind: str) -> None:
    """Write the corpus: parquet in shards, anything else as one file."""
    rng = np.random.default_rng(0)
    words = np.array(WORDS)
    for number, first in enumerate(range(0, rows, SHARD_ROWS)):
        count = min(SHARD_ROWS, rows - first)
        words_NW = words[rng.integers(0, words.size, (count, 10))]
        texts = [" ".join(row) for row in words_NW.tolist()]
        for again in rng.integers(0, count, count // 50).tolist():
            texts[again] = texts[0]
        ids = [f"text-{first + n}" for n in range(count)]
        if kind == "parquet":
            pq.write_table(pa.table({"id": ids, "text": texts}), f"{folder}/pool-{number:05d}.parquet")
        else:
            with open(f"{folder}/pool.{kind}", "a") as file:
                pairs = zip(ids, texts, strict=True)
                if kind == "csv":
                    file.writelines(["id,text\n"] if number == 0 else [])
                    file.writelines(f"{id_},{text}\n" for id_, text in pairs)
                else:
                    file.writelines(json.dumps({"id": id_, "text": text}) + "\n" for id_, text in pairs)


def make_config(folder: Path, kind: str, labels: int, ticket_size: int):
    """In corpus order and with no hold-out, so that it is known which answers are needed."""
    from llkd_ray.config.loading import parse_config

    return parse_config(
        {
            "corpus": {"uri": f"{folder}/pool*.{kind}", "id": "id"},
            "labels": {"names": NAMES},
            "teacher": {
                "kind": "recorded",
                "recorded": {"uri": str(folder / "answers.parquet")},
                "ticket_size": ticket_size,
            },
            "student": {"model": "none"},
            "acquisition": {"policy": "sequential"},
            "selection": {"policy": "random"},
            "evaluation": {"holdout": 0},
            "budget": {"labels": labels, "rounds": 1, "train": 1},
        }
    )


def write_answers(store, path: Path, labels: int) -> None:
    """Random answers to the first texts of a run, a piece at a time."""
    from llkd_ray.storage.tables import Examples

    examples = Examples.open(store)
    schema = pa.schema([("id", pa.string()), ("probs", pa.list_(pa.float32()))])
    rng = np.random.default_rng(1)
    labels = min(labels, examples.n_pool)
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, labels, SHARD_ROWS):
            ids = examples.read(range(first, min(first + SHARD_ROWS, labels)), ["id"])["id"]
            probs_NC = rng.dirichlet(np.ones(len(NAMES)), len(ids)).astype(np.float32)
            writer.write_table(pa.table([ids, pa.array(list(probs_NC))], schema=schema))


def label(config, store) -> int:
    """Let the recorded teacher label what the budget allows; returns how many the selector knows of."""
    import ray

    from llkd_ray.config.schedule import Schedule
    from llkd_ray.run.supervisor import open_tickets
    from llkd_ray.selection.selector import start_selector
    from llkd_ray.storage.tables import Examples
    from llkd_ray.teacher.stream import spare_tickets, start_stream

    examples = Examples.open(store)
    schedule = Schedule.plan(config, examples.n_pool, examples.n_test)
    uri = store.root
    selector = start_selector(config, uri, "benchmark")
    tickets = [*spare_tickets(config), *open_tickets(store, schedule, over=False)]
    stream = start_stream(config, uri, selector, tickets)
    while not stream.ended:
        time.sleep(1)
    if stream.error:
        raise stream.error
    labelled = ray.get(selector.stats.remote())["labelled"]
    ray.kill(selector)
    return labelled


def predict_all(folder: Path, kind: str) -> int:
    """Predict the whole corpus by a BERT of one narrow layer with MiniLM's tokenizer; returns the texts."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from llkd_ray.config.base import parse
    from llkd_ray.prediction.config import PredictConfig
    from llkd_ray.prediction.job import predict
    from llkd_ray.student.model import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("minilm"))
    size: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_labels": len(NAMES),
    }
    config = BertConfig(vocab_size=len(tokenizer), **size)
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    settings = {
        "model": str(folder / "model"),
        "corpus": {"uri": f"{folder}/pool*.{kind}", "id": "id"},
        "out": str(folder / "predicted"),
    }
    return predict(parse(PredictConfig, settings), lambda said: print(said, file=sys.stderr, flush=True))[
        "predicted"
    ]


class Watch:
    """Samples of the memory of this process and its descendants."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.seconds = 0.0
        self.peak = 0
        self.driver = 0
        self.largest: Counter[str] = Counter()

    def sample(self) -> None:
        driver = psutil.Process()
        sizes = {driver: _pss(driver), **{one: _pss(one) for one in driver.children(recursive=True)}}
        self.peak = max(self.peak, sum(sizes.values()))
        self.driver = max(self.driver, sizes.pop(driver))
        for process, size in sizes.items():
            try:
                name = (process.cmdline() or ["?"])[0].rpartition("/")[2]
            except psutil.Error:
                continue
            self.largest[name] = max(self.largest[name], size)

    def line(self, idle: int) -> list[object]:
        (name, size), *_ = self.largest.most_common(1)
        mib = [one >> 20 for one in (self.peak, max(0, self.peak - idle), self.driver)]
        return [round(self.seconds, 1), *mib, f"{name} {size >> 20}"]


def _pss(process: psutil.Process) -> int:
    """Bytes; nothing of a process that is gone."""
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0


@contextmanager
def watched() -> Iterator[Watch]:
    """Sample in a thread until the block is left."""
    watch, over = Watch(), threading.Event()

    def work() -> None:
        while not over.wait(INTERVAL_S):
            watch.sample()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()
        watch.seconds = time.monotonic() - watch.began


if __name__ == "__main__":
    main()
