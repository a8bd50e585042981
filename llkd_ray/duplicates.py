"""Texts that repeat an earlier one: found by their hashes, taken out of the staged shards, in linear time.

One task per 4 million rows reads its share of the hashes of every lot and notes which rows must go; one task
per lot that loses rows writes it anew. Neither reads what it does not need.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from llkd_ray import schemas
from llkd_ray.cleaning import START_CHARS
from llkd_ray.hashes import buckets, read_hashes, repeats
from llkd_ray.room import READING_CPUS
from llkd_ray.staging import GROUP_ROWS, STAGING, Lot, Staged
from llkd_ray.store import QUARANTINE_DIR, RunStore

BUCKET_ROWS = 4_000_000  # hashes that one task compares: about 250 MB at work


def find_repeats(store: RunStore, lots: Sequence[tuple[str, Lot]]) -> np.ndarray:
    """int64[B, L]: how many rows each bucket found in each lot that must go.

    Which ones they are is in the bucket's file: for each row its position in the lot, shifted left
    by one bit, and the bit set where it leaked; lot after lot.
    """
    shares = buckets(sum(lot.rows for _, lot in lots), BUCKET_ROWS)
    shared: Any = ray.put(list(lots))
    lost = ray.get([_repeats_in_bucket.remote(store, shared, b, share) for b, share in enumerate(shares)])
    return np.stack(lost)


def _bucket_file(bucket: int) -> str:
    return f"{STAGING}/repeats-{bucket:05d}.int64"


@ray.remote(num_cpus=READING_CPUS)
def _repeats_in_bucket(
    store: RunStore, lots: Sequence[tuple[str, Lot]], bucket: int, share: tuple[int, int]
) -> np.ndarray:
    """int64[L]: rows to drop from each lot, among those whose hash falls into the bucket's partitions."""
    with ThreadPoolExecutor(16) as pool:  # many small reads, on an object store each takes its time
        records = list(pool.map(lambda one: read_hashes(store, one[1].hashes_file, *share), lots))
    lot_N = np.repeat(np.arange(len(lots)), [one.size for one in records])
    record_N = np.concatenate(records)
    test_L = np.array([part == "test" for part, _ in lots])
    repeat_R, leaked_R = repeats(record_N["hash"], test_L[lot_N])
    marks_R = record_N["row"][repeat_R].astype("<i8") << 1 | leaked_R
    store.write_bytes(_bucket_file(bucket), marks_R.astype("<i8").tobytes())
    return np.bincount(lot_N[repeat_R], minlength=len(lots))


def settle(
    store: RunStore, lots: Sequence[tuple[str, Lot]], lost_BL: np.ndarray
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Counter[str]]]:
    """Put the final shards in place; returns them by part, and what was dropped by part and reason."""
    start_BL = np.cumsum(lost_BL, axis=1) - lost_BL
    whole = [
        shard
        for (_, lot), lost in zip(lots, lost_BL.sum(axis=0), strict=True)
        if not lost
        for shard in lot.shards
    ]
    thinned: dict[int, Any] = {}
    for index, (_, lot) in enumerate(lots):
        marks = [
            (int(b), int(start_BL[b, index]), int(lost_BL[b, index])) for b in lost_BL[:, index].nonzero()[0]
        ]
        if marks:
            thinned[index] = _thin_out.remote(store, lot, marks)
    with ThreadPoolExecutor(16) as pool:  # on an object store a move is a copy, which takes its time
        list(pool.map(lambda shard: _move(store, shard), whole))
    shards: dict[str, list[dict[str, Any]]] = {"pool": [], "test": []}
    dropped: dict[str, Counter[str]] = {"pool": Counter(), "test": Counter()}
    for index, (part, lot) in enumerate(lots):
        kept_S = [shard.rows for shard in lot.shards]
        if index in thinned:
            kept_S, reasons = ray.get(thinned.pop(index))
            dropped[part].update(reasons)
        shards[part] += [
            {"file": _target(shard), "rows": kept}
            for shard, kept in zip(lot.shards, kept_S, strict=True)
            if kept
        ]
    return shards, dropped


def _target(shard: Staged) -> str:
    return f"examples/{shard.name}.parquet"


def _move(store: RunStore, shard: Staged) -> None:
    store.fs.move(store.path(shard.file), store.path(_target(shard)))


@ray.remote(num_cpus=READING_CPUS)
def _thin_out(
    store: RunStore, lot: Lot, marks: Sequence[tuple[int, int, int]]
) -> tuple[list[int], Mapping[str, int]]:
    """Put the shards of a lot in place without its repeated rows.

    Returns the rows left by shard, and those dropped by reason. ``marks``: bucket, first mark and number of
    marks in that bucket's file.
    """
    pieces = []
    for bucket, start, count in marks:
        with store.fs.open_input_file(store.path(_bucket_file(bucket))) as file:
            pieces.append(np.frombuffer(file.read_at(8 * count, 8 * start), dtype="<i8"))
    mark_R = np.sort(np.concatenate(pieces))
    end_S = np.cumsum([shard.rows for shard in lot.shards])
    of_shard = np.split(mark_R, np.searchsorted(mark_R >> 1, end_S[:-1]))
    reasons: Counter[str] = Counter()
    kept_S = []
    for shard, end, shard_mark_R in zip(lot.shards, end_S, of_shard, strict=True):
        kept_S.append(shard.rows - shard_mark_R.size)
        if shard_mark_R.size:
            position_R = (shard_mark_R >> 1) - (end - shard.rows)
            reasons.update(_rewrite(store, shard, position_R, (shard_mark_R & 1).astype(bool)))
        elif not store.exists(_target(shard)):  # it does where this task was begun before
            _move(store, shard)
    return kept_S, dict(reasons)


def _rewrite(
    store: RunStore, shard: Staged, position_R: np.ndarray, leaked_R: np.ndarray
) -> Mapping[str, int]:
    """Write a shard without some of its rows, which go to the quarantine; returns these by reason."""
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
    refused = pa.table(columns, schema=schemas.QUARANTINE)
    store.write_table(f"{QUARANTINE_DIR}/{shard.name}-repeated.parquet", refused)
    return Counter(reason_R.tolist())
