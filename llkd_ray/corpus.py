"""From the user's files to EXAMPLES: clean, de-duplicate, number. Memory does not grow with the corpus.

1. Read: one Ray Data task per 32 MiB or file writes cleaned texts to staging shards, refused rows to the
   quarantine, and gives back only counts. A shard is named by its task, so order does not depend on
   scheduling.
2. De-duplicate: one task per 4 million rows looks at their share of the 64-bit text hashes, and notes
   which rows repeat an earlier one. The test set comes first, so a pool text that is in it goes.
3. Settle: shards that lose rows are rewritten, the others moved; the index is written last.
"""

from __future__ import annotations

import json
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import DataContext

from llkd_ray import schemas
from llkd_ray.cleaning import START_CHARS, Cleaner, Refusal, start_of_text
from llkd_ray.config import Config, ConfigError, SourceConfig
from llkd_ray.readers import RawRow, Unit, read_rows
from llkd_ray.sources import pack, plan
from llkd_ray.staging import GROUP_ROWS, STAGING, Staged, StagingWriter
from llkd_ray.store import EXAMPLES_INDEX, QUARANTINE_DIR, Examples, RunStore

TASK_CPUS = 0.5  # below 1, so that tasks find room beside actors that hold most of a small machine
BUCKET_ROWS = 4_000_000  # hashes that one task compares: about 200 MB at work
SAY_SECONDS = 10.0  # between two words on progress


def ingest(config: Config, store: RunStore, say: Callable[[str], None] = print) -> Examples:
    """Write EXAMPLES of ``config.corpus`` (the pool) and ``config.test``; Ray must be initialised.

    Where the index is there already, nothing is done; a half-finished ingestion starts over. The same
    input gives the same rows in the same order. Two texts count as the same where their 64-bit hashes
    agree: among 100 million different texts, the chance that one is lost that way is about 1 in 4,000.

    Raises :class:`ConfigError` where files or columns are not there, a file cannot be read, or no text
    is left.
    """
    if store.exists(EXAMPLES_INDEX):
        return Examples.open(store)
    # The test set first: of equal texts the earliest stays.
    sources = {"test": config.test, "pool": config.corpus}
    present = {part: source for part, source in sources.items() if source is not None}
    items = [item for part, source in present.items() for item in _read_items(part, source)]
    _wipe(store)
    say(f"reading the corpus in {len(items)} task(s)")
    summaries = _read(items, present, config.labels.names, store, say)

    rows_in = {part: sum(s["rows_in"] for s in summaries if s["part"] == part) for part in sources}
    quarantined: dict[str, Counter[str]] = {part: Counter() for part in sources}
    for summary in summaries:
        quarantined[summary["part"]].update(summary["reasons"])
    staged = [Staged(s["part"], **shard) for s in summaries for shard in s["shards"]]
    for part, source in present.items():
        kept = sum(shard.rows for shard in staged if shard.part == part)
        _require_rows(part, source, kept, rows_in[part], quarantined[part])

    lost_BS = _find_repeats(store, staged)
    shards, dropped = _settle(store, staged, lost_BS)
    for part, source in present.items():
        quarantined[part].update(dropped[part])
        kept = sum(shard["rows"] for shard in shards[part])
        _require_rows(part, source, kept, rows_in[part], quarantined[part])
        refused = quarantined[part].total()
        assert rows_in[part] == kept + refused, f"{part}: {rows_in[part]} read, {kept} + {refused} left"
        reasons = f" ({_list(quarantined[part])})" if refused else ""
        say(f"{part}: {rows_in[part]:,} rows read, {kept:,} kept, {refused:,} in quarantine{reasons}")
    store.fs.delete_dir(store.path(STAGING))
    counts = {part: dict(sorted(reasons.items())) for part, reasons in quarantined.items()}
    store.write_json(EXAMPLES_INDEX, {**shards, "rows_in": rows_in, "quarantined": counts})
    return Examples.open(store)


def _field(part: str) -> str:
    """The section of the configuration that a part comes from."""
    return "corpus" if part == "pool" else part


def _list(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))


def _require_rows(
    part: str, source: SourceConfig, kept: int, rows_in: int, reasons: Mapping[str, int]
) -> None:
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


def _wipe(store: RunStore) -> None:
    """Remove what an ingestion left that did not come to its end."""
    store.fs.delete_dir_contents(store.path("examples"), missing_dir_ok=True)
    for name in store.names(QUARANTINE_DIR):
        if name.startswith(("pool-", "test-")):
            store.delete(f"{QUARANTINE_DIR}/{name}")


# 1. Read


