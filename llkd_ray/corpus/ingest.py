"""Writes the user's files as EXAMPLES: clean, de-duplicate, number. Memory does not grow with the corpus.

1. Read: one Ray Data task per 32 MiB writes cleaned texts to staging shards and refused rows to the
   quarantine, and returns only counts. A shard is named after its task, so the order does not depend on
   scheduling. Large line-based files are scanned first, so that they can be read in pieces as well.
2. De-duplicate: texts that repeat an earlier one are found by their hashes. The test set comes first, so a
   pool text that also occurs in the test set is dropped.
3. Finalise: shards that lose rows are rewritten, the others are moved. The index is written last.

One task per 4 million rows reads its share of the hashes of every group and records which rows to drop; one
task per group that loses rows rewrites the group. Neither reads more than it needs.

Shapes in names: B buckets of hashes, G groups of shards, S shards, R repeated rows, N rows.
"""

from __future__ import annotations

import json
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import DataContext

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import Config, SourceConfig
from llkd_ray.corpus import sources
from llkd_ray.corpus.cleaning import START_CHARS, check_gold
from llkd_ray.corpus.readers import Unit, describe_format, reading
from llkd_ray.corpus.sources import ByteRange, Found, byte_ranges, pack, pieces, plan, scan
from llkd_ray.corpus.staging import (
    GROUP_ROWS,
    STAGING,
    ShardGroup,
    StagedShard,
    StagingWriter,
    buckets,
    read_hashes,
    repeats,
)
from llkd_ray.resources import READING_CPUS
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import EXAMPLES_INDEX, QUARANTINE_DIR, RunStore
from llkd_ray.storage.tables import Examples

REPORT_SECONDS = 10.0  # between two progress reports


def ingest(config: Config, store: RunStore, say: Callable[[str], None] = print) -> Examples:
    """Write EXAMPLES of ``config.corpus`` (the pool) and ``config.test``; Ray must be initialised.

    Does nothing if the index already exists; an unfinished ingestion starts over. The same input gives the
    same rows in the same order. Two texts count as equal if their 64-bit hashes are equal: among 100 million
    different texts, the probability that one is lost to a collision is about 1 in 4,000.

    Raises :class:`ConfigError` if files or columns are missing, a file cannot be read, or no text is left.
    """
    if store.exists(EXAMPLES_INDEX):
        return Examples.open(store)
    # The test set comes first, because the first of several equal texts is kept.
    parts = {"test": config.test, "pool": config.corpus}
    present = {part: source for part, source in parts.items() if source is not None}
    items = [item for part, source in present.items() for item in _read_items(part, source, say)]
    _delete_leftovers(store)
    say(f"reading the corpus in {len(items)} task(s)")
    summaries = _read(items, present, config.labels.names, store, say)

    rows_in = {part: sum(s["rows_in"] for s in summaries if s["part"] == part) for part in parts}
    quarantined: dict[str, Counter[str]] = {part: Counter() for part in parts}
    for summary in summaries:
        quarantined[summary["part"]].update(summary["reasons"])
    for part, source in present.items():
        unknown = sum((Counter(s["unknown_gold"]) for s in summaries if s["part"] == part), Counter())
        check_gold(_field(part), source.gold, config.labels.names, unknown, rows_in[part])
    groups = [(s["part"], ShardGroup.from_dict(group)) for s in summaries for group in s["groups"]]
    for part, source in present.items():
        kept = sum(group.rows for of, group in groups if of == part)
        _check_rows(part, source, kept, rows_in[part], quarantined[part])

    lost_BG = find_repeats(store, groups)
    shards, dropped = finalise(store, groups, lost_BG)
    for part, source in present.items():
        quarantined[part].update(dropped[part])
        kept = sum(shard["rows"] for shard in shards[part])
        _check_rows(part, source, kept, rows_in[part], quarantined[part])
        refused = quarantined[part].total()
        assert rows_in[part] == kept + refused, f"{part}: {rows_in[part]} read, {kept} + {refused} left"
        reasons = f" ({_list(quarantined[part])})" if refused else ""
        say(f"{part}: {rows_in[part]:,} rows read, {kept:,} kept, {refused:,} in quarantine{reasons}")
    store.delete_folder(STAGING)
    counts = {part: dict(sorted(reasons.items())) for part, reasons in quarantined.items()}
    store.write_json(EXAMPLES_INDEX, {**shards, "rows_in": rows_in, "quarantined": counts})
    return Examples.open(store)


