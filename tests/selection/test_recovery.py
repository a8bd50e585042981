"""A snapshot comes back as it was kept, or not at all."""

from __future__ import annotations

import io

import numpy as np
import pytest

from llkd_ray.selection.recovery import Snapshot, delete_snapshots, load_snapshot, save_snapshot
from llkd_ray.storage.run_dir import SNAPSHOTS_DIR, RunStore
from llkd_ray.teacher.base import Usage

SNAPSHOT = Snapshot(
    {"label": np.array([0, -1, 2], dtype=np.int16), "confidence": np.array([0.5, np.nan, 0.25], np.float32)},
    np.array([3, 7]),
    rounds=2,
    usage={"teacher": Usage(texts=3, requests=3, prompt_tokens=40), "small": Usage(texts=1)},
    unasked=4,
)


@pytest.fixture
def store(tmp_path):
    return RunStore(str(tmp_path / "run"))


def written() -> bytes:
    out = io.BytesIO()
    SNAPSHOT.write(out)
    return out.getvalue()


def assert_same(one: Snapshot | None, other: Snapshot) -> None:
    assert one is not None
    assert one.columns.keys() == other.columns.keys()
    for name, column in one.columns.items():
        np.testing.assert_array_equal(column, other.columns[name])
        assert column.dtype == other.columns[name].dtype
        assert column.flags.writeable, "it becomes a table's own"
    assert one.tickets.tolist() == other.tickets.tolist()
    assert (one.rounds, one.usage, one.unasked) == (other.rounds, other.usage, other.unasked)


def test_a_sessions_last_one_comes_back_and_is_the_only_one(store):
    save_snapshot(store, "a", Snapshot({}, np.empty(0, dtype=np.int64), 1, {}, 0))
    save_snapshot(store, "a", SNAPSHOT)
    assert_same(load_snapshot(store, "a"), SNAPSHOT)
    assert len(store.names(SNAPSHOTS_DIR)) == 1
    assert load_snapshot(store, "b") is None


def test_none_is_left(store, tmp_path):
    delete_snapshots(store)  # there is nothing yet
    save_snapshot(store, "a", SNAPSHOT)
    (tmp_path / "run" / SNAPSHOTS_DIR / "a.npz.0123.tmp").write_bytes(b"of a writer that was killed")
    delete_snapshots(store)
    assert not (tmp_path / "run" / SNAPSHOTS_DIR).exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_one_that_is_cut_off_is_none(store, share):
    content = written()
    save_snapshot(store, "a", SNAPSHOT)
    (name,) = store.names(SNAPSHOTS_DIR)
    store.write_bytes(f"{SNAPSHOTS_DIR}/{name}", content[: int(share * len(content))])
    assert load_snapshot(store, "a") is None


def test_a_damaged_byte_and_another_file_are_found():
    content = bytearray(written())
    content[content.index(SNAPSHOT.columns["confidence"].tobytes())] ^= 1
    other = io.BytesIO()
    np.savez(other, label=np.zeros(3))
    for damaged, message in ((bytes(content), "not a whole"), (other.getvalue(), "not a whole .*meta")):
        with pytest.raises(ValueError, match=message):
            Snapshot.read(io.BytesIO(damaged))
