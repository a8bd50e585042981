"""A teacher and its stage: answers of earlier runs, the cap, marks, files, and a teacher that gives up."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fake_selector import FakeSelector, go, pass_through
from fake_teacher import FakeTeacher, cascade_config, cost_of, leased, numbered, quarantined
from toys import make_config

from llkd_ray.config.schema import Config
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import (
    ENGINES_DIR,
    LABELS_DIR,
    NO_LABEL,
    QUARANTINE_DIR,
    SENT_DIR,
    SMALL_DIR,
    RunStore,
    ticket_file,
)
from llkd_ray.storage.tables import matrix_of
from llkd_ray.teacher import worker as worker_module
from llkd_ray.teacher.base import UNASKED, TeacherDown, Usage
from llkd_ray.teacher.factory import CACHE_DIR, cache_key
from llkd_ray.teacher.labels import read_lost_usage, read_ticket, write_ticket
from llkd_ray.teacher.worker import LargeStage, OnlyStage, SmallStage, TeacherWorker, TicketAnswers


@pytest.fixture
def store(tmp_path) -> RunStore:
    return RunStore(str(tmp_path / "run"))


def only_stage(
    store: RunStore, selector: FakeSelector, teacher: FakeTeacher | None = None, **sections: Any
) -> OnlyStage:
    return OnlyStage(make_config(**sections), store.root, selector, teacher or FakeTeacher())


def marks_of(store: RunStore) -> dict[str, Any]:
    return {name: store.read_json(f"{SENT_DIR}/{name}") for name in store.names(SENT_DIR)}


class TestOnlyStage:
    def test_file_first_then_the_selector(self, store):
        selector = FakeSelector()
        teacher = FakeTeacher(before_call=lambda: pytest.fail("early") if store.names(LABELS_DIR) else None)
        block = leased(3, [5, 2, 9])
        assert pass_through(only_stage(store, selector, teacher), block) == [{"ticket": 3, "rows": 3}]
        labels, usage, unasked = read_ticket(store, LABELS_DIR, 3)
        assert labels.schema.equals(tables.LABELS)
        assert labels["row"].to_pylist() == [5, 2, 9]
        assert labels["id"].to_pylist() == ["id-5", "id-2", "id-9"]
        assert labels["text_hash"].equals(block["text_hash"]), "as they were kept at ingestion"
        assert matrix_of(labels["probs"], 3) == pytest.approx(np.stack([*map(numbered, (5, 2, 9))]))
        assert labels["off_label"].to_numpy() == pytest.approx([0.65, 0.68, 0.61])
        assert labels["prompt_tokens"].to_pylist() == [15, 12, 19]
        assert labels["reused"].to_pylist() == [False] * 3
        assert usage.keys() == {"teacher"}
        assert (usage["teacher"].texts, usage["teacher"].tokens) == (3, cost_of([5, 2, 9]))
        assert usage["teacher"].seconds > 0
        assert unasked == 0
        ((name, (ticket, told)),) = selector.calls
        assert (name, ticket) == ("put_labels", 3), "without a cap, nobody is asked for leave"
        assert (told.row_M.tolist(), told.usage, told.unasked) == ([5, 2, 9], usage, 0)
        assert told.probs_MC.tolist() == labels["probs"].to_pylist()
        assert told.member_M.tolist() == [0, 0, 0]

    def test_label_file_that_is_there_is_not_answered_again(self, store):
        """The first attempt dies between its file and its word to the selector."""
        selector, teacher = FakeSelector(fails=1), FakeTeacher()
        with pytest.raises(ConnectionError):
            pass_through(only_stage(store, selector, teacher), leased(3, [5, 2]))
        assert read_ticket(store, LABELS_DIR, 3)[0]["row"].to_pylist() == [5, 2]
        again = FakeTeacher()
        receipt = pass_through(only_stage(store, selector, again), leased(3, [5, 2]))
        assert receipt == [{"ticket": 3, "rows": 2}]
        assert (teacher.calls, again.calls) == ([[5, 2]], [])
        ((ticket, told),) = selector.told("put_labels")
        assert (ticket, told.row_M.tolist(), told.probs_MC.shape) == (3, [5, 2], (2, 3))
        assert told.usage["teacher"].tokens == cost_of([5, 2])

    def test_of_two_attempts_at_a_ticket_the_first_file_counts(self, store):
        """An actor that counts as lost may still be at work; its sampled answers are other ones."""
        selector, file = FakeSelector(), ticket_file(LABELS_DIR, 3)
        pass_through(only_stage(store, selector, FakeTeacher()), leased(3, [5, 2]))
        of_the_fast_one = store.read_bytes(file)
        store.delete(file)
        slow_teacher = FakeTeacher(
            says=lambda number: np.array([0.0, 0.9, 0.0]),
            before_call=lambda: store.write_bytes(file, of_the_fast_one),
        )
        assert pass_through(only_stage(store, selector, slow_teacher), leased(3, [5, 2])) == [
            {"ticket": 3, "rows": 2}
        ]
        labels = read_ticket(store, LABELS_DIR, 3)[0]
        assert matrix_of(labels["probs"], 3) == pytest.approx(np.stack([*map(numbered, (5, 2))]))
        (_, first), (_, second) = selector.told("put_labels")
        assert first.probs_MC.tolist() == second.probs_MC.tolist()
        assert first.attempt is not None
        assert second.attempt is None, "what the slow one holds is not freed"
        assert [*marks_of(store).values()] == [{"texts": 2, "usage": {}}], "what the slow one sent is lost"

    def test_the_mark_stands_from_the_question_until_the_labels_are_written(self, store):
        selector, seen = FakeSelector(), []
        teacher = FakeTeacher(
            errors=[RuntimeError("engine trouble")], before_call=lambda: seen.append(marks_of(store))
        )
        stage = only_stage(store, selector, teacher)
        with pytest.raises(RuntimeError, match="engine trouble"):
            pass_through(stage, leased(7, [1, 2, 4]))
        lost = marks_of(store)
        assert seen == [lost]
        assert [*lost.values()] == [{"texts": 3, "usage": {}}]
        assert next(iter(lost)).startswith("ticket-00000007.")
        assert selector.calls == store.names(LABELS_DIR) == []
        # The retry has a mark of its own, and the first one still counts the lost texts.
        pass_through(stage, leased(7, [1, 2, 4]))
        assert len(seen[1]) == 2
        assert marks_of(store) == lost
        assert len(selector.told("put_labels")) == 1

    def test_texts_without_an_answer_go_to_quarantine(self, store):
        selector = FakeSelector()
        stage = only_stage(store, selector, FakeTeacher(failing={2: "too_odd", 9: "did_not_say"}))
        assert pass_through(stage, leased(3, [5, 2, 9])) == [{"ticket": 3, "rows": 1}]
        assert read_ticket(store, LABELS_DIR, 3)[0]["row"].to_pylist() == [5]
        refused = store.read_table(f"{QUARANTINE_DIR}/teacher-00000003.parquet")
        assert refused.schema == tables.QUARANTINE
        common = {"source": "teacher", "detail": "ticket 3"}
        assert refused.to_pylist() == [
            common | {"position": 2, "reason": "too_odd", "start_of_text": "text 2"},
            common | {"position": 9, "reason": "did_not_say", "start_of_text": "text 9"},
        ]
        assert pass_through(stage, leased(4, [2])) == [{"ticket": 4, "rows": 0}], "done all the same"
        (_, told), (_, nothing) = selector.told("put_labels")
        assert told.row_M.tolist() == [5]
        assert told.usage["teacher"].tokens == cost_of([5, 2, 9]), "what failed has cost, too"
        assert (nothing.row_M.tolist(), nothing.probs_MC.shape) == ([], (0, 3))

    def test_an_answer_that_is_no_label_is_no_label(self, store):
        """Refusals and thinking aloud once became class 0, whose normalised probability was 1/C."""
        selector = FakeSelector()
        says = {1: np.zeros(3), 2: np.array([0.0, 0.004, 0.002]), 3: np.array([0.0, 0.02, 0.0])}
        teacher = FakeTeacher(says=lambda number: says.get(number, np.array([0.1, 0.8, 0.1])))
        pass_through(only_stage(store, selector, teacher), leased(3, [1, 2, 3, 4]))
        assert read_ticket(store, LABELS_DIR, 3)[0]["row"].to_pylist() == [3, 4]
        assert quarantined(store, 3) == [(1, NO_LABEL), (2, NO_LABEL)]
        ((_, told),) = selector.told("put_labels")
        assert told.row_M.tolist() == [3, 4]
        assert told.usage["teacher"].tokens == cost_of([1, 2, 3, 4])

        lenient = OnlyStage(make_config(teacher={"max_off_label": 1.0}), store.root, selector, teacher)
        pass_through(lenient, leased(4, [1, 2, 3]))
        assert quarantined(store, 4) == [(1, NO_LABEL)], "no mass is never a label"

    def test_a_block_holds_one_ticket_or_nothing(self, store):
        selector, teacher = FakeSelector(), FakeTeacher()
        stage = only_stage(store, selector, teacher)
        assert pass_through(stage, leased(3, [])) == []
        both = pa.concat_tables([leased(1, [1]), leased(2, [2])])
        with pytest.raises(AssertionError, match="a block holds one ticket"):
            pass_through(stage, both)
        assert teacher.calls == selector.calls == store.names(LABELS_DIR) == store.names(SENT_DIR) == []

    def test_the_teacher_is_closed_with_its_stage(self, store):
        teacher, dropped, config = FakeTeacher(), [], make_config()
        stage = OnlyStage(config, store.root, FakeSelector(), teacher, on_drop=dropped.append)
        del stage
        assert teacher.is_closed
        assert dropped == [config.teacher]


class TestCap:
    def test_what_it_leaves_no_room_for_is_neither_label_nor_refusal(self, store):
        tokens = cost_of([1, 2, 3]) + 5
        selector = FakeSelector(tokens=tokens)
        pass_through(only_stage(store, selector, budget={"cap": {"tokens": tokens}}), leased(3, range(1, 7)))
        labels, usage, unasked = read_ticket(store, LABELS_DIR, 3)
        assert usage["teacher"].tokens <= tokens - selector.tokens
        assert usage["teacher"].texts == len(labels) == 6 - unasked
        assert 1 <= unasked <= 4
        assert quarantined(store, 3) == []
        assert selector.told("put_labels")[0][1].unasked == unasked
        for ticket, attempt, teacher, claim in selector.told("reserve"):
            assert (ticket, teacher) == (3, "teacher")
            assert attempt.startswith("ticket-00000003.")
            assert claim == Usage(**claim).as_dict(), "plain numbers go to the actor"

    def test_what_may_be_used_is_in_the_mark_before_it_is(self, store):
        used, written = [0], []

        def after_request(meter):
            used[0] += meter.prompt_tokens + meter.answer_tokens
            ((name, mark),) = marks_of(store).items()
            written.append((name, Usage(**mark["usage"]["teacher"])))
            assert written[-1][1].tokens >= used[0]
            assert written[-1][1].texts >= len(written)
            assert mark["texts"] == 6

        selector, teacher = FakeSelector(), FakeTeacher(after_request=after_request)
        stage = only_stage(store, selector, teacher, budget={"cap": {"tokens": 10**6}})
        pass_through(stage, leased(3, range(6)))
        assert len(written) == 6
        claims = selector.told("reserve")
        assert {claim[:3] for claim in claims} == {(3, written[0][0], "teacher")}
        assert sum((Usage(**claim[3]) for claim in claims), Usage()) == written[-1][1]


class TestTeacherDown:
    """The ticket is given back, and who has given up takes nothing more before the teaching is over."""

    @pytest.mark.parametrize(
        ("kind", "name"), [(OnlyStage, "teacher"), (SmallStage, "small"), (LargeStage, "large")]
    )
    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (TeacherDown("the server is gone"), "the server is gone"),
            (OSError(errno.ENOSPC, "disk full"), "no room to write labels: [Errno 28] disk full"),
        ],
    )
    def test_the_ticket_is_given_back_and_nothing_goes_on(self, store, kind, name, error, reason):
        selector = FakeSelector()
        config = make_config() if kind is OnlyStage else cascade_config()
        stage = kind(config, store.root, selector, FakeTeacher(errors=[error]))
        stage._reviews = range(0)

        async def script():
            going = asyncio.create_task(go(stage, leased(3, [5, 2])))
            while not going.done() and not selector.told("wait_taught"):
                await asyncio.sleep(0.001)
            assert not going.done()
            assert selector.calls[-1] == ("wait_taught", ())
            selector.is_taught = True
            return await going

        assert len(asyncio.run(script())) == 0
        ((*given_back, _),) = selector.told("give_back")
        assert given_back == [3, name, stage.actor, reason]
        assert [called for called, _ in selector.calls] == ["give_back", "wait_taught"]
        assert store.names(LABELS_DIR) == store.names(SMALL_DIR) == quarantined(store, 3) == []
        assert len(store.names(SENT_DIR)) == 1

    def test_an_error_of_the_disk_that_is_not_about_room_comes_out(self, store):
        stage = only_stage(store, FakeSelector(), FakeTeacher(errors=[OSError(errno.EIO, "broken disk")]))
        with pytest.raises(OSError, match="broken disk"):
            pass_through(stage, leased(3, [5]))

    def test_tickets_in_flight_are_given_back_together_and_done_by_another_actor(self, store):
        selector = FakeSelector()
        selector.is_taught = True
        stage = only_stage(store, selector, FakeTeacher(errors=[TeacherDown("gone"), TeacherDown("gone")]))

        async def script():
            return await asyncio.gather(go(stage, leased(3, [5])), go(stage, leased(4, [6])))

        asyncio.run(script())
        given_back = selector.told("give_back")
        assert sorted(one[0] for one in given_back) == [3, 4]
        assert {one[2] for one in given_back} == {stage.actor}
        assert len({one[4] for one in given_back}) == 2, "each is a call of its own"
        assert pass_through(only_stage(store, selector), leased(3, [5])) == [{"ticket": 3, "rows": 1}]
        assert read_ticket(store, LABELS_DIR, 3)[0]["row"].to_pylist() == [5]

    def test_what_may_have_been_used_stays_on_the_books(self, store):
        selector = FakeSelector()
        selector.is_taught = True

        class HalfWay(FakeTeacher):
            async def label(self, ids, texts, allowance):
                await allowance.take(texts=1, prompt_tokens=15, answer_tokens=1)
                raise TeacherDown("gone")

        stage = only_stage(store, selector, HalfWay(), budget={"cap": {"tokens": 10**6}})
        pass_through(stage, leased(3, [5, 2]))
        lost = read_lost_usage(store)
        assert lost.keys() == {"teacher"}
        assert lost["teacher"].texts >= 1
        assert lost["teacher"].tokens >= 16


class Bench:
    """A folder of runs with one cache, and teachers in them."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model = folder, model

    def one(self, **settings: Any) -> dict[str, Any]:
        """A vllm teacher: its checkpoint is what the cache's key needs."""
        return {"kind": "vllm", "model": self.model, "max_model_len": 256} | settings

    def config(self, teacher: dict[str, Any] | None = None, **sections: Any) -> Config:
        return make_config(
            **({"teacher": teacher or self.one(), "run": {"dir": str(self.folder)}} | sections)
        )

    def cascade(self) -> Config:
        small = self.one(prompt={"instruction": "Be quick."})
        return self.config({"kind": "cascade", "cascade": {"small": small, "large": self.one()}})

    def store(self, run: str) -> RunStore:
        return RunStore(str(self.folder / run))

    def ask(
        self,
        run: str,
        texts: pa.Table,
        config: Config | None = None,
        member: int = 0,
        teacher: FakeTeacher | None = None,
        reserve: worker_module.Reserve | None = None,
    ) -> tuple[TicketAnswers, list[int]]:
        """One ticket of a run, as a stage asks it and puts its labels in place; and what was asked."""
        config, teacher, store = config or self.config(), teacher or FakeTeacher(), self.store(run)
        _, settings = list(config.teacher.members())[member]
        key = cache_key(config, settings)
        worker = TeacherWorker(config, store.root, member, reserve or not_reserved, teacher, key)
        folder = SMALL_DIR if worker.name == "small" else LABELS_DIR

        async def script():
            answers = await worker.label(0, texts)
            write_ticket(
                store, folder, 0, answers.labels, {worker.name: answers.usage}, answers.unasked, 1, "abc"
            )
            await worker.clear_mark(answers)
            return answers

        return asyncio.run(script()), [row for rows in teacher.calls for row in rows]


