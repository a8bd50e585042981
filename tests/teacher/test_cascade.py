"""A cascade's two stages: files first, then the selector; whatever comes twice or breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fake_selector import FakeSelector, go
from fake_teacher import FakeTeacher, cascade_config, cost_of, leased, quarantined
from toys import make_run

from llkd_ray.config.schedule import Schedule
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import LABELS_DIR, SENT_DIR, SMALL_DIR, RunStore, ticket_file
from llkd_ray.storage.tables import matrix_of
from llkd_ray.teacher.base import TeacherDown, Usage
from llkd_ray.teacher.labels import read_ticket
from llkd_ray.teacher.worker import LargeStage, SmallStage

N_POOL, N_TEST = 200, 30


@pytest.fixture
def store(tmp_path) -> RunStore:
    return make_run(tmp_path / "run", N_POOL, N_TEST)


def surety(of_number: dict[int, float]) -> Any:
    """Answers for label 0 with some confidence, 0.9 by default; half of the mass is off label."""

    def says(number: int) -> np.ndarray:
        sure = of_number.get(number, 0.9)
        return 0.5 * np.array([sure, (1 - sure) / 2, (1 - sure) / 2])

    return says


def large_says(number: int) -> np.ndarray:
    return np.array([0.05, 0.9, 0.05])


class Cascade:
    """Both stages on one run, in doubt below 0.6."""

    def __init__(
        self,
        store: RunStore,
        small: FakeTeacher | None = None,
        large: FakeTeacher | None = None,
        **sections: Any,
    ) -> None:
        self.small_teacher = small or FakeTeacher()
        self.large_teacher = large or FakeTeacher(large_says)
        config = cascade_config(**sections)
        self.selector = FakeSelector()
        self.small = SmallStage(config, store.root, self.selector, self.small_teacher)
        self.large = LargeStage(config, store.root, self.selector, self.large_teacher)
        self.review = Schedule.plan(config, N_POOL, N_TEST).review_tickets[-1]

    def ask_small(self, block: pa.Table) -> pa.Table:
        return asyncio.run(go(self.small, block))

    def run(self, ticket: int, rows: Sequence[int]) -> list[dict[str, int]]:
        """One ticket through both stages."""

        async def script():
            return await go(self.large, await go(self.small, leased(ticket, rows)))

        return asyncio.run(script()).to_pylist()


class TestSmallStage:
    def test_its_file_comes_first_and_everything_goes_on(self, store):
        cascade = Cascade(store, FakeTeacher(failing={2: "too_odd"}))
        block = leased(3, [5, 2, 9])
        assert cascade.ask_small(block).equals(block)
        labels, usage, unasked = read_ticket(store, SMALL_DIR, 3)
        assert labels["row"].to_pylist() == [5, 9]
        assert labels["member"].to_pylist() == [0, 0]
        assert usage.keys() == {"small"}
        assert (usage["small"].tokens, unasked) == (cost_of([5, 2, 9]), 0)
        ((name, (*told, attempt)),) = cascade.selector.calls
        assert (name, told) == ("commit_usage", [3, "small", usage["small"].as_dict()])
        assert attempt.startswith("ticket-00000003.")
        assert quarantined(store, 3) == [], "the large one may answer it"
        assert store.names(LABELS_DIR) == store.names(SENT_DIR) == []

    @pytest.mark.parametrize("done", [SMALL_DIR, LABELS_DIR, "review"])
    def test_what_is_done_or_reviewed_goes_on_as_it_is(self, store, done):
        cascade = Cascade(store)
        if done != "review":
            store.write_table(ticket_file(done, 3), tables.LABELS.empty_table())
        block = leased(cascade.review if done == "review" else 3, [5, 2])
        assert cascade.ask_small(block).equals(block)
        assert cascade.small_teacher.calls == cascade.selector.calls == store.names(SENT_DIR) == []

    def test_empty_lease(self, store):
        cascade = Cascade(store)
        assert cascade.run(3, []) == []
        assert cascade.selector.calls == store.names(SMALL_DIR) == store.names(LABELS_DIR) == []

    def test_nothing_goes_on_when_it_gives_up(self, store):
        cascade = Cascade(store, FakeTeacher(errors=[TeacherDown("gone")]))
        cascade.selector.is_taught = True
        assert cascade.run(3, [5, 2]) == []
        assert cascade.large_teacher.calls == store.names(SMALL_DIR) == store.names(LABELS_DIR) == []
        ((*given_back, _),) = cascade.selector.told("give_back")
        assert given_back == [3, "small", cascade.small.actor, "gone"]


class TestLargeStage:
    def test_it_reads_what_is_unsure_or_unanswered(self, store):
        small = FakeTeacher(surety({4: 0.59, 5: 0.61, 6: 0.4}), failing={7: "too_odd"})
        cascade = Cascade(store, small)
        rows, member = [9, 4, 7, 5, 6, 8], [0, 1, 1, 0, 1, 0]
        assert cascade.run(3, rows) == [{"ticket": 3, "rows": 6}]
        assert (small.calls, cascade.large_teacher.calls) == ([rows], [[4, 7, 6]])
        labels, usage, unasked = read_ticket(store, LABELS_DIR, 3)
        assert labels["row"].to_pylist() == rows
        assert labels["member"].to_pylist() == member
        assert matrix_of(labels["probs"], 3).argmax(axis=1).tolist() == member
        assert {name: (one.texts, one.tokens) for name, one in usage.items()} == {
            "small": (6, cost_of(rows)),
            "large": (3, cost_of([4, 7, 6])),
        }
        assert unasked == 0
        assert quarantined(store, 3) == store.names(SENT_DIR) == []
        ((ticket, told),) = cascade.selector.told("put_labels")
        assert (ticket, told.row_M.tolist(), told.usage) == (3, rows, usage)
        assert told.member_M.tolist() == member
        metadata = store.read_table(ticket_file(LABELS_DIR, 3)).schema.metadata
        assert metadata[b"tickets_in_flight"] == b"3", "the speed of the large one is measured on its file"

    def test_where_nothing_is_in_doubt_it_is_not_asked(self, store):
        cascade = Cascade(store, FakeTeacher(surety({})))
        assert cascade.run(3, [5, 2]) == [{"ticket": 3, "rows": 2}]
        assert cascade.large_teacher.calls == []
        labels, usage, _ = read_ticket(store, LABELS_DIR, 3)
        assert labels["member"].to_pylist() == [0, 0]
        assert usage["large"] == Usage()

    def test_a_small_answer_is_kept_where_the_large_one_has_none(self, store):
        small = FakeTeacher(surety({4: 0.4, 5: 0.4}), failing={6: "too_odd", 7: "too_odd"})
        cascade = Cascade(store, small, FakeTeacher(large_says, failing={5: "too_long", 7: "too_long"}))
        assert cascade.run(3, [4, 5, 6, 7]) == [{"ticket": 3, "rows": 3}]
        labels, usage, _ = read_ticket(store, LABELS_DIR, 3)
        assert labels["row"].to_pylist() == [4, 5, 6]
        assert labels["member"].to_pylist() == [1, 0, 1]
        assert matrix_of(labels["probs"], 3)[1] == pytest.approx([0.2, 0.15, 0.15])
        assert quarantined(store, 3) == [(7, "too_long")]
        assert usage["large"].tokens == cost_of([4, 5, 6, 7])

    def test_the_cap_counts_as_unasked_only_what_has_no_label(self, store):
        small = FakeTeacher(surety({4: 0.4, 5: 0.9}), failing={6: "too_odd"})
        cascade = Cascade(store, small, budget={"cap": {"tokens": 10**6}})
        block = cascade.ask_small(leased(3, [4, 5, 6]))
        cascade.selector.tokens = 0
        assert asyncio.run(go(cascade.large, block)).to_pylist() == [{"ticket": 3, "rows": 2}]
        labels, usage, unasked = read_ticket(store, LABELS_DIR, 3)
        assert labels["row"].to_pylist() == [4, 5]
        assert (usage["small"].texts, usage["large"].texts, unasked) == (3, 0, 1)
        assert quarantined(store, 3) == []
        assert {one[2] for one in cascade.selector.told("reserve")} == {"small", "large"}

    def test_a_review_reads_all_of_its_rows_and_refuses_none(self, store):
        cascade = Cascade(store, large=FakeTeacher(large_says, failing={1: "too_long"}))
        assert cascade.run(cascade.review, [8, 1, 3]) == [{"ticket": cascade.review, "rows": 2}]
        assert cascade.large_teacher.calls == [[8, 1, 3]]
        labels, usage, _ = read_ticket(store, LABELS_DIR, cascade.review)
        assert labels["row"].to_pylist() == [8, 3]
        assert labels["member"].to_pylist() == [1, 1]
        assert usage.keys() == {"large"}
        assert quarantined(store, cascade.review) == [], "the text keeps the label that it has"

    def test_label_file_that_is_there_is_not_answered_again(self, store):
        cascade = Cascade(store, FakeTeacher(surety({4: 0.4})))
        cascade.selector.fails = 1
        with pytest.raises(ConnectionError):
            cascade.run(3, [4, 5])
        assert cascade.run(3, [4, 5]) == [{"ticket": 3, "rows": 2}]
        assert (cascade.small_teacher.calls, cascade.large_teacher.calls) == ([[4, 5]], [[4]])

    def test_large_one_that_breaks_costs_no_small_answer(self, store):
        large = FakeTeacher(large_says, errors=[RuntimeError("engine trouble")])
        cascade = Cascade(store, FakeTeacher(surety({4: 0.4})), large)
        with pytest.raises(RuntimeError):
            cascade.run(3, [4, 5])
        assert cascade.run(3, [4, 5]) == [{"ticket": 3, "rows": 2}]
        assert (cascade.small_teacher.calls, large.calls) == ([[4, 5]], [[4], [4]])
        (mark,) = store.names(SENT_DIR)
        assert store.read_json(f"{SENT_DIR}/{mark}")["texts"] == 1
