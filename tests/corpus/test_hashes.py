"""Hashes on disk: a share of them is one read, and repeats are found as a plain loop finds them."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llkd_ray.corpus.staging import PARTITIONS, buckets, read_hashes, repeats, write_hashes
from llkd_ray.storage.run_dir import RunStore

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
    reads = []

    class Counting:
        """The store's filesystem, noting how many bytes are asked for."""

        def open_input_file(self, path):
            return CountingFile(store_fs.open_input_file(path))

    class CountingFile:
        def __init__(self, file):
            self.file = file

        def read_at(self, size, offset):
            reads.append(size)
            return self.file.read_at(size, offset)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    store_fs, store.fs = store.fs, Counting()
    record_N = read_hashes(store, "a", *share)
    assert len(reads) == 2
    assert sum(reads) == 4 * PARTITIONS + 12 * record_N.size
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
