"""Staging: the files that a read task writes before repeated texts are known. Needs no Ray.

A hashes file holds the hashes of consecutive rows: the end of each of PARTITIONS partitions (little-endian
uint32), then RECORDs in ascending order of hash. A partition holds the hashes with the same top bits, and
adjacent partitions are read at once, so the time to find repeated texts is linear in the corpus size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from llkd_ray.config.schema import SourceConfig
from llkd_ray.corpus.cleaning import UNKNOWN_GOLD, Cleaner, Example, Refusal, show_gold, start_of_text
from llkd_ray.corpus.readers import RawRow, Unit, read_rows
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import QUARANTINE_DIR, RunStore

STAGING = "examples/staging"
SHARD_ROWS = 50_000
SHARD_CHARS = 16 << 20  # characters of texts and ids in one shard: at most 64 MiB
SHARD_GROUP_ROWS = 1_000_000  # approximate rows whose hashes share a file
GROUP_ROWS = 1024  # rows in a parquet row group, the smallest read of Examples.read
QUARANTINE_ROWS = 10_000  # rows in one file
MAX_VALUES = 50  # different unknown labels that are counted
# Stored next to each staging shard: what the quarantine needs to know about a repeated row.
KEYS = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class StagedShard:
    """A staging shard, with its files in STAGING."""

    name: str
    rows: int

    @property
    def file(self) -> str:
        return f"{STAGING}/{self.name}.parquet"

    @property
    def keys_file(self) -> str:
        return f"{STAGING}/{self.name}.keys.parquet"


@dataclass(frozen=True)
class ShardGroup:
    """Consecutive shards of one read task, whose hashes are in one file."""

    name: str
    shards: tuple[StagedShard, ...]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def hashes_file(self) -> str:
        return f"{STAGING}/{self.name}.hashes"

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the inverse of :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> ShardGroup:
        return cls(facts["name"], tuple(StagedShard(**shard) for shard in facts["shards"]))


class StagingWriter:
    """Buffers rows and writes a file whenever enough are collected."""

    def __init__(self, store: RunStore, stem: str) -> None:
        self._store = store
        self._stem = stem
        self._examples: list[Example] = []
        self._keys: list[tuple[str, int]] = []
        self._chars = 0
        self._shards: list[StagedShard] = []
        self._hashes_of_shards: list[np.ndarray] = []
        self._shard_files = 0
        self._refused: list[tuple[str, int, str, str, str]] = []
        self._quarantine_files = 0
        self.groups: list[ShardGroup] = []
        self.rows_in = 0
        self.reasons: Counter[str] = Counter()
        self.unknown_gold: Counter[str] = Counter()

    def clean(
        self, units: Sequence[Unit], source: SourceConfig, field: str, labels: Sequence[str]
    ) -> Iterator[tuple[str, RawRow, Example]]:
        """Read and clean the units' rows, at most ``source.limit``; yields source, row and example.

        Refused rows go to the quarantine. Raises :class:`ConfigError` if a file cannot be read to its end.
        """
        cleaner = Cleaner(source, field, labels)
        rows = ((unit.source, row) for unit in units for row in read_rows(unit, source, field, labels))
        for name, row in islice(rows, source.limit):
            self.rows_in += 1
            result = cleaner(row)
            if isinstance(result, Refusal):
                self.refuse(name, row.position, result, start_of_text(row.text))
                if result.reason == UNKNOWN_GOLD:
                    value = show_gold(row.gold)
                    is_kept = value in self.unknown_gold or len(self.unknown_gold) < MAX_VALUES
                    self.unknown_gold[value if is_kept else "others"] += 1
            else:
                yield name, row, result

    def keep(self, source: str, row: RawRow, example: Example) -> None:
        self._examples.append(example)
        self._keys.append((source, row.position))
        self._chars += len(example.text) + len(example.id)
        if len(self._examples) >= SHARD_ROWS or self._chars >= SHARD_CHARS:
            self._write_shard()

    def refuse(self, source: str, position: int, refusal: Refusal, start: str) -> None:
        self._refused.append((source, position, *refusal, start))
        self.reasons[refusal.reason] += 1
        if len(self._refused) >= QUARANTINE_ROWS:
            self._write_quarantine()

    def flush(self) -> None:
        if self._examples:
            self._write_shard()
        if self._shards:
            self._write_group()
        if self._refused:
            self._write_quarantine()

    def _write_shard(self) -> None:
        shard = StagedShard(f"{self._stem}-{self._shard_files:05d}", len(self._examples))
        self._store.write_table(shard.file, _table(self._examples, tables.EXAMPLES), GROUP_ROWS)
        self._store.write_table(shard.keys_file, _table(self._keys, KEYS))
        self._shard_files += 1
        self._shards.append(shard)
        self._hashes_of_shards.append(np.array([one.hash for one in self._examples], dtype=np.uint64))
        self._examples, self._keys, self._chars = [], [], 0
        if sum(one.rows for one in self._shards) >= SHARD_GROUP_ROWS:
            self._write_group()

    def _write_group(self) -> None:
        group = ShardGroup(f"{self._stem}-{len(self.groups):05d}", tuple(self._shards))
        write_hashes(self._store, group.hashes_file, np.concatenate(self._hashes_of_shards))
        self.groups.append(group)
        self._shards, self._hashes_of_shards = [], []

    def _write_quarantine(self) -> None:
        name = f"{QUARANTINE_DIR}/{self._stem}-{self._quarantine_files:05d}.parquet"
        self._store.write_table(name, _table(self._refused, tables.QUARANTINE))
        self._quarantine_files += 1
        self._refused = []


def _table(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)


PARTITION_BITS = 10
PARTITIONS = 1 << PARTITION_BITS
RECORD = np.dtype([("hash", "<u8"), ("row", "<u4")])
_ENDS = np.dtype("<u4")
_HEAD_BYTES = PARTITIONS * _ENDS.itemsize


def write_hashes(store: RunStore, relative: str, hash_N: np.ndarray) -> None:
    """Write the hashes (uint64[N]) of rows 0..N-1."""
    order_N = np.argsort(hash_N, kind="stable")
    record_N = np.empty(hash_N.size, dtype=RECORD)
    record_N["hash"], record_N["row"] = hash_N[order_N], order_N
    bounds = np.arange(1, PARTITIONS, dtype=np.uint64) << np.uint64(64 - PARTITION_BITS)
    end_P = np.append(np.searchsorted(record_N["hash"], bounds), hash_N.size)
    store.write_bytes(relative, end_P.astype(_ENDS).tobytes() + record_N.tobytes())


def read_hashes(store: RunStore, relative: str, first: int, end: int) -> np.ndarray:
    """RECORD[n]: the partitions [first, end) of a file; equal hashes are in row order."""
    end_P = np.concatenate([[0], np.frombuffer(store.read_at(relative, _HEAD_BYTES, 0), dtype=_ENDS)])
    start, stop = int(end_P[first]) * RECORD.itemsize, int(end_P[end]) * RECORD.itemsize
    return np.frombuffer(store.read_at(relative, stop - start, _HEAD_BYTES + start), dtype=RECORD)


def buckets(n_rows: int, bucket_rows: int) -> list[tuple[int, int]]:
    """Partitions [first, end) of each bucket, so that a bucket holds about ``bucket_rows`` of all rows."""
    count = min(PARTITIONS, max(1, -(-n_rows // bucket_rows)))
    edges = [PARTITIONS * number // count for number in range(count + 1)]
    return list(pairwise(edges))


def repeats(hash_N: np.ndarray, in_test_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose hash occurs in an earlier row: int64[R] ascending, and bool[R] whether the row leaked.

    A row leaked if it is not in the test set but the first row with its hash is.
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
