"""Applies a classifier to any corpus with Ray Data: every row gets a prediction or goes to quarantine.

Reading tasks produce pieces of the corpus (see ``pieces``); actors, each with a copy of the model, score them
and write one file per piece. Memory does not grow with the corpus: Ray Data's back-pressure bounds the data
between the two. A restart scores only the pieces without a file. If thresholds are fitted, gold is predicted
first, in the same way.
"""

from __future__ import annotations

import json
import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from llkd_ray.cluster import connect, library_versions
from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import SourceConfig
from llkd_ray.corpus.ingest import cut_large, quiet_ray_data
from llkd_ray.corpus.sources import pack, plan
from llkd_ray.prediction import results
from llkd_ray.prediction.config import PredictConfig
from llkd_ray.prediction.pieces import (
    CORPUS,
    FIELDS,
    GOLD,
    Task,
    progress,
    read_pieces,
    read_tasks,
    write_tasks,
)
from llkd_ray.prediction.results import Counts, Thresholds
from llkd_ray.resources import READING_CPUS, Bundle, unplaced
from llkd_ray.storage.checkpoints import Checkpoint, inspect
from llkd_ray.storage.run_dir import RunStore
from llkd_ray.student.inference import load, score

CPUS_A_THREAD = 0.45
"""CPUs that Ray reserves per actor thread: a half, so that CPUs always remain for the reading tasks."""
PROGRESS_SECONDS = 10.0  # between two progress lines
PIECES_IN_FLIGHT = 2  # per actor: one being scored, one waiting
BLOCK_BYTES = 1 << 20  # small, so that each piece is passed on immediately
Say = Callable[[str], None]


def predict(config: PredictConfig, say: Say = print) -> dict[str, Any]:
    """Predict all rows of ``config.corpus`` into ``config.out``; returns the content of summary.json.

    Raises :class:`ConfigError` for user errors (if possible, before an actor starts) and for unreadable
    files.
    """
    began = time.monotonic()
    checkpoint = inspect(config.model, config.revision, config.max_tokens)
    given = _check_thresholds(config, checkpoint)
    sources = {GOLD: config.gold, CORPUS: config.corpus}
    units = {part: plan(source, FIELDS[part]) for part, source in sources.items() if source is not None}
    store = results.open_output(config, checkpoint, units, library_versions())
    with connect(config.address), quiet_ray_data():
        workers = _workers(config)
        tasks = {part: _tasks(part, found, sources[part], store, say) for part, found in units.items()}
        thresholds = given
        if config.gold is not None:
            _stream(GOLD, tasks[GOLD], config.gold, config, checkpoint, given, store, workers, say)
            _say_rows(GOLD, _row_counts(GOLD, tasks[GOLD], store), say)
            thresholds = _fit(config, given, store, say)
        scored, seconds, labels = _stream(
            CORPUS, tasks[CORPUS], config.corpus, config, checkpoint, thresholds, store, workers, say
        )
    summary = _row_counts(CORPUS, tasks[CORPUS], store)
    counts = {name: labels.get(name, (0, 0)) for name in checkpoint.labels}
    summary["accepted"] = sum(accepted for _, accepted in counts.values())
    summary["labels"] = {name: {"predicted": n, "accepted": m} for name, (n, m) in counts.items()}
    _say_rows(CORPUS, summary, say)
    if scored:
        say(f"{scored:,} scored now, {scored / max(seconds, 1e-9):.0f} texts/s without start-up")
    summary |= {"scored_now": scored, "seconds": round(time.monotonic() - began, 1)}
    store.write_json(results.SUMMARY, summary)
    return summary


def _check_thresholds(config: PredictConfig, checkpoint: Checkpoint) -> Thresholds:
    for field, name in [
        ("--min-grade", config.min_grade),
        *(("--threshold", one) for one in config.thresholds),
    ]:
        if name is not None and name not in checkpoint.labels:
            raise ConfigError(
                f"{field}: {name!r} is no label of the model: take {', '.join(checkpoint.labels)}"
            )
    return Thresholds.given(checkpoint.labels, config.thresholds, config.min_grade)


# Resources