async def not_reserved(ticket: int, attempt: str, teacher: str, usage: Usage) -> bool:
    raise AssertionError("nobody is to be asked for leave")


@pytest.fixture
def bench(tmp_path, tiny_llm) -> Bench:
    return Bench(tmp_path, tiny_llm)


def numbers_of(labels: pa.Table) -> list[int]:
    """What :func:`numbered` answers were given to."""
    return np.round(100 * matrix_of(labels["probs"], 3)[:, 0]).astype(int).tolist()


class TestReuse:
    def test_a_second_run_asks_nothing(self, bench):
        first, _ = bench.ask("first", leased(0, [5, 2, 9]))
        # Its rows, ids and tickets are others; its texts are the same.
        texts = leased(7, [9, 5, 2], prefix="mine").set_column(1, "row", pa.array([40, 41, 42]))
        second, asked = bench.ask("second", texts)
        assert asked == []
        assert second.labels["row"].to_pylist() == [40, 41, 42]
        assert second.labels["id"].to_pylist() == ["mine-9", "mine-5", "mine-2"]
        assert second.labels["reused"].to_pylist() == [True] * 3
        assert numbers_of(second.labels) == [9, 5, 2]
        as_before = ["text_hash", "probs", "off_label", "prompt_tokens", "cached_tokens", "answer_tokens"]
        before = first.labels.take([2, 0, 1])
        assert second.labels.select(as_before).equals(before.select(as_before))
        assert second.usage == Usage(reused_texts=3, reused_tokens=cost_of([5, 2, 9]))
        assert (second.outcome_M, second.mark) == ([""] * 3, None)
        assert bench.store("second").names(SENT_DIR) == []

    @pytest.mark.parametrize("seed", range(3))
    def test_what_is_new_is_asked_and_the_order_kept(self, bench, seed):
        rng = np.random.default_rng(seed)
        rows = rng.permutation(20).tolist()
        there = [row for row in rows if rng.random() < 0.5]
        new = [row for row in rows if row not in there]
        bench.ask("first", leased(0, sorted(there)))
        marks, store = [], bench.store("second")
        teacher = FakeTeacher(
            failing={new[0]: "too_odd"}, before_call=lambda: marks.extend(marks_of(store).values())
        )
        answers, asked = bench.ask("second", leased(4, rows), teacher=teacher)
        assert asked == new
        assert marks == [{"texts": len(new), "usage": {}}]
        answered = [row for row in rows if row != new[0]]
        assert answers.labels["row"].to_pylist() == numbers_of(answers.labels) == answered
        assert answers.labels["reused"].to_pylist() == [row in there for row in answered]
        assert answers.outcome_M == ["too_odd" if row == new[0] else "" for row in rows]
        assert (answers.usage.texts, answers.usage.tokens) == (len(new), cost_of(new))
        assert (answers.usage.reused_texts, answers.usage.reused_tokens) == (len(there), cost_of(there))

    @pytest.mark.parametrize(
        ("changed", "words"),
        [({}, "other text"), ({"prompt": {"instruction": "Say which."}}, "text")],
    )
    def test_another_text_or_a_teacher_that_would_answer_otherwise_is_asked(self, bench, changed, words):
        bench.ask("first", leased(0, [5, 2]))
        config = bench.config(bench.one(**changed))
        assert bench.ask("second", leased(0, [5, 2], words=words), config)[1] == [5, 2]

    @pytest.mark.parametrize(("cache", "asked_again"), [(None, [5]), ("elsewhere/answers", [])])
    def test_without_a_cache_or_in_a_folder_of_the_users_choice(self, bench, cache, asked_again):
        folder = bench.folder / (cache or CACHE_DIR)
        config = bench.config(bench.one(cache=cache and str(folder)))
        asked = [bench.ask(run, leased(0, [5]), config)[1] for run in ("first", "second")]
        assert asked == [[5], asked_again]
        assert folder.exists() == bool(cache)
        assert not (bench.folder / CACHE_DIR).exists()

    def test_a_cascade_and_an_only_teacher_serve_each_other(self, bench):
        cascade = bench.cascade()
        bench.ask("cascade", leased(0, [1, 2, 3]), cascade, 0)
        bench.ask("cascade", leased(0, [3, 4]), cascade, 1)
        assert cascade.teacher.cascade is not None
        small = bench.config(cascade.teacher.cascade.small.model_dump())
        for run, config, new in (("large", bench.config(), [1, 2]), ("small", small, [4])):
            answers, asked = bench.ask(run, leased(0, [1, 2, 3, 4]), config)
            assert asked == new
            assert answers.labels["member"].to_pylist() == [0] * 4
        answers, asked = bench.ask("other", leased(0, [2, 7]), cascade, 1)
        assert asked == [7]
        assert answers.labels["member"].to_pylist() == [1, 1], "under the cascade's number"
        assert answers.labels["reused"].to_pylist() == [True, False]

    def test_answers_that_are_there_need_no_grant(self, bench):
        bench.ask("first", leased(0, [5, 2]))
        claims: list[Usage] = []

        async def refuse(ticket: int, attempt: str, teacher: str, usage: Usage) -> bool:
            claims.append(usage)
            return False

        config = bench.config(budget={"cap": {"tokens": 1}})
        answers, _ = bench.ask("second", leased(0, [5, 2, 7]), config, reserve=refuse)
        assert answers.labels["row"].to_pylist() == [5, 2]
        assert answers.outcome_M == ["", "", UNASKED]
        assert sum(claim.texts for claim in claims) == 1


