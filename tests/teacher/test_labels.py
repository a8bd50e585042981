"""A ticket's file says what it holds and what it has used, however it is read; damage is put aside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import LABELS_DIR, SENT_DIR, SMALL_DIR, RunStore, ticket_file
from llkd_ray.storage.tables import matrix_of
from llkd_ray.teacher.base import UNASKED, Answers, Usage
from llkd_ray.teacher.labels import (
    BROKEN_DIR,
    TicketLabels,
    count_unanswered,
    in_row_order,
    intact_tickets,
    labels_table,
    mark_file,
    read_all,
    read_lost_usage,
    read_ticket,
    ticket_labels,
    write_mark,
    write_ticket,
)

C = 3
NAMES = ("sea", "kitchen", "garden")
USAGE = {
    "small": Usage(texts=3, requests=4, prompt_tokens=90, cached_tokens=32, answer_tokens=4, seconds=1.25),
    "large": Usage(texts=1, requests=1, prompt_tokens=30, answer_tokens=1, reused_texts=2, cut_texts=1),
}


@pytest.fixture
def store(tmp_path) -> RunStore:
    return RunStore(str(tmp_path))


def labels_of(rows: list[int], outcomes: list[str] | None = None, member: int = 0) -> pa.Table:
    """LABELS in which everything tells the row."""
    number_M = np.array(rows, dtype=np.int64)
    answers = Answers(
        probs_NC=np.stack([number_M / 100, number_M / 200, 0.1 + 0 * number_M], axis=1).reshape(-1, C),
        off_label_N=number_M / 1000,
        prompt_tokens_N=number_M + 20,
        cached_tokens_N=number_M + 10,
        answer_tokens_N=number_M + 1,
        outcome_N=outcomes or [""] * len(rows),
        usage=Usage(),
    )
    texts = pa.table({"row": number_M, "id": pa.array([f"id-{row}" for row in rows], pa.string())})
    return labels_table(texts, number_M.astype(np.uint64) + np.uint64(2**63), answers, member)


def test_only_answered_texts_have_a_row():
    labels = labels_of([4, 9, 2, 7], ["", "too_odd", UNASKED, ""], member=1)
    assert labels.schema == tables.LABELS
    probs_MC = matrix_of(labels["probs"], C)
    assert probs_MC == pytest.approx(np.array([[0.04, 0.02, 0.1], [0.07, 0.035, 0.1]]))
    assert labels["off_label"].to_pylist() == pytest.approx([0.004, 0.007])
    assert labels.drop_columns(["probs", "off_label"]).to_pydict() == {
        "row": [4, 7],
        "id": ["id-4", "id-7"],
        "text_hash": [2**63 + 4, 2**63 + 7],
        "prompt_tokens": [24, 27],
        "cached_tokens": [14, 17],
        "answer_tokens": [5, 8],
        "member": [1, 1],
        "reused": [False, False],
    }


class TestTicket:
    @pytest.mark.parametrize("rows", [[4, 9, 2], []])
    def test_it_comes_back_as_it_was_put(self, store, rows):
        labels = labels_of(rows)
        write_ticket(store, LABELS_DIR, 12, labels, USAGE, unasked=5, tickets_in_flight=2, names=NAMES)
        back, usage, unasked = read_ticket(store, LABELS_DIR, 12)
        assert back.equals(labels)
        assert (usage, unasked) == (USAGE, 5)
        told = ticket_labels(back, usage, unasked, C)
        assert (told.row_M.tolist(), told.probs_MC.shape) == (rows, (len(rows), C))
        assert told.probs_MC == pytest.approx(matrix_of(labels["probs"], C))
        assert told.member_M.tolist() == [0] * len(rows)
        assert (told.usage, told.unasked) == (USAGE, 5)

    def test_a_file_that_says_nothing_of_its_use(self, store):
        store.write_table(ticket_file(LABELS_DIR, 3), labels_of([1]))
        assert read_ticket(store, LABELS_DIR, 3)[1:] == ({}, 0)

    def test_all_of_a_folder(self, store):
        assert list(read_all(store, SMALL_DIR, C, raise_damaged)) == []
        for ticket in (11, 2, 100):
            usage = {"small": Usage(texts=ticket)}
            write_ticket(store, SMALL_DIR, ticket, labels_of([ticket, 1], member=1), usage, ticket, 2, NAMES)
        write_ticket(store, LABELS_DIR, 5, labels_of([5]), {}, 0, 2, NAMES)
        found = dict(read_all(store, SMALL_DIR, C, raise_damaged))
        assert list(found) == [2, 11, 100]
        for ticket, labels in found.items():
            assert (labels.row_M.tolist(), labels.member_M.tolist()) == ([ticket, 1], [1, 1])
            assert labels.probs_MC == pytest.approx(np.array([[n / 100, n / 200, 0.1] for n in (ticket, 1)]))
            assert (labels.usage, labels.unasked) == ({"small": Usage(texts=ticket)}, ticket)

    def test_a_ticket_that_stands_for_no_texts(self):
        empty = TicketLabels.empty(C)
        assert (empty.row_M.shape, empty.probs_MC.shape, empty.member_M.shape) == ((0,), (0, C), (0,))
        assert (empty.usage, empty.unasked) == ({}, 0)


def raise_damaged(ticket: int, line: str) -> None:
    raise AssertionError(line)


@settings(deadline=None)
@given(
    st.permutations(range(12)), st.lists(st.integers(0, 2), min_size=12, max_size=12), st.sampled_from([0, 2])
)
def test_pieces_fall_into_the_order_of_the_rows(rows, piece_of, n_pieces):
    """Piece 2 stands for rows without an answer."""
    pieces = [labels_of([row for row in range(12) if piece_of[row] == piece]) for piece in range(n_pieces)]
    labels = in_row_order(pieces, np.array(rows))
    wanted = [row for row in rows if piece_of[row] < n_pieces]
    assert labels["row"].to_pylist() == wanted
    assert labels["id"].to_pylist() == [f"id-{row}" for row in wanted]
    assert labels.schema == tables.LABELS


class TestMarks:
    def test_they_add_up_to_what_is_lost(self, store):
        assert (read_lost_usage(store), count_unanswered(store)) == ({}, 0)
        write_mark(store, "ticket-00000001.aa", 16, {"small": USAGE["small"]})
        write_mark(store, "ticket-00000001.bb", 4, USAGE)
        write_mark(store, "ticket-00000002.cc", 7, {})
        assert read_lost_usage(store) == {
            "small": USAGE["small"] + USAGE["small"],
            "large": USAGE["large"],
        }
        assert count_unanswered(store) == 27

    def test_a_mark_is_written_over(self, store):
        write_mark(store, "ticket-00000001.aa", 16, {"small": Usage(texts=4)})
        write_mark(store, "ticket-00000001.aa", 16, {"small": Usage(texts=8)})
        assert read_lost_usage(store) == {"small": Usage(texts=8)}
        store.delete(mark_file("ticket-00000001.aa"))
        assert (read_lost_usage(store), count_unanswered(store)) == ({}, 0)

    def test_one_that_goes_while_they_are_read_is_not_lost(self, store, monkeypatch):
        """A selector that comes anew reads them while teachers finish their tickets."""
        for name in ("aa", "bb"):
            write_mark(store, name, 5, {"small": Usage(texts=5)})
        names = store.names(SENT_DIR)
        store.delete(mark_file("aa"))
        monkeypatch.setattr(store, "names", lambda folder, suffix="": names)
        assert read_lost_usage(store) == {"small": Usage(texts=5)}
        assert count_unanswered(store) == 5


class TestDamaged:
    TICKETS = 3

    @pytest.fixture(scope="class")
    @classmethod
    def whole(cls, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
        """The contents of some label files."""
        store = RunStore(str(tmp_path_factory.mktemp("whole")))
        for ticket in range(cls.TICKETS):
            write_ticket(
                store, LABELS_DIR, ticket, labels_of([4 * ticket, 4 * ticket + 1]), USAGE, 0, 2, NAMES
            )
        return [store.read_bytes(ticket_file(LABELS_DIR, ticket)) for ticket in range(cls.TICKETS)]

    def run(self, folder: Path, whole: list[bytes], damaged: bytes) -> RunStore:
        """A run whose ticket 1 has other contents."""
        store = RunStore(str(folder))
        for ticket, content in enumerate([whole[0], damaged, whole[2]]):
            store.write_bytes(ticket_file(LABELS_DIR, ticket), content)
        return store

    def read(self, store: RunStore, skip=()) -> tuple[list[int], dict[int, str]]:
        """The tickets that are whole, and what is said of the others."""
        said: dict[int, str] = {}
        return [ticket for ticket, _ in intact_tickets(store, LABELS_DIR, said.__setitem__, skip)], said

    @given(share=st.floats(0, 1, exclude_max=True), padding=st.sampled_from([b"", b"\0"]))
    def test_a_file_cut_anywhere_is_moved_with_a_reason(self, tmp_path_factory, whole, share, padding):
        """Cut off, or filled up with zeros as file systems do after a loss of power."""
        size = int(len(whole[1]) * share)
        damaged = whole[1][:size] + padding * (len(whole[1]) - size)
        store = self.run(tmp_path_factory.mktemp("run"), whole, damaged)
        tickets, said = self.read(store)
        assert tickets == [0, 2]
        assert [(t, line.startswith(ticket_file(LABELS_DIR, 1))) for t, line in said.items()] == [(1, True)]
        assert store.names(LABELS_DIR) == ["ticket-00000000.parquet", "ticket-00000002.parquet"]
        kept, reason = store.names(BROKEN_DIR)
        assert store.read_bytes(f"{BROKEN_DIR}/{kept}") == damaged
        assert len(store.read_bytes(f"{BROKEN_DIR}/{reason}").splitlines()) == 1
        assert self.read(store) == ([0, 2], {}), "a second time, there is nothing left to do"

    def test_a_store_that_is_out_of_reach_is_no_damage(self, tmp_path, whole, monkeypatch):
        def connection_lost(file: str) -> bytes:
            raise OSError("connection lost")

        store = self.run(tmp_path, whole, whole[1])
        monkeypatch.setattr(store, "read_bytes", connection_lost)
        with pytest.raises(OSError, match="connection lost"):
            self.read(store)
        assert len(store.names(LABELS_DIR)) == self.TICKETS

    def test_a_parquet_file_of_something_else_is_no_label_file(self, tmp_path, whole):
        store = self.run(tmp_path, whole, whole[1])
        store.write_table(ticket_file(LABELS_DIR, 1), pa.table({"row": [1]}))
        tickets, said = self.read(store)
        assert tickets == [0, 2]
        assert "(no column id)" in said[1]

    def test_what_is_known_is_not_read(self, tmp_path, whole):
        """Not even looked at: that is what a snapshot is for."""
        store = self.run(tmp_path, whole, b"no parquet")
        assert self.read(store, skip={1, 2}) == ([0], {})

    def test_many_files_come_in_their_order(self, tmp_path, whole, monkeypatch):
        """More than are held at a time."""
        monkeypatch.setattr("llkd_ray.teacher.labels._AT_A_TIME", 16)
        store = RunStore(str(tmp_path))
        for ticket in range(40):
            store.write_bytes(ticket_file(LABELS_DIR, ticket), whole[0] if ticket % 10 else b"")
        tickets, said = self.read(store)
        assert tickets == [ticket for ticket in range(40) if ticket % 10]
        assert list(said) == [0, 10, 20, 30]
        assert len(store.names(LABELS_DIR)) == len(tickets), "whole ones stay"