def _workers(config: PredictConfig) -> dict[str, Any]:
    """The number of actors, the resources that each reserves, and its threads (None on a GPU)."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = config.gpus
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0.0
    threads = min(config.threads, max(1, int(max(node.get("CPU", 1) for node in nodes))))
    booked = {"CPU": CPUS_A_THREAD if gpus else CPUS_A_THREAD * threads, "GPU": gpus}
    if config.workers is None:
        each = (node.get("GPU", 0) / gpus if gpus else node.get("CPU", 0) / threads for node in nodes)
        fewest = most = max(1, sum(int(number) for number in each))
    else:
        fewest, most = config.workers
    pieces = [Bundle.of("predictor", "", booked)] * fewest
    if left := unplaced(nodes, [*pieces, Bundle.of("reading task", "", {"CPU": READING_CPUS})]):
        has = ", ".join(f"{sum(node.get(name, 0) for node in nodes):g} {name}s" for name in ("CPU", "GPU"))
        raise ConfigError(
            f"--workers: {fewest} actors of {booked['CPU']:g} CPUs and {gpus:g} GPUs and a reading task of "
            f"{READING_CPUS:g} CPUs find no room for {len(left)} of them on {len(nodes)} node(s) with {has}: "
            "lower --workers, --threads or --gpus, or add nodes"
        )
    return {"fewest": fewest, "most": most, "cpus": booked["CPU"], "gpus": gpus, "threads": threads}


# The stream


def _tasks(
    part: str, units: Sequence[Any], source: SourceConfig | None, store: RunStore, say: Say
) -> list[Task]:
    assert source is not None
    there = read_tasks(store, part)
    if there is not None:
        return there
    # A limit counts from the start of the corpus, so a single task reads until it is reached.
    packs = [units] if source.limit else pack(list(cut_large(units, source, FIELDS[part], say)))
    return write_tasks(store, part, packs)


def _stream(
    part: str,
    tasks: Sequence[Task],
    source: SourceConfig,
    config: PredictConfig,
    checkpoint: Checkpoint,
    thresholds: Thresholds,
    store: RunStore,
    workers: dict[str, Any],
    say: Say,
) -> tuple[int, float, dict[str, Counts]]:
    """Score the pieces without a file; returns rows, seconds, and predicted and accepted rows by label."""
    there = progress(store, part)
    open_tasks = [task for task in tasks if not there.is_done(task)]
    n_there = sum(len(there.pieces_of(task)) for task in tasks)
    kept = f", {n_there} piece(s) are finished" if n_there else ""
    say(f"{part}: reading {len(open_tasks)} of {len(tasks)} task(s){kept}")
    labels: dict[str, Counts] = {}
    for task in tasks if part == CORPUS else ():  # nobody is told the counts of gold
        for piece in there.pieces_of(task):
            file = task.piece_file(piece, config.format)
            _add(labels, results.count_labels(results.read(store, file, ["label", "accepted"])))
    if not open_tasks:
        return 0, 0.0, labels
    context = ray.data.DataContext.get_current()
    block_bytes, context.target_max_block_size = context.target_max_block_size, BLOCK_BYTES
    # The detectors warn about every actor that holds a model without reserving memory.
    context.issue_detectors_config.detectors = []
    try:
        answers = _build(open_tasks, there.pieces, source, config, checkpoint, thresholds, store, workers)
        return *_collect(part, answers, labels, say), labels
    finally:
        context.target_max_block_size = block_bytes


def _build(
    tasks: Sequence[Task],
    done: dict[int, frozenset[int]],
    source: SourceConfig,
    config: PredictConfig,
    checkpoint: Checkpoint,
    thresholds: Thresholds,
    store: RunStore,
    workers: dict[str, Any],
) -> Any:
    items = [{"task": pickle.dumps((task, done.get(task.number, frozenset())))} for task in tasks]
    reader = {
        "source": source,
        "labels": checkpoint.labels,
        "store": store,
        "piece_rows": config.piece_rows,
        "ending": _ending(tasks[0].part, config),
    }
    read: Any = _read  # Ray's annotation allows no further arguments
    # from_items needs no read task, which would reserve a whole CPU.
    pieces = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        read, batch_size=1, num_cpus=READING_CPUS, fn_kwargs=reader
    )
    return pieces.map_batches(
        Predictor,
        fn_constructor_args=(config, checkpoint, thresholds, store, workers),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=workers["fewest"],
            max_size=workers["most"],
            max_tasks_in_flight_per_actor=PIECES_IN_FLIGHT,
        ),
        num_cpus=workers["cpus"],
        num_gpus=workers["gpus"] or None,
    ).iter_rows()


def _ending(part: str, config: PredictConfig) -> str:
    """Of the files of a part: thresholds are fitted on those of gold, so they are always parquet."""
    return config.format if part == CORPUS else "parquet"


def _collect(
    part: str, answers: Iterator[dict[str, Any]], labels: dict[str, Counts], say: Say
) -> tuple[int, float]:
    """Wait for all answers, and add to the counts by label; returns the number of rows scored, and the
    seconds from the first piece's start to the last one's end.
    """
    rows, first, last, said = 0, float("inf"), 0.0, time.monotonic()
    for row in answers:
        answer = json.loads(row["answer"])
        if "error" in answer:
            raise ConfigError(answer["error"])
        rows += answer["rows"]
        _add(labels, answer["labels"])
        first, last = min(first, answer["began"]), max(last, answer["ended"])
        if time.monotonic() - said > PROGRESS_SECONDS:
            said = time.monotonic()
            say(f"{part}: {rows:,} rows, {rows / max(last - first, 1e-9):.0f} texts/s")
    return rows, max(0.0, last - first)


def _add(total: dict[str, Counts], more: Mapping[str, Sequence[int]]) -> None:
    for label, (predicted, accepted) in more.items():
        before = total.get(label, (0, 0))
        total[label] = (before[0] + predicted, before[1] + accepted)


# Passed from reading tasks to actors, one row per piece: its file name and texts, or an error.
_PIECE = pa.schema([("file", pa.string()), ("texts", pa.binary()), ("error", pa.string())])


def _read(
    batch: dict[str, np.ndarray],
    source: SourceConfig,
    labels: Sequence[str],
    store: RunStore,
    piece_rows: int,
    ending: str,
) -> Iterator[pa.Table]:
    """The pieces of one task. A user's mistake is passed on as data, without a Ray traceback."""
    task, done = pickle.loads(batch["task"][0])
    try:
        for number, texts in read_pieces(task, source, labels, store, piece_rows, done):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, texts.schema) as stream:
                stream.write_table(texts)
            yield _piece_row(task.piece_file(number, ending), sink.getvalue().to_pybytes(), "")
    except ConfigError as error:
        yield _piece_row("", b"", str(error))


