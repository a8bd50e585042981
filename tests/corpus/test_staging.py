"""Staging shards and quarantine files are bounded and complete; repeats are found by hashes on disk."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llkd_ray.config.schema import SourceConfig
from llkd_ray.corpus import cleaning, staging
from llkd_ray.corpus.cleaning import Example, Refusal
from llkd_ray.corpus.readers import RawRow, Unit
from llkd_ray.corpus.staging import (
    KEYS,
    PARTITIONS,
    ShardGroup,
    StagingWriter,
    buckets,
    read_hashes,
    repeats,
    write_hashes,
)
from llkd_ray.storage import tables as tables_module
from llkd_ray.storage.run_dir import RunStore


def fill(store: RunStore, rows: int) -> StagingWriter:
    writer = StagingWriter(store, "pool-000007")
    for n in range(rows):
        writer.keep("file", RawRow(n, ""), Example(f"id{n}", f"text {n:04d}", -1, 2**64 - 1 - n))
        writer.refuse("file", 1000 + n, Refusal("empty", "why"), "start")
    writer.flush()
    return writer


def test_files_are_cut_at_their_row_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "SHARD_ROWS", 10)
    monkeypatch.setattr(staging, "QUARANTINE_ROWS", 8)
    monkeypatch.setattr(staging, "GROUP_ROWS", 4)
    store = RunStore(str(tmp_path))
    writer = fill(store, 25)
    shards = [shard for group in writer.groups for shard in group.shards]
    assert [shard.rows for shard in shards] == [10, 10, 5]
    assert writer.reasons == {"empty": 25}
    tables = [store.read_table(shard.file) for shard in shards]
    assert all(table.schema.equals(tables_module.EXAMPLES) for table in tables)
    texts = [text for table in tables for text in table["text"].to_pylist()]
    assert texts == [f"text {n:04d}" for n in range(25)]
    keys = [store.read_table(shard.keys_file) for shard in shards]
    assert all(table.schema.equals(KEYS) for table in keys)
    assert keys[2]["position"].to_pylist() == [20, 21, 22, 23, 24]
    assert pq.ParquetFile(store.path(shards[0].file)).metadata.num_row_groups == 3
    files = store.names("quarantine")
    assert files == [f"pool-000007-{n:05d}.parquet" for n in range(4)]
    assert sum(store.read_table(f"quarantine/{name}").num_rows for name in files) == 25
    assert fill(RunStore(str(tmp_path / "none")), 0).groups == []
    assert list((tmp_path / "none").rglob("*.parquet")) == []


def test_shards_are_cut_at_their_size_in_texts_and_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "SHARD_CHARS", 27)  # three texts of nine characters
    groups = fill(RunStore(str(tmp_path)), 7).groups
    assert [shard.rows for group in groups for shard in group.shards] == [3, 3, 1]
    monkeypatch.setattr(staging, "SHARD_CHARS", 100)
    writer = StagingWriter(RunStore(str(tmp_path)), "pool-000000")
    for n in range(4):
        writer.keep("file", RawRow(n, ""), Example("i" * 50, "t", -1, n))
    writer.flush()
    assert [shard.rows for shard in writer.groups[0].shards] == [2, 2]


def test_a_text_is_hashed_once_and_its_hash_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\n\ntwo\nthree\nfour\n")
    unit = Unit(str(file), "txt", file.stat().st_size, str(tmp_path), str(file))
    hashed, plain = [], cleaning.text_hash
    monkeypatch.setattr(cleaning, "text_hash", lambda text: hashed.append(text) or plain(text))
    writer = StagingWriter(RunStore(str(tmp_path)), "pool-000000")
    for kept in writer.clean([unit], SourceConfig(uri=str(file), limit=4), "corpus", ["a", "b"]):
        writer.keep(*kept)
    writer.flush()
    assert hashed == ["one", "two", "three"], "the fourth row is the limit, and the second is empty"
    assert (writer.rows_in, writer.reasons) == (4, {"empty": 1})
    table = RunStore(str(tmp_path)).read_table(writer.groups[0].shards[0].file)
    assert table["text_hash"].to_pylist() == [plain(text) for text in hashed]


def test_hashes_of_neighbouring_shards_are_in_one_file_by_row_of_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "SHARD_ROWS", 10)
    monkeypatch.setattr(staging, "SHARD_GROUP_ROWS", 20)
    store = RunStore(str(tmp_path))
    groups = fill(store, 45).groups
    assert [[shard.rows for shard in group.shards] for group in groups] == [[10, 10], [10, 10], [5]]
    assert [ShardGroup.from_dict(group.as_dict()) for group in groups] == groups
    for first, group in zip((0, 20, 40), groups, strict=True):
        records = read_hashes(store, group.hashes_file, 0, PARTITIONS)
        hashes = dict(zip(records["row"].tolist(), records["hash"].tolist(), strict=True))
        assert hashes == {n: 2**64 - 1 - first - n for n in range(group.rows)}


HASHES = st.one_of(
    st.integers(0, 2**64 - 1),
    st.integers(0, PARTITIONS).map(lambda p: min(p << 54, 2**64 - 1)),
    st.integers(1, PARTITIONS).map(lambda p: (p << 54) - 1),
)


@given(st.lists(HASHES, max_size=60), st.integers(1, 20))
def test_every_hash_is_in_the_bucket_of_its_top_bits(tmp_path_factory, hashes: list[int], rows: int) -> None:
    store = RunStore(str(tmp_path_factory.mktemp("hashes")))
    write_hashes(store, "a", np.array(hashes, dtype=np.uint64))
    found = []
    for first, end in buckets(len(hashes), rows):
        record_N = read_hashes(store, "a", first, end)
        assert all(first <= one >> 54 < end for one in record_N["hash"].tolist())
        found += record_N.tolist()
    assert found == sorted((one, row) for row, one in enumerate(hashes))


@given(st.integers(0, 10**11), st.integers(1, 10**7))
def test_buckets_are_even_and_cover_all(n_rows: int, bucket_rows: int) -> None:
    found = buckets(n_rows, bucket_rows)
    assert found[0][0] == 0
    assert found[-1][1] == PARTITIONS
    assert all(before[1] == after[0] for before, after in pairwise(found))
    sizes = [end - first for first, end in found]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert len(found) == min(PARTITIONS, max(1, -(-n_rows // bucket_rows)))


@pytest.mark.parametrize("share", [(0, 1), (17, 19), (PARTITIONS - 1, PARTITIONS)])
def test_a_share_is_read_without_the_rest(tmp_path: Path, share: tuple[int, int]) -> None:
    store = RunStore(str(tmp_path))
    hash_N = np.random.default_rng(0).integers(0, 2**64, 50_000, dtype=np.uint64)
    write_hashes(store, "a", hash_N)
    file = MagicMock(wraps=store.fs.open_input_file(store.path("a")))
    file.__enter__.return_value = file
    store.fs = SimpleNamespace(open_input_file=lambda path: file)
    record_N = read_hashes(store, "a", *share)
    sizes = [call.args[0] for call in file.read_at.call_args_list]
    assert (len(sizes), sum(sizes)) == (2, 4 * PARTITIONS + 12 * record_N.size)
    assert 0 < record_N.size < 500


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans())))
def test_repeats_against_a_plain_loop(rows: list[tuple[int, bool]]) -> None:
    rows.sort(key=lambda row: not row[1])  # the test set stands first
    hash_N = np.array([value for value, _ in rows], dtype=np.uint64)
    test_N = np.array([in_test for _, in_test in rows], dtype=bool)
    first: dict[int, bool] = {}
    expected = []
    for number, (value, in_test) in enumerate(rows):
        if value in first:
            expected.append((number, first[value] and not in_test))
        first.setdefault(value, in_test)
    repeat_R, leaked_R = repeats(hash_N, test_N)
    assert list(zip(repeat_R.tolist(), leaked_R.tolist(), strict=True)) == expected