def _read_items(part: str, source: SourceConfig) -> list[dict[str, Any]]:
    units = plan(source, _field(part))
    # A limit counts from the front, so one task reads until it is reached.
    packs = [units] if source.limit else pack(units)
    return [{"part": part, "task": number, "units": pickle.dumps(one)} for number, one in enumerate(packs)]


def _read(
    items: Sequence[dict[str, Any]],
    sources: Mapping[str, SourceConfig],
    labels: Sequence[str],
    store: RunStore,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Run the read tasks; their summaries in the order of ``items``, whatever the order of running."""
    if not items:
        return []
    place = {(item["part"], item["task"]): index for index, item in enumerate(items)}
    summaries: dict[int, dict[str, Any]] = {}
    last = time.monotonic()
    task: Any = _read_task  # Ray's annotations know nothing of fn_kwargs
    with _quiet_ray_data():
        # from_items needs no read task, which would ask for a whole CPU.
        done = ray.data.from_items(list(items), override_num_blocks=len(items)).map_batches(
            task,
            batch_size=1,
            num_cpus=TASK_CPUS,
            fn_kwargs={"sources": dict(sources), "labels": tuple(labels), "store": store},
        )
        for row in done.iter_rows():
            summary = json.loads(row["summary"])
            if "error" in summary:
                raise ConfigError(summary["error"])
            summaries[place[summary["part"], summary["task"]]] = summary
            if time.monotonic() - last > SAY_SECONDS:
                last = time.monotonic()
                rows = sum(one["rows_in"] for one in summaries.values())
                say(f"read {rows:,} rows in {len(summaries)} of {len(items)} task(s)")
    assert len(summaries) == len(items), f"{len(summaries)} of {len(items)} read tasks answered"
    return [summaries[index] for index in range(len(items))]


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """No progress bars: they would write over the run's own words."""
    context = DataContext.get_current()
    before = context.enable_progress_bars, context.print_on_execution_start
    context.enable_progress_bars = context.print_on_execution_start = False
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before


def _read_task(
    batch: dict[str, np.ndarray],
    sources: Mapping[str, SourceConfig],
    labels: Sequence[str],
    store: RunStore,
) -> dict[str, np.ndarray]:
    """Stage one item. A user's mistake comes back as data, so that no Ray traceback is around it."""
    part, task = str(batch["part"][0]), int(batch["task"][0])
    try:
        summary = _stage(part, task, pickle.loads(batch["units"][0]), sources[part], labels, store)
    except ConfigError as error:
        summary = {"error": str(error)}
    return {"summary": np.array([json.dumps(summary)], dtype=object)}


def _stage(
    part: str,
    task: int,
    units: Sequence[Unit],
    source: SourceConfig,
    labels: Sequence[str],
    store: RunStore,
) -> dict[str, Any]:
    """Clean the rows of some units into staging shards and quarantine files; returns the counts."""

    def rows() -> Iterator[tuple[str, RawRow]]:
        for unit in units:
            for row in read_rows(unit, source, _field(part), labels):
                yield unit.source, row

    cleaner = Cleaner(source, _field(part), labels)
    writer = StagingWriter(store, f"{part}-{task:06d}")
    rows_in = 0
    for name, row in islice(rows(), source.limit):
        rows_in += 1
        result = cleaner(row)
        if isinstance(result, Refusal):
            writer.refuse(name, row.position, result, start_of_text(row.text))
        else:
            writer.keep(name, row.position, result)
    writer.flush()
    return {
        "part": part,
        "task": task,
        "rows_in": rows_in,
        "shards": writer.shards,
        "reasons": writer.reasons,
    }


# 2. De-duplicate


def repeats(hash_N: np.ndarray, in_test_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows whose hash stands earlier already: int64[R] ascending, and bool[R] whether it leaked.

    A row leaked where it is not of the test set and the first row with its hash is.
    """
    order_N = np.argsort(hash_N, kind="stable")
    sorted_N = hash_N[order_N]
    starts_N = np.ones(hash_N.size, dtype=bool)
    starts_N[1:] = sorted_N[1:] != sorted_N[:-1]
    run_N = np.maximum.accumulate(np.where(starts_N, np.arange(hash_N.size), 0))
    repeat_R, first_R = order_N[~starts_N], order_N[run_N[~starts_N]]
    leaked_R = in_test_N[first_R] & ~in_test_N[repeat_R]
    ascending = np.argsort(repeat_R)
    return repeat_R[ascending], leaked_R[ascending]


def _find_repeats(store: RunStore, staged: Sequence[Staged]) -> np.ndarray:
    """int64[B, S]: how many rows each bucket found in each shard that must go.

    Which ones they are is in the bucket's file: for each row its position in the shard, shifted left
    by one bit, and the bit set where it leaked; shard after shard.
    """
    n_buckets = max(1, -(-sum(shard.rows for shard in staged) // BUCKET_ROWS))
    shards: Any = ray.put(list(staged))
    lost = ray.get([_repeats_in_bucket.remote(store, shards, b, n_buckets) for b in range(n_buckets)])
    return np.stack(lost)


def _bucket_file(bucket: int) -> str:
    return f"{STAGING}/repeats-{bucket:05d}.int64"


@ray.remote(num_cpus=TASK_CPUS)
def _repeats_in_bucket(store: RunStore, staged: Sequence[Staged], bucket: int, n_buckets: int) -> np.ndarray:
    """int64[S]: rows to drop from each shard, among those whose hash falls into the bucket."""
    hashes, positions = [], []
    for shard in staged:
        hash_N = store.read_table(shard.keys_file, ["hash"])["hash"].to_numpy()
        mine = np.flatnonzero(hash_N % np.uint64(n_buckets) == bucket)
        hashes.append(hash_N[mine])
        positions.append(mine.astype(np.int32))
    shard_N = np.repeat(np.arange(len(staged), dtype=np.int32), [one.size for one in positions])
    test_S = np.array([shard.part == "test" for shard in staged])
    repeat_R, leaked_R = repeats(np.concatenate(hashes), test_S[shard_N])
    marks_R = np.concatenate(positions)[repeat_R].astype("<i8") << 1 | leaked_R
    store.write_bytes(_bucket_file(bucket), marks_R.astype("<i8").tobytes())
    return np.bincount(shard_N[repeat_R], minlength=len(staged))


# 3. Settle


def _settle(
    store: RunStore, staged: Sequence[Staged], lost_BS: np.ndarray
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Counter[str]]]:
    """Put the final shards in place; returns them by part, and what was dropped by part and reason."""
    shards: dict[str, list[dict[str, Any]]] = {"pool": [], "test": []}
    dropped: dict[str, Counter[str]] = {"pool": Counter(), "test": Counter()}
    end_BS = np.cumsum(lost_BS, axis=1)
    moves, rewrites = [], []
    for index, shard in enumerate(staged):
        lost_B = lost_BS[:, index]
        kept = shard.rows - int(lost_B.sum())
        target = f"examples/{shard.part}-{len(shards[shard.part]):05d}.parquet" if kept else None
        if target:
            shards[shard.part].append({"file": target, "rows": kept})
        if kept == shard.rows:
            moves.append((store.path(shard.file), store.path(f"{target}")))
        else:
            marks = [(int(b), int(end_BS[b, index] - lost_B[b]), int(lost_B[b])) for b in lost_B.nonzero()[0]]
            rewrites.append((shard.part, _rewrite.remote(store, shard, target, marks)))
    with ThreadPoolExecutor(16) as pool:  # on an object store a move is a copy, which takes its time
        list(pool.map(lambda move: store.fs.move(*move), moves))
    for part, reference in rewrites:
        dropped[part].update(ray.get(reference))
    return shards, dropped


@ray.remote(num_cpus=TASK_CPUS)
def _rewrite(
    store: RunStore, shard: Staged, target: str | None, marks: Sequence[tuple[int, int, int]]
) -> Mapping[str, int]:
    """Write a shard without its repeated rows, which go to the quarantine; returns rows by reason.

    ``marks``: bucket, first mark and number of marks in that bucket's file. Without a target no row
    is left.
    """
    pieces = []
    for bucket, start, count in marks:
        with store.fs.open_input_file(store.path(_bucket_file(bucket))) as file:
            pieces.append(np.frombuffer(file.read_at(8 * count, 8 * start), dtype="<i8"))
    mark_R = np.sort(np.concatenate(pieces))
    position_R = mark_R >> 1
    leaked_R = (mark_R & 1).astype(bool)
    table = store.read_table(shard.file)
    keep_N = np.ones(shard.rows, dtype=bool)
    keep_N[position_R] = False
    if target:
        store.write_table(target, table.filter(pa.array(keep_N)), GROUP_ROWS)
    keys = store.read_table(shard.keys_file, ["source", "position"]).take(pa.array(position_R))
    reason_R = np.where(leaked_R, "in_test_set", "duplicate")
    detail_R = np.where(leaked_R, "the test set holds the same text", "an earlier row holds the same text")
    starts = pc.utf8_slice_codeunits(table["text"].take(pa.array(position_R)), 0, START_CHARS)
    columns = [keys["source"], keys["position"], pa.array(reason_R), pa.array(detail_R), starts]
    refused = pa.table(columns, schema=schemas.QUARANTINE)
    store.write_table(f"{QUARANTINE_DIR}/{shard.name}-repeated.parquet", refused)
    return dict(Counter(reason_R.tolist()))
