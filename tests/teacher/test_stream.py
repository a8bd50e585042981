"""The stages of the stream: files first, then the selector; whatever comes twice, breaks or gives up.

Without Ray's actors; the teachers are fakes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fake_selector import FakeSelector, go, pass_through
from fake_teacher import FakeTeacher, cost_of, leased, numbered
from toys import make_config, make_run

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schedule import Schedule
from llkd_ray.config.schema import Config
from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.run.loop import failed_teachers
from llkd_ray.selection.selector import Selector
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import LABELS_DIR, QUARANTINE_DIR, SENT_DIR, SMALL_DIR, RunStore, ticket_file
from llkd_ray.storage.tables import matrix_of
from llkd_ray.teacher import stream as stream_module
from llkd_ray.teacher.base import TeacherDown, Usage
from llkd_ray.teacher.labels import read_lost_usage, read_ticket
from llkd_ray.teacher.stream import Leaser, spare_tickets
from llkd_ray.teacher.worker import LargeStage, OnlyStage, SmallStage, Stage

N_POOL, N_TEST = 200, 30


@pytest.fixture
def store(tmp_path) -> RunStore:
    return make_run(tmp_path / "run", N_POOL, N_TEST)


def only_stage(
    store: RunStore, selector: FakeSelector, teacher: FakeTeacher | None = None, **sections: Any
) -> OnlyStage:
    return OnlyStage(make_config(**sections), store.root, selector, teacher or FakeTeacher())


def quarantined(store: RunStore, ticket: int) -> list[tuple[int, str]]:
    """Rows and reasons."""
    file = f"{QUARANTINE_DIR}/teacher-{ticket:08d}.parquet"
    if not store.exists(file):
        return []
    return [(one["position"], one["reason"]) for one in store.read_table(file).to_pylist()]


class TestOnlyStage:
    def test_file_first_then_the_selector(self, store):
        selector = FakeSelector()
        teacher = FakeTeacher(before_call=lambda: pytest.fail("early") if store.names(LABELS_DIR) else None)
        assert pass_through(only_stage(store, selector, teacher), leased(3, [5, 2, 9])) == [
            {"ticket": 3, "rows": 3}
        ]
        labels, usage, unasked = read_ticket(store, LABELS_DIR, 3)
        assert labels.schema.equals(tables.LABELS)
        assert labels["row"].to_pylist() == [5, 2, 9]
        assert labels["id"].to_pylist() == ["id-5", "id-2", "id-9"]
        assert matrix_of(labels["probs"], 3) == pytest.approx(np.stack([*map(numbered, (5, 2, 9))]))
        assert labels["off_label"].to_numpy() == pytest.approx([0.65, 0.68, 0.61])
        assert labels["prompt_tokens"].to_pylist() == [15, 12, 19]
        assert usage.keys() == {"teacher"}
        assert (usage["teacher"].texts, usage["teacher"].tokens) == (3, cost_of([5, 2, 9]))
        assert unasked == 0
        ((ticket, told),) = selector.told("put_labels")
        assert (ticket, told.row_M.tolist(), told.usage, told.unasked) == (3, [5, 2, 9], usage, 0)
        assert told.probs_MC.tolist() == labels["probs"].to_pylist()
        assert told.member_M.tolist() == [0, 0, 0]

    def test_label_file_that_is_there_is_not_answered_again(self, store):
        """The first attempt dies between its file and its word to the selector."""
        selector, teacher = FakeSelector(fails=1), FakeTeacher()
        with pytest.raises(ConnectionError):
            pass_through(only_stage(store, selector, teacher), leased(3, [5, 2]))
        assert teacher.calls == [[5, 2]]
        assert read_ticket(store, LABELS_DIR, 3)[0]["row"].to_pylist() == [5, 2]
        again = FakeTeacher()
        assert pass_through(only_stage(store, selector, again), leased(3, [5, 2])) == [
            {"ticket": 3, "rows": 2}
        ]
        assert again.calls == []
        ((ticket, told),) = selector.told("put_labels")
        assert (ticket, told.row_M.tolist()) == (3, [5, 2])
        assert told.usage["teacher"].tokens == cost_of([5, 2])
        assert told.probs_MC.shape == (2, 3)

    def test_mark_is_there_while_the_teacher_reads_and_gone_after(self, store):
        marks: list[str] = []
        teacher = FakeTeacher(before_call=lambda: marks.extend(store.names(SENT_DIR)))
        pass_through(only_stage(store, FakeSelector(), teacher), leased(7, [1, 2]))
        (mark,) = marks
        assert mark.startswith("ticket-00000007.")
        assert store.names(SENT_DIR) == []

    def test_mark_of_texts_that_were_never_answered_stays(self, store):
        selector = FakeSelector()
        marks: list[list[str]] = []
        teacher = FakeTeacher(
            errors=[RuntimeError("engine trouble")], before_call=lambda: marks.append(store.names(SENT_DIR))
        )
        stage = only_stage(store, selector, teacher)
        with pytest.raises(RuntimeError, match="engine trouble"):
            pass_through(stage, leased(7, [1, 2, 4]))
        (mark,) = store.names(SENT_DIR)
        assert store.read_json(f"{SENT_DIR}/{mark}")["texts"] == 3
        assert not store.exists(ticket_file(LABELS_DIR, 7))
        assert selector.calls == []
        # The retry has a mark of its own, and the first one still counts the lost texts.
        pass_through(stage, leased(7, [1, 2, 4]))
        assert len(marks[1]) == 2
        assert store.names(SENT_DIR) == [mark]
        assert len(selector.told("put_labels")) == 1

    def test_texts_without_an_answer_go_to_quarantine(self, store):
        selector = FakeSelector()
        teacher = FakeTeacher(failing={2: "too_odd", 9: "did_not_say"})
        assert pass_through(only_stage(store, selector, teacher), leased(3, [5, 2, 9])) == [
            {"ticket": 3, "rows": 1}
        ]
        assert read_ticket(store, LABELS_DIR, 3)[0]["row"].to_pylist() == [5]
        refused = store.read_table(f"{QUARANTINE_DIR}/teacher-00000003.parquet")
        assert refused.schema == tables.QUARANTINE
        assert refused.to_pylist() == [
            {
                "source": "teacher",
                "position": row,
                "reason": reason,
                "detail": "ticket 3",
                "start_of_text": f"text {row}",
            }
            for row, reason in ((2, "too_odd"), (9, "did_not_say"))
        ]
        ((_, told),) = selector.told("put_labels")
        assert told.row_M.tolist() == [5]
        assert told.usage["teacher"].tokens == cost_of([5, 2, 9]), "what failed has cost, too"

    def test_ticket_without_any_answer_is_done_all_the_same(self, store):
        selector = FakeSelector()
        stage = only_stage(store, selector, FakeTeacher(failing={2: "too_odd"}))
        assert pass_through(stage, leased(3, [2])) == [{"ticket": 3, "rows": 0}]
        assert len(read_ticket(store, LABELS_DIR, 3)[0]) == 0
        ((ticket, told),) = selector.told("put_labels")
        assert (ticket, told.row_M.tolist(), told.probs_MC.shape) == (3, [], (0, 3))

    def test_empty_lease_is_nobodys_business(self, store):
        selector, teacher = FakeSelector(), FakeTeacher()
        assert pass_through(only_stage(store, selector, teacher), leased(3, [])) == []
        assert (teacher.calls, selector.calls) == ([], [])
        assert store.names(LABELS_DIR) == store.names(SENT_DIR) == []

    def test_block_of_two_tickets_is_our_own_mistake(self, store):
        both = pa.concat_tables([leased(1, [1]), leased(2, [2])])
        with pytest.raises(AssertionError, match="a block holds one ticket"):
            pass_through(only_stage(store, FakeSelector()), both)

    def test_what_the_cap_leaves_no_room_for_is_neither_label_nor_refusal(self, store):
        tokens = cost_of([1, 2, 3])
        selector = FakeSelector(tokens=tokens)
        stage = only_stage(store, selector, budget={"cap": {"tokens": tokens}})
        pass_through(stage, leased(3, range(1, 7)))
        labels, usage, unasked = read_ticket(store, LABELS_DIR, 3)
        assert usage["teacher"].tokens <= tokens
        assert len(labels) + unasked == 6
        assert 1 <= unasked <= 4
        assert quarantined(store, 3) == []
        assert selector.told("put_labels")[0][1].unasked == unasked
        for ticket, attempt, teacher, claim in selector.told("reserve"):
            assert (ticket, teacher) == (3, "teacher")
            assert attempt.startswith("ticket-00000003.")
            assert claim == Usage(**claim).as_dict(), "plain numbers go to the actor"

    def test_the_teacher_is_closed_with_its_stage(self, store):
        teacher = FakeTeacher()
        stage = only_stage(store, FakeSelector(), teacher)
        del stage
        assert teacher.is_closed


# --- a cascade


def surety(of_number: dict[int, float]) -> Any:
    """Answers for label 0 with some confidence, 0.9 by default; half of the mass is off label."""

    def says(number: int) -> np.ndarray:
        sure = of_number.get(number, 0.9)
        return 0.5 * np.array([sure, (1 - sure) / 2, (1 - sure) / 2])

    return says


def large_says(number: int) -> np.ndarray:
    return np.array([0.05, 0.9, 0.05])


def cascade_config(**sections: Any) -> Config:
    """A cascade in doubt below 0.6; the members' own kind does not matter, their labellers are fakes."""
    member = {"kind": "recorded", "recorded": {"uri": "answers.parquet"}}
    cascade = {"small": member, "large": member | {"tickets_in_flight": 3}, "escalate_below": 0.6}
    return make_config(teacher={"kind": "cascade", "cascade": cascade}, **sections)


