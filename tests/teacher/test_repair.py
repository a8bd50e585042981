"""Damaged label files are put aside and told apart from whole ones."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import put_label_file

from llkd_ray.storage.run_dir import LABELS_DIR, RunStore, ticket_file
from llkd_ray.teacher.labels import BROKEN_DIR, intact_tickets, read_ticket

TICKETS = 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The contents of some label files."""
    store = RunStore(str(tmp_path_factory.mktemp("whole")))
    for ticket in range(TICKETS):
        rows = np.arange(4) + 4 * ticket
        put_label_file(store, ticket, rows, np.full((4, 3), 0.3))
    return [store.read_bytes(ticket_file(LABELS_DIR, ticket)) for ticket in range(TICKETS)]


def damaged_run(folder, whole: list[bytes], damaged: bytes) -> RunStore:
    """A run whose ticket 1 has other contents."""
    store = RunStore(str(folder))
    for ticket, content in enumerate([whole[0], damaged, whole[2]]):
        store.write_bytes(ticket_file(LABELS_DIR, ticket), content)
    return store


def read(store: RunStore, skip=()) -> tuple[list[int], dict[int, str]]:
    """The tickets that are whole, and what is said of the others."""
    said: dict[int, str] = {}
    return [ticket for ticket, _ in intact_tickets(store, LABELS_DIR, said.__setitem__, skip)], said


def test_whole_files_stay_and_nothing_is_said(tmp_path, whole):
    store = damaged_run(tmp_path, whole, whole[1])
    assert read(store) == ([0, 1, 2], {})
    assert len(store.names(LABELS_DIR)) == TICKETS
    assert store.names(BROKEN_DIR) == []


@given(share=st.floats(0, 1, exclude_max=True), padding=st.sampled_from([b"", b"\0"]))
def test_a_file_cut_anywhere_is_put_aside_with_a_reason(tmp_path_factory, whole, share, padding):
    """Cut off, or filled up with zeros as file systems do after a loss of power."""
    size = int(len(whole[1]) * share)
    damaged = whole[1][:size] + padding * (len(whole[1]) - size)
    store = damaged_run(tmp_path_factory.mktemp("run"), whole, damaged)
    tickets, said = read(store)
    assert tickets == [0, 2]
    assert [(t, line.startswith(ticket_file(LABELS_DIR, 1))) for t, line in said.items()] == [(1, True)]
    assert store.names(LABELS_DIR) == ["ticket-00000000.parquet", "ticket-00000002.parquet"]
    kept, reason = store.names(BROKEN_DIR)
    assert store.read_bytes(f"{BROKEN_DIR}/{kept}") == damaged
    assert len(store.read_bytes(f"{BROKEN_DIR}/{reason}").splitlines()) == 1
    assert len(read_ticket(store, LABELS_DIR, 2)[0]) == 4
    assert read(store) == ([0, 2], {}), "a second time, there is nothing left to do"


def test_a_store_that_is_out_of_reach_is_no_damage(tmp_path, whole, monkeypatch):
    store = damaged_run(tmp_path, whole, whole[1])
    monkeypatch.setattr(store, "read_bytes", raise_connection_lost)
    with pytest.raises(OSError, match="connection lost"):
        read(store)
    assert len(store.names(LABELS_DIR)) == TICKETS


def raise_connection_lost(file: str) -> bytes:
    raise OSError("connection lost")


def test_a_parquet_file_of_something_else_is_no_label_file(tmp_path, whole):
    store = damaged_run(tmp_path, whole, whole[1])
    store.write_table(ticket_file(LABELS_DIR, 1), pa.table({"row": [1]}))
    tickets, said = read(store)
    assert tickets == [0, 2]
    assert "(no column id)" in said[1]


def test_what_is_known_is_not_read(tmp_path, whole):
    """Not even looked at: that is what a snapshot is for."""
    store = damaged_run(tmp_path, whole, b"no parquet")
    assert read(store, skip={1, 2}) == ([0], {})


def test_many_files_come_in_their_order(tmp_path, whole):
    """More than are held at a time."""
    store = RunStore(str(tmp_path))
    for ticket in range(600):
        store.write_bytes(ticket_file(LABELS_DIR, ticket), whole[0] if ticket % 100 else b"")
    tickets, said = read(store)
    assert tickets == [ticket for ticket in range(600) if ticket % 100]
    assert list(said) == [0, 100, 200, 300, 400, 500]
