"""A ticket's file says what it holds and what it has used, however it is read; marks say what is lost."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import LABELS_DIR, SENT_DIR, SMALL_DIR, RunStore
from llkd_ray.storage.tables import matrix_of
from llkd_ray.teacher.base import UNASKED, Answers, Usage
from llkd_ray.teacher.labels import (
    TicketLabels,
    count_unanswered,
    in_row_order,
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


class TestLabelsTable:
    def test_only_answered_texts_have_a_row(self):
        labels = labels_of([4, 9, 2, 7], ["", "too_odd", UNASKED, ""], member=1)
        assert labels.schema == tables.LABELS
        assert labels["row"].to_pylist() == [4, 7]
        assert labels["id"].to_pylist() == ["id-4", "id-7"]
        assert labels["text_hash"].to_pylist() == [2**63 + 4, 2**63 + 7]
        assert matrix_of(labels["probs"], C) == pytest.approx(
            np.array([[0.04, 0.02, 0.1], [0.07, 0.035, 0.1]])
        )
        assert labels["off_label"].to_pylist() == pytest.approx([0.004, 0.007])
        assert labels["prompt_tokens"].to_pylist() == [24, 27]
        assert labels["cached_tokens"].to_pylist() == [14, 17]
        assert labels["answer_tokens"].to_pylist() == [5, 8]
        assert labels["member"].to_pylist() == [1, 1]
        assert labels["reused"].to_pylist() == [False, False]

    def test_no_texts(self):
        labels = labels_of([])
        assert (len(labels), labels.schema) == (0, tables.LABELS)


class TestTicket:
    @pytest.mark.parametrize("rows", [[4, 9, 2], []])
    def test_it_comes_back_as_it_was_put(self, store, rows):
        labels = labels_of(rows)
        write_ticket(store, LABELS_DIR, 12, labels, USAGE, unasked=5, tickets_in_flight=2)
        back, usage, unasked = read_ticket(store, LABELS_DIR, 12)
        assert back.equals(labels)
        assert (usage, unasked) == (USAGE, 5)
        told = ticket_labels(back, usage, unasked, C)
        assert told.row_M.tolist() == rows
        assert told.probs_MC == pytest.approx(matrix_of(labels["probs"], C))
        assert told.probs_MC.shape == (len(rows), C)
        assert told.member_M.tolist() == [0] * len(rows)
        assert (told.usage, told.unasked) == (USAGE, 5)

    def test_a_file_that_says_nothing_of_its_use(self, store):
        store.write_table(f"{LABELS_DIR}/ticket-00000003.parquet", labels_of([1]))
        _, usage, unasked = read_ticket(store, LABELS_DIR, 3)
        assert (usage, unasked) == ({}, 0)

    def test_all_of_a_folder(self, store):
        for ticket in (11, 2, 100):
            usage = {"small": Usage(texts=ticket)}
            write_ticket(store, SMALL_DIR, ticket, labels_of([ticket, 1], member=1), usage, ticket, 2)
        write_ticket(store, LABELS_DIR, 5, labels_of([5]), {}, 0, 2)
        found = dict(read_all(store, SMALL_DIR, C, raise_damaged))
        assert list(found) == [2, 11, 100]
        for ticket, labels in found.items():
            whole = ticket_labels(*read_ticket(store, SMALL_DIR, ticket), C)
            assert labels.row_M.tolist() == whole.row_M.tolist() == [ticket, 1]
            assert labels.probs_MC.tolist() == whole.probs_MC.tolist()
            assert labels.member_M.tolist() == [1, 1]
            assert (labels.usage, labels.unasked) == ({"small": Usage(texts=ticket)}, ticket)

    def test_all_of_a_folder_that_is_not_there(self, store):
        assert list(read_all(store, SMALL_DIR, C, raise_damaged)) == []

    def test_a_ticket_that_stands_for_no_texts(self):
        empty = TicketLabels.empty(C)
        assert (empty.row_M.shape, empty.probs_MC.shape, empty.member_M.shape) == ((0,), (0, C), (0,))
        assert (empty.usage, empty.unasked) == ({}, 0)


def raise_damaged(ticket: int, line: str) -> None:
    raise AssertionError(line)


class TestRowOrder:
    @settings(deadline=None)
    @given(st.permutations(range(12)), st.lists(st.integers(0, 2), min_size=12, max_size=12))
    def test_pieces_fall_into_the_order_of_the_rows(self, rows, piece_of):
        """Piece 2 stands for rows without an answer."""
        pieces = [labels_of([row for row in range(12) if piece_of[row] == piece]) for piece in (0, 1)]
        labels = in_row_order(pieces, np.array(rows))
        wanted = [row for row in rows if piece_of[row] < 2]
        assert labels["row"].to_pylist() == wanted
        assert labels["id"].to_pylist() == [f"id-{row}" for row in wanted]
        assert labels.schema == tables.LABELS

    def test_no_pieces(self):
        assert in_row_order([], np.arange(3)).equals(tables.LABELS.empty_table())


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