class Cascade:
    """Both stages on one run."""

    def __init__(self, store: RunStore, small: FakeTeacher, large: FakeTeacher, **sections: Any) -> None:
        self.store, self.small_teacher, self.large_teacher = store, small, large
        self.config = cascade_config(**sections)
        self.selector = FakeSelector()
        self.small = SmallStage(self.config, store.root, self.selector, small)
        self.large = LargeStage(self.config, store.root, self.selector, large)

    def run(self, ticket: int, rows: Sequence[int]) -> list[dict]:
        """One ticket through both stages."""

        async def script():
            return await go(self.large, await go(self.small, leased(ticket, rows)))

        return asyncio.run(script()).to_pylist()

    @property
    def reviews(self) -> range:
        return Schedule.plan(self.config, N_POOL, N_TEST).review_tickets


class TestSmallStage:
    def test_its_file_comes_first_and_everything_goes_on(self, store):
        cascade = Cascade(store, FakeTeacher(failing={2: "too_odd"}), FakeTeacher())
        block = leased(3, [5, 2, 9])
        assert asyncio.run(go(cascade.small, block)).equals(block)
        labels, usage, unasked = read_ticket(store, SMALL_DIR, 3)
        assert labels["row"].to_pylist() == [5, 9]
        assert labels["member"].to_pylist() == [0, 0]
        assert usage.keys() == {"small"}
        assert usage["small"].tokens == cost_of([5, 2, 9])
        assert unasked == 0
        assert cascade.selector.calls == [("commit_usage", (3, "small", usage["small"].as_dict()))]
        assert quarantined(store, 3) == [], "the large one may answer it"
        assert store.names(LABELS_DIR) == store.names(SENT_DIR) == []

    @pytest.mark.parametrize("folder", [SMALL_DIR, LABELS_DIR])
    def test_what_is_done_goes_on_as_it_is(self, store, folder):
        store.write_table(ticket_file(folder, 3), tables.LABELS.empty_table())
        cascade = Cascade(store, FakeTeacher(), FakeTeacher())
        block = leased(3, [5, 2])
        assert asyncio.run(go(cascade.small, block)).equals(block)
        assert cascade.small_teacher.calls == []

    def test_reviews_are_not_its_business(self, store):
        cascade = Cascade(store, FakeTeacher(), FakeTeacher())
        block = leased(cascade.reviews[0], [5, 2])
        assert asyncio.run(go(cascade.small, block)).equals(block)
        assert cascade.small_teacher.calls == []
        assert store.names(SMALL_DIR) == store.names(SENT_DIR) == []
        assert cascade.selector.calls == []

    def test_empty_lease(self, store):
        cascade = Cascade(store, FakeTeacher(), FakeTeacher())
        assert cascade.run(3, []) == []
        assert cascade.selector.calls == []
        assert store.names(SMALL_DIR) == store.names(LABELS_DIR) == []


