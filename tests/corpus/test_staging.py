"""Staging shards and quarantine files are bounded and complete."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from llkd_ray.corpus import staging
from llkd_ray.corpus.cleaning import Example, Refusal
from llkd_ray.corpus.staging import KEYS, PARTITIONS, Lot, StagingWriter, read_hashes
from llkd_ray.storage import tables as tables_module
from llkd_ray.storage.run_dir import RunStore


def fill(store: RunStore, rows: int) -> StagingWriter:
    writer = StagingWriter(store, "pool-000007")
    for n in range(rows):
        writer.keep("file", n, Example(f"id{n}", f"text {n:04d}", -1, 2**64 - 1 - n))
        writer.refuse("file", 1000 + n, Refusal("empty", "why"), "start")
    writer.flush()
    return writer


def test_files_are_cut_at_their_row_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "SHARD_ROWS", 10)
    monkeypatch.setattr(staging, "QUARANTINE_ROWS", 8)
    monkeypatch.setattr(staging, "GROUP_ROWS", 4)
    store = RunStore(str(tmp_path))
    writer = fill(store, 25)
    shards = [shard for lot in writer.lots for shard in lot.shards]
    assert [shard.rows for shard in shards] == [10, 10, 5]
    assert writer.reasons == {"empty": 25}
    tables = [store.read_table(shard.file) for shard in shards]
    assert all(table.schema.equals(tables_module.EXAMPLES) for table in tables)
    assert [text for table in tables for text in table["text"].to_pylist()] == [
        f"text {n:04d}" for n in range(25)
    ]
    keys = [store.read_table(shard.keys_file) for shard in shards]
    assert all(table.schema.equals(KEYS) for table in keys)
    assert keys[2]["position"].to_pylist() == [20, 21, 22, 23, 24]
    assert pq.ParquetFile(store.path(shards[0].file)).metadata.num_row_groups == 3
    files = store.names("quarantine")
    assert files == [f"pool-000007-{n:05d}.parquet" for n in range(4)]
    assert sum(store.read_table(f"quarantine/{name}").num_rows for name in files) == 25


def test_shards_are_cut_at_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "SHARD_CHARS", 27)  # three texts of nine characters
    assert [shard.rows for lot in fill(RunStore(str(tmp_path)), 7).lots for shard in lot.shards] == [3, 3, 1]


def test_ids_count_as_size_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "SHARD_CHARS", 100)
    writer = StagingWriter(RunStore(str(tmp_path)), "pool-000000")
    for n in range(4):
        writer.keep("file", n, Example("i" * 50, "t", -1, n))
    writer.flush()
    assert [shard.rows for shard in writer.lots[0].shards] == [2, 2]


def test_hashes_of_neighbouring_shards_are_in_one_file_by_row_of_the_lot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "SHARD_ROWS", 10)
    monkeypatch.setattr(staging, "LOT_ROWS", 20)
    store = RunStore(str(tmp_path))
    lots = fill(store, 45).lots
    assert [[shard.rows for shard in lot.shards] for lot in lots] == [[10, 10], [10, 10], [5]]
    assert [Lot.from_dict(lot.as_dict()) for lot in lots] == lots
    for first, lot in zip((0, 20, 40), lots, strict=True):
        records = read_hashes(store, lot.hashes_file, 0, PARTITIONS)
        hashes = dict(zip(records["row"].tolist(), records["hash"].tolist(), strict=True))
        assert hashes == {n: 2**64 - 1 - first - n for n in range(lot.rows)}


def test_nothing_in_nothing_out(tmp_path: Path) -> None:
    assert fill(RunStore(str(tmp_path)), 0).lots == []
    assert list(tmp_path.rglob("*.parquet")) == []