def _piece_row(*values: object) -> pa.Table:
    columns = [pa.array([value], f.type) for value, f in zip(values, _PIECE, strict=True)]
    return pa.Table.from_arrays(columns, schema=_PIECE)


class Predictor:
    """An actor with a copy of the model: turns pieces into prediction files."""

    def __init__(
        self,
        config: PredictConfig,
        checkpoint: Checkpoint,
        thresholds: Thresholds,
        store: RunStore,
        workers: dict[str, Any],
    ) -> None:
        import torch

        self.config, self.checkpoint = config, checkpoint
        self.thresholds, self.store = thresholds, store
        self.error = ""
        if not workers["gpus"]:
            torch.set_num_threads(workers["threads"])
            os.environ.setdefault("RAYON_NUM_THREADS", str(workers["threads"]))  # threads of the tokenizer
        try:
            device = torch.device("cuda" if workers["gpus"] else "cpu")
            self.student = load(checkpoint, config.dtype, device)
        except ConfigError as error:
            self.error = str(error)

    def __call__(self, batch: pa.Table) -> pa.Table:
        error = self.error or batch["error"][0].as_py()
        answer = {"error": error} if error else self._predict(batch)
        return pa.table({"answer": [json.dumps(answer)]})

    def _predict(self, batch: pa.Table) -> dict[str, Any]:
        began = time.time()
        with pa.ipc.open_stream(batch["texts"][0].as_buffer()) as stream:
            texts = stream.read_all()
        p_NC = score(
            self.student, texts["text"].to_pylist(), self.checkpoint.max_tokens, self.config.batch_tokens
        )
        if not np.isfinite(p_NC).all():
            return {
                "error": f"MODEL: {self.checkpoint.source!r} gives no finite probabilities: has it diverged?"
            }
        table = results.predictions(texts, p_NC, self.thresholds, self.config.with_text)
        results.write(self.store, batch["file"][0].as_py(), table)
        labels = results.count_labels(table)
        return {"rows": len(texts), "labels": labels, "began": began, "ended": time.time()}


# Thresholds and counts


def _fit(config: PredictConfig, given: Thresholds, store: RunStore, say: Say) -> Thresholds:
    gold_N, p_NC = results.read_gold(store, len(given.labels))
    if not gold_N.size:
        raise ConfigError(
            f"--gold: {config.gold.uri if config.gold else ''!r} has no usable text with a true label: check "
            f"--gold-text and --label, and look into quarantine/ of {config.out}"
        )
    wanted, delta = config.target_precision, config.delta
    fitted, measured = results.fit(given, p_NC, gold_N, wanted, tuple(config.thresholds), delta)
    store.write_json(results.THRESHOLDS, results.as_dict(fitted, measured, wanted, delta, int(gold_N.size)))
    say(f"thresholds on {gold_N.size:,} gold texts:")
    for label, one in measured.items():
        say(f"  {results.describe(label, one, wanted)}")
    return fitted


def _row_counts(part: str, tasks: Sequence[Task], store: RunStore) -> dict[str, Any]:
    """Rows read, predicted and rejected, over all starts; every row read is one of the latter two."""
    there = progress(store, part)
    undone = [task.stem for task in tasks if not there.is_done(task)]
    assert not undone, f"not all pieces of {undone} are in place"
    notes = [there.notes[task.number] for task in tasks]
    reasons = sum((Counter(note.reasons) for note in notes), Counter[str]())
    rows_in, predicted = sum(note.rows_in for note in notes), sum(sum(note.pieces) for note in notes)
    assert rows_in == predicted + reasons.total()
    return {"rows_in": rows_in, "predicted": predicted, "quarantined": dict(sorted(reasons.items()))}


def _say_rows(part: str, counts: dict[str, Any], say: Say) -> None:
    refused = sum(counts["quarantined"].values())
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts["quarantined"].items())
    say(
        f"{part}: {counts['rows_in']:,} rows in = {counts['predicted']:,} predicted + {refused:,} in "
        f"quarantine{f' ({reasons})' if reasons else ''}"
    )