def _field(part: str) -> str:
    """The configuration section that a part comes from."""
    return "corpus" if part == "pool" else part


def _list(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))


def _check_rows(part: str, source: SourceConfig, kept: int, rows_in: int, reasons: Mapping[str, int]) -> None:
    if kept:
        return
    uri = ", ".join(source.uris)
    if rows_in == 0:
        remedy = f"is any row as {_field(part)}.where asks?" if source.where else "put rows into the files"
        raise ConfigError(f"{_field(part)}.uri: {uri!r} holds no rows: {remedy}")
    raise ConfigError(
        f"{_field(part)}.uri: {uri!r} gave no usable text: {rows_in:,} rows read, in quarantine: "
        f"{_list(reasons)}; check {_field(part)}.text and look into {QUARANTINE_DIR}/ of the run"
    )


def _delete_leftovers(store: RunStore) -> None:
    """Delete the files of an unfinished ingestion."""
    store.delete_folder("examples")
    for name in store.names(QUARANTINE_DIR):
        if name.startswith(("pool-", "test-")):
            store.delete(f"{QUARANTINE_DIR}/{name}")


# 1. Read


def _read_items(part: str, source: SourceConfig, say: Callable[[str], None]) -> list[dict[str, Any]]:
    units = plan(source, _field(part))
    if assumed := describe_format(units):
        say(f"{_field(part)}: {assumed}")
    # A limit counts rows from the start, so a single task reads until it is reached.
    packs = [units] if source.limit else pack(list(cut_large(units, source, _field(part), say)))
    return [{"part": part, "task": number, "units": pickle.dumps(one)} for number, one in enumerate(packs)]


def cut_large(
    units: Sequence[Unit], source: SourceConfig, field: str, say: Callable[[str], None]
) -> Iterator[Unit]:
    """The units, with large line-based files cut into pieces."""
    cuts = [byte_ranges(unit, sources.TASK_BYTES) for unit in units]
    items = [
        {"byte_range": pickle.dumps(byte_range), "field": field, "max_chars": source.max_chars}
        for cut in cuts
        for byte_range in cut
    ]
    if items:
        say(f"finding where {sum(map(bool, cuts))} large file(s) can be cut, in {len(items)} task(s)")
    scanned = iter(sorted(_run(_scan_task, items)))
    for unit, cut in zip(units, cuts, strict=True):
        if not cut:
            yield unit
            continue
        found = [[Found(**one) for one in next(scanned)[1]["found"]] for _ in cut]
        with reading(unit, field):
            yield from pieces(list(zip(cut, found, strict=True)), source.max_chars)


