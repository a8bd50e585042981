"""Hashes of staged texts, on disk so that a share of all hashes is read without the rest. Needs no Ray.

A file holds those of neighbouring rows: the end of each of PARTITIONS partitions (little-endian uint32), then
RECORDs in ascending order of hash. What shares the top bits of its hash is in one partition, and
neighbouring partitions are one read, so that finding repeated texts takes time in proportion to the corpus.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from llkd_ray.store import RunStore

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
    """RECORD[n]: the partitions [first, end) of a file; of equal hashes, the earlier row stands first."""
    with store.fs.open_input_file(store.path(relative)) as file:
        end_P = np.concatenate([[0], np.frombuffer(file.read_at(_HEAD_BYTES, 0), dtype=_ENDS)])
        start, stop = int(end_P[first]) * RECORD.itemsize, int(end_P[end]) * RECORD.itemsize
        return np.frombuffer(file.read_at(stop - start, _HEAD_BYTES + start), dtype=RECORD)


def buckets(n_rows: int, bucket_rows: int) -> list[tuple[int, int]]:
    """Partitions [first, end) of each bucket, so that one holds about ``bucket_rows`` of all rows."""
    count = min(PARTITIONS, max(1, -(-n_rows // bucket_rows)))
    edges = [PARTITIONS * number // count for number in range(count + 1)]
    return list(pairwise(edges))


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