class TestLargeStage:
    def test_it_reads_what_is_unsure_or_unanswered(self, store):
        small = FakeTeacher(surety({4: 0.59, 5: 0.61, 6: 0.4}), failing={7: "too_odd"})
        cascade = Cascade(store, small, FakeTeacher(large_says))
        rows = [9, 4, 7, 5, 6, 8]
        assert cascade.run(3, rows) == [{"ticket": 3, "rows": 6}]
        assert small.calls == [rows]
        assert cascade.large_teacher.calls == [[4, 7, 6]]
        labels, usage, unasked = read_ticket(store, LABELS_DIR, 3)
        assert labels["row"].to_pylist() == rows
        assert labels["member"].to_pylist() == [0, 1, 1, 0, 1, 0]
        assert matrix_of(labels["probs"], 3).argmax(axis=1).tolist() == [0, 1, 1, 0, 1, 0]
        assert usage.keys() == {"small", "large"}
        assert (usage["small"].texts, usage["small"].tokens) == (6, cost_of(rows))
        assert (usage["large"].texts, usage["large"].tokens) == (3, cost_of([4, 7, 6]))
        assert unasked == 0
        assert quarantined(store, 3) == []
        assert store.names(SENT_DIR) == []
        ((ticket, told),) = cascade.selector.told("put_labels")
        assert (ticket, told.row_M.tolist(), told.usage) == (3, rows, usage)
        assert told.member_M.tolist() == labels["member"].to_pylist()
        metadata = store.read_table(ticket_file(LABELS_DIR, 3)).schema.metadata
        assert metadata[b"tickets_in_flight"] == b"3", "the speed of the large one is measured on its file"

    def test_where_nothing_is_in_doubt_it_is_not_asked(self, store):
        cascade = Cascade(store, FakeTeacher(surety({})), FakeTeacher())
        assert cascade.run(3, [5, 2]) == [{"ticket": 3, "rows": 2}]
        assert cascade.large_teacher.calls == []
        labels, usage, _ = read_ticket(store, LABELS_DIR, 3)
        assert labels["member"].to_pylist() == [0, 0]
        assert usage["large"] == Usage()

    def test_a_small_answer_is_kept_where_the_large_one_has_none(self, store):
        small = FakeTeacher(surety({4: 0.4, 5: 0.4}), failing={6: "too_odd", 7: "too_odd"})
        large = FakeTeacher(large_says, failing={5: "too_long", 7: "too_long"})
        cascade = Cascade(store, small, large)
        assert cascade.run(3, [4, 5, 6, 7]) == [{"ticket": 3, "rows": 3}]
        labels, usage, _ = read_ticket(store, LABELS_DIR, 3)
        assert list(zip(labels["row"].to_pylist(), labels["member"].to_pylist(), strict=True)) == [
            (4, 1),
            (5, 0),
            (6, 1),
        ]
        assert matrix_of(labels["probs"], 3)[1] == pytest.approx([0.2, 0.15, 0.15])
        assert quarantined(store, 3) == [(7, "too_long")]
        assert usage["large"].tokens == cost_of([4, 5, 6, 7])

    def test_the_cap_counts_as_unasked_only_what_has_no_label(self, store):
        small = FakeTeacher(surety({4: 0.4, 5: 0.9}), failing={6: "too_odd"})
        cascade = Cascade(store, small, FakeTeacher(large_says), budget={"cap": {"tokens": 10**6}})

        async def script():
            block = await go(cascade.small, leased(3, [4, 5, 6]))
            cascade.selector.tokens = 0
            return await go(cascade.large, block)

        assert asyncio.run(script()).to_pylist() == [{"ticket": 3, "rows": 2}]
        labels, usage, unasked = read_ticket(store, LABELS_DIR, 3)
        assert labels["row"].to_pylist() == [4, 5]
        assert unasked == 1
        assert (usage["small"].texts, usage["large"].texts) == (3, 0)
        assert quarantined(store, 3) == []
        assert {one[2] for one in cascade.selector.told("reserve")} == {"small", "large"}

    def test_a_review_reads_all_of_its_rows(self, store):
        cascade = Cascade(store, FakeTeacher(), FakeTeacher(large_says))
        review = cascade.reviews[-1]
        assert cascade.run(review, [8, 1, 3]) == [{"ticket": review, "rows": 3}]
        assert cascade.large_teacher.calls == [[8, 1, 3]]
        labels, usage, _ = read_ticket(store, LABELS_DIR, review)
        assert labels["row"].to_pylist() == [8, 1, 3]
        assert labels["member"].to_pylist() == [1, 1, 1]
        assert usage.keys() == {"large"}

    def test_label_file_that_is_there_is_not_answered_again(self, store):
        small, large = FakeTeacher(surety({4: 0.4})), FakeTeacher(large_says)
        cascade = Cascade(store, small, large)
        cascade.selector.fails = 1
        with pytest.raises(ConnectionError):
            cascade.run(3, [4, 5])
        assert cascade.run(3, [4, 5]) == [{"ticket": 3, "rows": 2}]
        assert (small.calls, large.calls) == ([[4, 5]], [[4]])

    def test_large_one_that_breaks_costs_no_small_answer(self, store):
        small = FakeTeacher(surety({4: 0.4}))
        large = FakeTeacher(large_says, errors=[RuntimeError("engine trouble")])
        cascade = Cascade(store, small, large)
        with pytest.raises(RuntimeError):
            cascade.run(3, [4, 5])
        assert cascade.run(3, [4, 5]) == [{"ticket": 3, "rows": 2}]
        assert (small.calls, large.calls) == ([[4, 5]], [[4], [4]])
        (mark,) = store.names(SENT_DIR)
        assert store.read_json(f"{SENT_DIR}/{mark}")["texts"] == 1


