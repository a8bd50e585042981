"""Staging: what a read task leaves behind, before repeated texts are known. Needs no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from llkd_ray import schemas
from llkd_ray.cleaning import Example, Refusal
from llkd_ray.hashes import write_hashes
from llkd_ray.store import QUARANTINE_DIR, RunStore

STAGING = "examples/staging"
SHARD_ROWS = 50_000
SHARD_CHARS = 16 << 20  # of texts and ids in one shard: 64 MiB at most
LOT_ROWS = 1_000_000  # whose hashes are in one file, about
GROUP_ROWS = 1024  # the least that Examples.read reads for one row
QUARANTINE_ROWS = 10_000  # in one file

# Beside each staging shard: what the quarantine needs of a row that repeats another.
KEYS = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Staged:
    """A staging shard; its files are in STAGING."""

    name: str
    rows: int

    @property
    def file(self) -> str:
        return f"{STAGING}/{self.name}.parquet"

    @property
    def keys_file(self) -> str:
        return f"{STAGING}/{self.name}.keys.parquet"


@dataclass(frozen=True)
class Lot:
    """Neighbouring shards of one read task, whose hashes are in one file (see ``hashes``)."""

    name: str
    shards: tuple[Staged, ...]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def hashes_file(self) -> str:
        return f"{STAGING}/{self.name}.hashes"

    def as_dict(self) -> dict[str, Any]:
        """For JSON; :meth:`from_dict` backwards."""
        return asdict(self)

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Lot:
        return cls(facts["name"], tuple(Staged(**shard) for shard in facts["shards"]))


class StagingWriter:
    """Collects rows and writes a file whenever enough are together."""

    def __init__(self, store: RunStore, stem: str) -> None:
        self._store = store
        self._stem = stem
        self._examples: list[tuple[str, str, int]] = []
        self._keys: list[tuple[str, int]] = []
        self._hashes: list[int] = []
        self._chars = 0
        self._shards: list[Staged] = []
        self._hashes_of_shards: list[np.ndarray] = []
        self._shard_files = 0
        self._refused: list[tuple[str, int, str, str, str]] = []
        self._quarantine_files = 0
        self.lots: list[Lot] = []
        self.reasons: Counter[str] = Counter()

    def keep(self, source: str, position: int, example: Example) -> None:
        self._examples.append(example[:3])
        self._keys.append((source, position))
        self._hashes.append(example.hash)
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
            self._write_lot()
        if self._refused:
            self._write_quarantine()

    def _write_shard(self) -> None:
        shard = Staged(f"{self._stem}-{self._shard_files:05d}", len(self._examples))
        self._store.write_table(shard.file, _table(self._examples, schemas.EXAMPLES), GROUP_ROWS)
        self._store.write_table(shard.keys_file, _table(self._keys, KEYS))
        self._shard_files += 1
        self._shards.append(shard)
        self._hashes_of_shards.append(np.array(self._hashes, dtype=np.uint64))
        self._examples, self._keys, self._hashes, self._chars = [], [], [], 0
        if sum(one.rows for one in self._shards) >= LOT_ROWS:
            self._write_lot()

    def _write_lot(self) -> None:
        lot = Lot(f"{self._stem}-{len(self.lots):05d}", tuple(self._shards))
        write_hashes(self._store, lot.hashes_file, np.concatenate(self._hashes_of_shards))
        self.lots.append(lot)
        self._shards, self._hashes_of_shards = [], []

    def _write_quarantine(self) -> None:
        name = f"{QUARANTINE_DIR}/{self._stem}-{self._quarantine_files:05d}.parquet"
        self._store.write_table(name, _table(self._refused, schemas.QUARANTINE))
        self._quarantine_files += 1
        self._refused = []


def _table(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