def _scan_task(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    def found() -> dict[str, Any]:
        byte_range: ByteRange = pickle.loads(batch["byte_range"][0])
        with reading(byte_range.unit, str(batch["field"][0])):
            return {"found": [asdict(one) for one in scan(byte_range, int(batch["max_chars"][0]))]}

    return _as_answer(batch, found)


def _read(
    items: Sequence[dict[str, Any]],
    present: Mapping[str, SourceConfig],
    labels: Sequence[str],
    store: RunStore,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Run the read tasks and return their summaries in the order of ``items``, regardless of scheduling."""
    summaries: dict[int, dict[str, Any]] = {}
    last = time.monotonic()
    arguments = {"present": dict(present), "labels": tuple(labels), "store": store}
    for index, summary in _run(_read_task, items, **arguments):
        summaries[index] = summary
        if time.monotonic() - last > REPORT_SECONDS:
            last = time.monotonic()
            rows = sum(one["rows_in"] for one in summaries.values())
            say(f"read {rows:,} rows in {len(summaries)} of {len(items)} task(s)")
    return [summaries[index] for index in range(len(items))]


def _run(
    task: Any, items: Sequence[dict[str, Any]], **arguments: Any
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Run one task for each item; yields the item's index and its result in order of completion.

    Raises the :class:`ConfigError` of the first task that returns one.
    """
    if not items:
        return
    numbered = [{**item, "place": place} for place, item in enumerate(items)]
    answers = 0
    with quiet_ray_data():
        # from_items needs no read task, which would request a whole CPU.
        done = ray.data.from_items(numbered, override_num_blocks=len(numbered)).map_batches(
            task, batch_size=1, num_cpus=READING_CPUS, fn_kwargs=arguments
        )
        for row in done.iter_rows():
            answer = json.loads(row["answer"])
            if "error" in answer:
                raise ConfigError(answer["error"])
            answers += 1
            yield int(row["place"]), answer
    assert answers == len(items), f"{answers} of {len(items)} tasks answered"


def _as_answer(batch: dict[str, np.ndarray], work: Callable[[], dict[str, Any]]) -> dict[str, np.ndarray]:
    """A task's return value. A ConfigError is returned as data, so that no Ray traceback surrounds it."""
    try:
        answer = work()
    except ConfigError as error:
        answer = {"error": str(error)}
    return {"place": batch["place"], "answer": np.array([json.dumps(answer)], dtype=object)}


@contextmanager
def quiet_ray_data() -> Iterator[None]:
    """Disable Ray Data's progress bars, which would overwrite the run's own output."""
    context = DataContext.get_current()
    before = context.enable_progress_bars, context.print_on_execution_start
    context.enable_progress_bars = context.print_on_execution_start = False
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before


def _read_task(
    batch: dict[str, np.ndarray],
    present: Mapping[str, SourceConfig],
    labels: Sequence[str],
    store: RunStore,
) -> dict[str, np.ndarray]:
    """Stage one item."""
    part, task = str(batch["part"][0]), int(batch["task"][0])
    units = pickle.loads(batch["units"][0])
    return _as_answer(batch, lambda: _stage(part, task, units, present[part], labels, store))


def _stage(
    part: str,
    task: int,
    units: Sequence[Unit],
    source: SourceConfig,
    labels: Sequence[str],
    store: RunStore,
) -> dict[str, Any]:
    """Clean the rows of some units, write staging shards and quarantine files, and return the counts."""

    writer = StagingWriter(store, f"{part}-{task:06d}")
    for kept in writer.clean(units, source, _field(part), labels):
        writer.keep(*kept)
    writer.flush()
    return {
        "part": part,
        "rows_in": writer.rows_in,
        "groups": [group.as_dict() for group in writer.groups],
        "reasons": writer.reasons,
        "unknown_gold": writer.unknown_gold,
    }


BUCKET_ROWS = 4_000_000  # hashes that one task compares: about 250 MB at its peak


def find_repeats(store: RunStore, groups: Sequence[tuple[str, ShardGroup]]) -> np.ndarray:
    """int64[B, G]: number of rows to drop that each bucket found in each group.

    The bucket's file says which rows they are, group by group: each row's position in the group, shifted
    left by one bit; the lowest bit is set for a pool row whose text is also in the test set (leaked).
    """
    shares = buckets(sum(group.rows for _, group in groups), BUCKET_ROWS)
    shared: Any = ray.put(list(groups))
    lost = ray.get([_repeats_in_bucket.remote(store, shared, b, share) for b, share in enumerate(shares)])
    return np.stack(lost)


def _bucket_file(bucket: int) -> str:
    return f"{STAGING}/repeats-{bucket:05d}.int64"


@ray.remote(num_cpus=READING_CPUS)
def _repeats_in_bucket(
    store: RunStore, groups: Sequence[tuple[str, ShardGroup]], bucket: int, share: tuple[int, int]
) -> np.ndarray:
    """int64[G]: rows to drop from each group, among those whose hash falls into the bucket's partitions."""
    with ThreadPoolExecutor(16) as pool:  # many small reads, and an object store is slow to answer each
        records = list(pool.map(lambda one: read_hashes(store, one[1].hashes_file, *share), groups))
    group_N = np.repeat(np.arange(len(groups)), [one.size for one in records])
    record_N = np.concatenate(records)
    test_G = np.array([part == "test" for part, _ in groups])
    repeat_R, leaked_R = repeats(record_N["hash"], test_G[group_N])
    marks_R = record_N["row"][repeat_R].astype("<i8") << 1 | leaked_R
    store.write_bytes(_bucket_file(bucket), marks_R.astype("<i8").tobytes())
    return np.bincount(group_N[repeat_R], minlength=len(groups))


def finalise(
    store: RunStore, groups: Sequence[tuple[str, ShardGroup]], lost_BG: np.ndarray
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Counter[str]]]:
    """Write the final shards; returns them by part, and the number of dropped rows by part and reason."""
    start_BG = np.cumsum(lost_BG, axis=1) - lost_BG
    whole = [
        shard
        for (_, group), lost in zip(groups, lost_BG.sum(axis=0), strict=True)
        if not lost
        for shard in group.shards
    ]
    rewritten: dict[int, Any] = {}
    for index, (_, group) in enumerate(groups):
        marks = [
            (int(b), int(start_BG[b, index]), int(lost_BG[b, index])) for b in lost_BG[:, index].nonzero()[0]
        ]
        if marks:
            rewritten[index] = _drop_repeats.remote(store, group, marks)
    with ThreadPoolExecutor(16) as pool:  # a move is a slow copy on an object store
        list(pool.map(lambda shard: _move(store, shard), whole))
    shards: dict[str, list[dict[str, Any]]] = {"pool": [], "test": []}
    dropped: dict[str, Counter[str]] = {"pool": Counter(), "test": Counter()}
    for index, (part, group) in enumerate(groups):
        kept_S = [shard.rows for shard in group.shards]
        if index in rewritten:
            kept_S, reasons = ray.get(rewritten.pop(index))
            dropped[part].update(reasons)
        shards[part] += [
            {"file": _target(shard), "rows": kept}
            for shard, kept in zip(group.shards, kept_S, strict=True)
            if kept
        ]
    return shards, dropped


def _target(shard: StagedShard) -> str:
    return f"examples/{shard.name}.parquet"


def _move(store: RunStore, shard: StagedShard) -> None:
    store.fs.move(store.path(shard.file), store.path(_target(shard)))


@ray.remote(num_cpus=READING_CPUS)
def _drop_repeats(
    store: RunStore, group: ShardGroup, marks: Sequence[tuple[int, int, int]]
) -> tuple[list[int], Mapping[str, int]]:
    """Write the final shards of a group without its repeated rows.

    Returns the number of remaining rows by shard, and of dropped rows by reason. ``marks``: bucket, first
    mark and number of marks in that bucket's file.
    """
    pieces = []
    for bucket, start, count in marks:
        marked = store.read_at(_bucket_file(bucket), 8 * count, 8 * start)
        pieces.append(np.frombuffer(marked, dtype="<i8"))
    mark_R = np.sort(np.concatenate(pieces))
    end_S = np.cumsum([shard.rows for shard in group.shards])
    of_shard = np.split(mark_R, np.searchsorted(mark_R >> 1, end_S[:-1]))
    reasons: Counter[str] = Counter()
    kept_S = []
    for shard, end, shard_mark_R in zip(group.shards, end_S, of_shard, strict=True):
        kept_S.append(shard.rows - shard_mark_R.size)
        if shard_mark_R.size:
            position_R = (shard_mark_R >> 1) - (end - shard.rows)
            reasons.update(_rewrite(store, shard, position_R, (shard_mark_R & 1).astype(bool)))
        elif not store.exists(_target(shard)):  # it exists if this task is a retry
            _move(store, shard)
    return kept_S, dict(reasons)


def _rewrite(
    store: RunStore, shard: StagedShard, position_R: np.ndarray, leaked_R: np.ndarray
) -> Mapping[str, int]:
    """Write a shard without its repeated rows, which go to the quarantine; returns their counts by reason."""
    table = store.read_table(shard.file)
    keep_N = np.ones(shard.rows, dtype=bool)
    keep_N[position_R] = False
    if keep_N.any():
        store.write_table(_target(shard), table.filter(pa.array(keep_N)), GROUP_ROWS)
    keys = store.read_table(shard.keys_file).take(pa.array(position_R))
    reason_R = np.where(leaked_R, "in_test_set", "duplicate")
    detail_R = np.where(leaked_R, "the test set holds the same text", "an earlier row holds the same text")
    starts = pc.utf8_slice_codeunits(table["text"].take(pa.array(position_R)), 0, START_CHARS)
    columns = [keys["source"], keys["position"], pa.array(reason_R), pa.array(detail_R), starts]
    refused = pa.table(columns, schema=tables.QUARANTINE)
    store.write_table(f"{QUARANTINE_DIR}/{shard.name}-repeated.parquet", refused)
    return Counter(reason_R.tolist())