def wait_until(is_so: Callable[[], Any]) -> None:
    """For what another thread is about to do; pytest's own limit ends it."""
    while not is_so():
        time.sleep(0.001)


class TestTeacher:
    @pytest.fixture
    def made(self, monkeypatch) -> list[tuple]:
        """What teachers were made of; each hears of its engine's start when it is made."""
        made = []

        def make(settings, labels, on_start, agree, prestart):
            made.append((settings, labels, prestart, FakeTeacher()))
            on_start(12.5)
            return made[-1][3]

        monkeypatch.setattr(worker_module, "make_teacher", make)
        return made

    def worker(self, bench: Bench, config: Config, member: int = 0, key: str | None = None) -> TeacherWorker:
        return TeacherWorker(config, bench.store("second").root, member, not_reserved, key=key)

    def test_it_is_made_once_and_before_it_is_needed(self, bench, made):
        cascade = bench.cascade()
        worker = self.worker(bench, cascade, 1)
        wait_until(lambda: made)

        async def script():
            return await asyncio.gather(*(worker.label(t, leased(t, [t])) for t in range(4)))

        rows = [answers.labels["row"].to_pylist() for answers in asyncio.run(script())]
        assert rows == [[0], [1], [2], [3]]
        ((settings, labels, prestart, teacher),) = made
        assert settings == cascade.teacher.cascade.large
        assert labels == cascade.labels
        assert prestart, "there are no answers of earlier runs, so it will be asked"
        assert not teacher.is_closed
        worker.close()
        assert teacher.is_closed
        (name,) = worker.store.names(ENGINES_DIR, ".json")
        facts = worker.store.read_json(f"{ENGINES_DIR}/{name}")
        assert (facts["teacher"], facts["model"], facts["seconds_to_start"]) == ("large", bench.model, 12.5)
        assert {"host", "pid"} <= facts.keys()

    def test_one_that_may_not_be_needed_does_not_begin_and_is_closed_all_the_same(self, bench, made):
        bench.ask("first", leased(0, [0]))
        config = bench.config()
        self.worker(bench, config, key=cache_key(config, config.teacher)).close()
        wait_until(lambda: made and made[0][3].is_closed)
        assert [prestart for _, _, prestart, _ in made] == [False]

    def test_actors_and_later_runs_agree_on_one_method(self, bench, monkeypatch):
        """Probabilities of one run must not be partly votes because one actor saw an odd reply."""
        agreements: list[Callable[[str | None], str | None]] = []

        def make(settings, labels, on_start, agree, prestart):
            agreements.append(agree)
            return FakeTeacher()

        monkeypatch.setattr(worker_module, "make_teacher", make)
        config = bench.config()
        key = cache_key(config, config.teacher)
        for n, run in enumerate(("first", "first", "other"), start=1):
            TeacherWorker(config, bench.store(run).root, 0, not_reserved, key=key)
            wait_until(lambda n=n: len(agreements) == n)
        one, two, other = agreements
        assert one(None) is None
        assert one("label_ids") == two("votes") == two(None) == "label_ids"
        assert other("votes") == "votes", "a run without labels of others finds its own"
        bench.ask("first", leased(0, [0]))
        TeacherWorker(config, bench.store("second").root, 0, not_reserved, key=key)
        wait_until(lambda: len(agreements) == 4)
        assert agreements[3](None) == "label_ids", "as the answers that it reuses"

    def test_what_keeps_it_from_being_made_is_told_to_all_who_ask(self, bench, monkeypatch):
        def make(*arguments, **more):
            raise OSError("the tokenizer is gone")

        monkeypatch.setattr(worker_module, "make_teacher", make)
        worker = self.worker(bench, bench.config())
        for ticket in range(2):
            with pytest.raises(OSError, match="the tokenizer is gone"):
                asyncio.run(worker.label(ticket, leased(ticket, [0])))
        worker.close()