# --- a teacher that gives up


class TestTeacherDown:
    def stage(self, kind: type[Stage], store: RunStore, selector: FakeSelector, *downs: str) -> Stage:
        config = make_config() if kind is OnlyStage else cascade_config()
        return kind(config, store.root, selector, FakeTeacher(errors=[TeacherDown(down) for down in downs]))

    @pytest.mark.parametrize(
        ("kind", "name"), [(OnlyStage, "teacher"), (SmallStage, "small"), (LargeStage, "large")]
    )
    def test_the_ticket_is_given_back_and_nothing_goes_on(self, store, kind, name):
        selector = FakeSelector()
        stage = self.stage(kind, store, selector, "the server is gone")

        async def script():
            going = asyncio.create_task(go(stage, leased(3, [5, 2])))
            while not going.done() and not selector.told("wait_taught"):
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.01)
            assert not going.done(), "who has given up takes nothing more before the teaching is over"
            assert selector.calls[-1] == ("wait_taught", ())
            selector.is_taught = True
            return await asyncio.wait_for(going, 5)

        assert len(asyncio.run(script())) == 0
        ((*given_back, _),) = selector.told("give_back")
        assert given_back == [3, name, stage.actor, "the server is gone"]
        assert selector.told("put_labels") == selector.told("commit_usage") == []
        assert store.names(LABELS_DIR) == store.names(SMALL_DIR) == []
        assert len(store.names(SENT_DIR)) == 1
        assert quarantined(store, 3) == []

    def test_nothing_of_it_reaches_the_large_one(self, store):
        selector = FakeSelector()
        selector.is_taught = True
        small = self.stage(SmallStage, store, selector, "gone")
        large = self.stage(LargeStage, store, selector)

        async def script():
            return await go(large, await go(small, leased(3, [5, 2])))

        assert len(asyncio.run(script())) == 0
        assert large.worker._teacher.calls == []
        assert store.names(LABELS_DIR) == []

    def test_tickets_in_flight_are_given_back_together(self, store):
        selector = FakeSelector()
        selector.is_taught = True
        stage = self.stage(OnlyStage, store, selector, "gone", "gone")

        async def script():
            return await asyncio.gather(go(stage, leased(3, [5])), go(stage, leased(4, [6])))

        asyncio.run(script())
        assert sorted(one[0] for one in selector.told("give_back")) == [3, 4]
        assert {one[2] for one in selector.told("give_back")} == {stage.actor}
        assert len({one[4] for one in selector.told("give_back")}) == 2, "each is a call of its own"

    def test_another_actor_does_the_ticket(self, store):
        selector = FakeSelector()
        selector.is_taught = True
        pass_through(self.stage(OnlyStage, store, selector, "gone"), leased(3, [5, 2]))
        other = self.stage(OnlyStage, store, selector)
        assert pass_through(other, leased(3, [5, 2])) == [{"ticket": 3, "rows": 2}]
        assert read_ticket(store, LABELS_DIR, 3)[0]["row"].to_pylist() == [5, 2]

    def test_what_may_have_been_used_stays_on_the_books(self, store):
        selector = FakeSelector()
        selector.is_taught = True
        config = make_config(budget={"cap": {"tokens": 10**6}})

        class HalfWay(FakeTeacher):
            async def label(self, ids, texts, allowance):
                await allowance.take(texts=1, prompt_tokens=15, answer_tokens=1)
                raise TeacherDown("gone")

        pass_through(OnlyStage(config, store.root, selector, HalfWay()), leased(3, [5, 2]))
        lost = read_lost_usage(store)
        assert lost.keys() == {"teacher"}
        assert lost["teacher"].texts >= 1
        assert lost["teacher"].tokens >= 16


