"""Damaged label files are put aside and told apart from whole ones."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import put_label_file

from llkd_ray.label_files import read_ticket
from llkd_ray.repair import BROKEN_DIR, put_aside_broken
from llkd_ray.store import LABELS_DIR, RunStore, ticket_file

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


def test_whole_files_stay_and_nothing_is_said(tmp_path, whole):
    store, said = damaged_run(tmp_path, whole, whole[1]), []
    assert put_aside_broken(store, said.append) == []
    assert said == []
    assert len(store.names(LABELS_DIR)) == TICKETS
    assert store.names(BROKEN_DIR) == []


@given(share=st.floats(0, 1, exclude_max=True), padding=st.sampled_from([b"", b"\0"]))
def test_a_file_cut_anywhere_is_put_aside_with_a_reason(tmp_path_factory, whole, share, padding):
    """Cut off, or filled up with zeros as file systems do after a loss of power."""
    size = int(len(whole[1]) * share)
    damaged = whole[1][:size] + padding * (len(whole[1]) - size)
    store, said = damaged_run(tmp_path_factory.mktemp("run"), whole, damaged), []
    file = ticket_file(LABELS_DIR, 1)
    assert put_aside_broken(store, said.append) == [file]
    assert [line.startswith(file) for line in said] == [True]
    assert store.names(LABELS_DIR) == ["ticket-00000000.parquet", "ticket-00000002.parquet"]
    kept, reason = store.names(BROKEN_DIR)
    assert store.read_bytes(f"{BROKEN_DIR}/{kept}") == damaged
    assert len(store.read_bytes(f"{BROKEN_DIR}/{reason}").splitlines()) == 1
    assert len(read_ticket(store, LABELS_DIR, 2)[0]) == 4
    assert put_aside_broken(store, said.append) == [], "a second time, there is nothing left to do"


def test_a_store_that_is_out_of_reach_is_no_damage(tmp_path, whole, monkeypatch):
    store = damaged_run(tmp_path, whole, whole[1])
    monkeypatch.setattr(store, "read_bytes", raise_connection_lost)
    with pytest.raises(OSError, match="connection lost"):
        put_aside_broken(store, lambda line: None)
    assert len(store.names(LABELS_DIR)) == TICKETS


def raise_connection_lost(file: str) -> bytes:
    raise OSError("connection lost")


def test_a_parquet_file_of_something_else_is_no_label_file(tmp_path, whole):
    store = damaged_run(tmp_path, whole, whole[1])
    store.write_table(ticket_file(LABELS_DIR, 1), pa.table({"row": [1]}))
    (broken,) = put_aside_broken(store, lambda line: None)
    assert broken == ticket_file(LABELS_DIR, 1)