class Handle:
    """A selector in this event loop, called as an actor is."""

    def __init__(self, selector: Selector) -> None:
        self.selector = selector

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.selector, name))


class DownAfter(FakeTeacher):
    """Gives up after some calls."""

    def __init__(self, calls: int) -> None:
        super().__init__(large_says)
        self.limit = calls

    async def label(self, ids, texts, allowance):
        if len(self.calls) >= self.limit:
            raise TeacherDown("the server is gone")
        await asyncio.sleep(0.001)
        return await super().label(ids, texts, allowance)


class TestAnActorThatIsLost:
    """The stream as Ray Data runs it, in one event loop: a leaser, two actors, and the selector itself."""

    ROUNDS = 4

    async def teach(self, store: RunStore, teachers: Sequence[FakeTeacher]) -> Selector:
        """Teach as far as it goes, with a student that learns in no time."""
        config = make_config(
            teacher={"ticket_size": 4, "actors": len(teachers)},
            budget={"rounds": self.ROUNDS, "train": 60},
            selection={"policy": "random"},
        )
        selector = Selector(config, store.root)
        handle: Any = Handle(selector)
        leaser = Leaser(store.root, handle)
        stages = [OnlyStage(config, store.root, handle, teacher) for teacher in teachers]
        # Spare tickets come first: behind all others, they would wait for rounds that wait for them.
        spare = spare_tickets(config)
        tickets = iter([*spare, *selector.schedule.in_order()])
        blocks: asyncio.Queue[pa.Table] = asyncio.Queue()

        async def lease() -> None:
            for ticket in tickets:
                async for block in leaser(pa.table({"ticket": [ticket]})):
                    blocks.put_nowait(block)

        async def work(stage: Stage) -> None:
            while True:
                await go(stage, await blocks.get())

        async def learn() -> None:
            for k in range(self.ROUNDS):
                await selector.wait_labels(k)
                await selector.select(k)
                await selector.trained(k, {})
            await selector.wait_taught()

        tasks = [asyncio.create_task(lease()) for _ in range(len(spare) + 2)]
        tasks += [asyncio.create_task(work(stage)) for stage in stages for _ in range(2)]
        tasks.append(learning := asyncio.create_task(learn()))
        async with asyncio.timeout(30):
            while not learning.done() and selector.teachers.failure_reason() is None:
                await asyncio.sleep(0.005)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return selector

    @pytest.mark.parametrize("calls", [0, 1, 5])
    def test_every_text_is_labelled_all_the_same(self, store, calls):
        teachers = [DownAfter(calls), DownAfter(10**9)]
        selector = asyncio.run(self.teach(store, teachers))
        assert selector.teachers.failure_reason() is None
        assert len(store.names(LABELS_DIR)) == selector.schedule.n_tickets
        assert [one["reason"] for one in failed_teachers(store)] == ["the server is gone"]
        answers = [row for teacher in teachers for rows in teacher.calls for row in rows]
        assert sorted(answers) == list(range(N_POOL + N_TEST)), "each text once"
        assert len(teachers[0].calls) <= calls + 1

    def test_when_none_is_left_the_user_is_told(self, store):
        selector = asyncio.run(self.teach(store, [DownAfter(2), DownAfter(3)]))
        assert selector.teachers.failure_reason() == (
            "the teacher has given up, all 2 actor(s): the server is gone"
        )
        assert len(failed_teachers(store)) == 2
        assert 0 < len(store.names(LABELS_DIR)) < selector.schedule.n_tickets


# --- the stream's other parts


class TestLeaser:
    def lease(self, store: RunStore, tickets: list[int], **leases: Any) -> list[pa.Table]:
        selector = FakeSelector()
        selector.leases = {number: leases[f"t{abs(number)}"] for number in tickets}

        async def script():
            leaser = Leaser(store.root, selector)
            return [block async for block in leaser(pa.table({"ticket": tickets}))]

        return asyncio.run(script())

    def test_each_ticket_is_a_block_of_its_texts(self, store):
        rows = np.array([150, 3, 77])
        first, second = self.lease(store, [4, 5], t4=(4, rows), t5=(5, rows[:1]))
        assert first["ticket"].to_pylist() == [4, 4, 4]
        assert first["row"].to_pylist() == [150, 3, 77]
        assert first["id"].to_pylist() == ["toy-150", "toy-3", "toy-77"]
        assert all(first["text"].to_pylist())
        assert second["ticket"].to_pylist() == [5]

    def test_a_spare_ticket_becomes_the_one_that_was_given_back(self, store):
        (block,) = self.lease(store, [-2], t2=(17, np.array([9])))
        assert block["ticket"].to_pylist() == [17]

    def test_an_empty_lease_has_the_same_columns(self, store):
        full, empty = self.lease(store, [4, 5], t4=(4, np.array([1])), t5=(5, np.empty(0, np.int64)))
        assert len(empty) == 0
        assert empty.schema == full.schema


class TestPools:
    def test_a_spare_ticket_for_each_that_may_be_given_back(self):
        one = make_config(teacher={"actors": 3, "tickets_in_flight": 4})
        assert list(spare_tickets(one)) == list(range(-12, 0))
        assert list(spare_tickets(cascade_config())) == list(range(-5, 0)), "two and three in flight"

    def test_a_pool_that_may_grow_has_them_for_its_largest(self):
        assert len(spare_tickets(make_config(teacher={"actors": [1, 3], "tickets_in_flight": 2}))) == 6

    @pytest.mark.parametrize("actors", [0, (0, 2), (3, 2)])
    def test_a_pool_that_cannot_be_is_refused(self, actors):
        with pytest.raises(ConfigError, match=r"^teacher\.actors: is .*at least 1, or \(min, max\)"):
            make_config(teacher={"actors": actors})

    def test_a_pool_is_a_number_or_two(self):
        pools = [make_config(teacher={"actors": actors}).teacher for actors in (2, (1, 3))]
        assert [(one.min_actors, one.max_actors) for one in pools] == [(2, 2), (1, 3)]

    def test_resources_of_ones_own(self):
        resources = stream_module._resources(TeacherConfig(model="toy", resources={"teacher": 1.0}), [])
        assert resources == {"num_cpus": 0.5, "num_gpus": None, "resources": {"teacher": 1.0}}

    def test_an_engine_in_one_piece(self):
        resources = stream_module._resources(TeacherConfig(model="toy", cpus=2, gpus=1), [])
        assert resources == {"num_cpus": 2, "num_gpus": 1}

    def test_parts_on_cpus_are_processes_of_one_actor(self):
        resources = stream_module._resources(TeacherConfig(model="toy", cpus=2, tensor_parallel=2), [])
        assert resources == {"num_cpus": 4, "num_gpus": None}

    @pytest.mark.parametrize(("parts", "removed"), [(1, []), (2, ["the actor's own"])])
    def test_an_actor_that_goes_takes_its_placement_group_along(self, monkeypatch, parts, removed):
        gone: list[str] = []
        monkeypatch.setattr(stream_module.ray, "is_initialized", lambda: True)
        monkeypatch.setattr(stream_module.ray.util, "get_current_placement_group", lambda: "the actor's own")
        monkeypatch.setattr(stream_module.ray.util, "remove_placement_group", gone.append)
        stream_module._leave_placement_group(TeacherConfig(model="toy", gpus=1, tensor_parallel=parts))
        assert gone == removed, "an engine in one piece may share the driver's own group"

    @pytest.mark.parametrize(
        ("tensor", "pipeline", "strategy"), [(4, 1, "STRICT_PACK"), (2, 2, "PACK"), (1, 4, "PACK")]
    )
    def test_parts_on_gpus_share_a_placement_group(self, monkeypatch, tensor, pipeline, strategy):
        answers: list[tuple] = []
        names: set[str] = set()

        def placement_group(bundles, strategy, name):
            answers.append((bundles, strategy))
            names.add(name)
            return f"group {len(answers)}"

        monkeypatch.setattr(stream_module.ray.util, "placement_group", placement_group)
        settings = {"tensor_parallel": tensor, "pipeline_parallel": pipeline}
        groups: list[Any] = []
        resources = stream_module._resources(TeacherConfig(model="toy", cpus=2, gpus=1, **settings), groups)
        assert resources["num_cpus"] == 2
        assert "num_gpus" not in resources, "the parts take the GPUs, not the actor"
        for name in ("group 1", "group 2"):  # each actor has its own
            chosen = resources["ray_remote_args_fn"]()["scheduling_strategy"]
            assert chosen.placement_group == name
            assert chosen.placement_group_capture_child_tasks
        assert answers == [([{"CPU": 2, "GPU": 1}] * 4, strategy)] * 2
        assert groups == ["group 1", "group 2"], "whoever started them removes them"
        assert len(names - {""}) == 2, "groups without a name are taken for those of a dead Train controller"
