"""What stands around a teacher: answers of earlier runs, the cap, the mark of what is under way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fake_teacher import FakeTeacher, cost_of, leased, numbered
from toys import make_config

from llkd_ray.config.schema import Config
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import ENGINES_DIR, LABELS_DIR, SENT_DIR, SMALL_DIR, RunStore
from llkd_ray.storage.tables import matrix_of
from llkd_ray.teacher import worker as worker_module
from llkd_ray.teacher.base import UNASKED, TeacherDown, Usage
from llkd_ray.teacher.factory import CACHE_DIR, cache_key
from llkd_ray.teacher.labels import mark_file, write_ticket
from llkd_ray.teacher.worker import TeacherWorker, TicketAnswers


class Selector:
    """Grants up to ``tokens``, and notes who asked for what."""

    def __init__(self, tokens: int = 10**9) -> None:
        self.left = tokens
        self.calls: list[tuple[int, str, str, Usage]] = []

    async def reserve(self, ticket: int, attempt: str, teacher: str, usage: Usage) -> bool:
        self.calls.append((ticket, attempt, teacher, usage))
        if usage.tokens > self.left:
            return False
        self.left -= usage.tokens
        return True


class Bench:
    """A folder of runs with one cache, and workers in them."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model = folder, model

    def one(self, **settings: Any) -> dict[str, Any]:
        """A vllm teacher: its checkpoint is what the cache's key needs."""
        return {"kind": "vllm", "model": self.model, "max_model_len": 256} | settings

    def config(self, teacher: dict[str, Any] | None = None, **sections: Any) -> Config:
        return make_config(teacher=teacher or self.one(), run={"dir": str(self.folder)}, **sections)

    def cascade(self, **of_large: Any) -> Config:
        small = self.one(prompt={"instruction": "Be quick."})
        return self.config({"kind": "cascade", "cascade": {"small": small, "large": self.one(**of_large)}})

    def store(self, run: str) -> RunStore:
        return RunStore(str(self.folder / run))

    def worker(
        self,
        run: str,
        teacher: FakeTeacher,
        config: Config | None = None,
        member: int = 0,
        selector: Selector | None = None,
    ) -> TeacherWorker:
        reserve, config = (selector or Selector()).reserve, config or self.config()
        _, settings = list(config.teacher.members())[member]
        return TeacherWorker(
            config, self.store(run).root, member, reserve, teacher, cache_key(config, settings)
        )

    def answer(
        self, worker: TeacherWorker, ticket: int, texts: pa.Table, folder: str = LABELS_DIR
    ) -> TicketAnswers:
        """Ask and put the labels in place, as a stage does."""

        async def script():
            answers = await worker.label(ticket, texts)
            usage = {worker.name: answers.usage}
            write_ticket(worker.store, folder, ticket, answers.labels, usage, answers.unasked, 1)
            await worker.clear_mark(answers)
            return answers

        return asyncio.run(script())


@pytest.fixture
def bench(tmp_path, tiny_llm):
    return Bench(tmp_path, tiny_llm)


def wait_until(is_so: Callable[[], Any]) -> None:
    """For what another thread is about to do; pytest's own limit ends it."""
    while not is_so():
        time.sleep(0.001)


def numbers_of(labels: pa.Table) -> list[int]:
    """What :func:`numbered` answers were given to."""
    return np.round(100 * matrix_of(labels["probs"], 3)[:, 0]).astype(int).tolist()


class TestFresh:
    def test_labels_are_the_texts_own_and_in_their_order(self, bench):
        teacher = FakeTeacher()
        texts = leased(3, [5, 2, 9])
        answers = bench.answer(bench.worker("first", teacher), 3, texts)
        assert answers.labels.schema == tables.LABELS
        assert answers.labels["row"].to_pylist() == [5, 2, 9]
        assert answers.labels["id"].to_pylist() == ["id-5", "id-2", "id-9"]
        assert answers.labels["text_hash"].equals(texts["text_hash"]), "as they were kept at ingestion"
        assert matrix_of(answers.labels["probs"], 3) == pytest.approx(np.stack([*map(numbered, (5, 2, 9))]))
        assert answers.labels["off_label"].to_pylist() == pytest.approx([0.65, 0.68, 0.61])
        assert answers.labels["prompt_tokens"].to_pylist() == [15, 12, 19]
        assert answers.labels["answer_tokens"].to_pylist() == [1, 1, 1]
        assert answers.labels["reused"].to_pylist() == [False] * 3
        assert answers.outcome_M == [""] * 3
        assert (answers.usage.texts, answers.usage.tokens) == (3, cost_of([5, 2, 9]))
        assert answers.usage.seconds > 0

    def test_a_text_without_an_answer_says_why_and_costs(self, bench):
        teacher = FakeTeacher(failing={2: "too_odd"})
        answers = bench.answer(bench.worker("first", teacher), 3, leased(3, [5, 2, 9]))
        assert answers.labels["row"].to_pylist() == [5, 9]
        assert answers.outcome_M == ["", "too_odd", ""]
        assert answers.unasked == 0
        assert answers.usage.tokens == cost_of([5, 2, 9])

    def test_no_texts(self, bench):
        teacher = FakeTeacher()
        answers = bench.answer(bench.worker("first", teacher), 3, leased(3, []))
        assert answers.labels.schema == tables.LABELS
        assert (len(answers.labels), answers.usage, answers.outcome_M, answers.mark) == (0, Usage(), [], None)
        assert teacher.calls == []


class TestReuse:
    def test_a_second_run_asks_nothing(self, bench):
        first = bench.answer(bench.worker("first", FakeTeacher()), 0, leased(0, [5, 2, 9]))
        teacher = FakeTeacher(errors=[AssertionError("nobody is to be asked")])
        # Its rows, ids and tickets are others; its texts are the same.
        texts = leased(7, [9, 5, 2], prefix="mine").set_column(1, "row", pa.array([40, 41, 42]))
        second = bench.answer(bench.worker("second", teacher), 7, texts)
        assert teacher.calls == []
        assert second.labels["row"].to_pylist() == [40, 41, 42]
        assert second.labels["id"].to_pylist() == ["mine-9", "mine-5", "mine-2"]
        assert second.labels["reused"].to_pylist() == [True] * 3
        assert numbers_of(second.labels) == [9, 5, 2]
        as_before = ["text_hash", "probs", "off_label", "prompt_tokens", "cached_tokens", "answer_tokens"]
        before = first.labels.take([2, 0, 1])
        assert second.labels.select(as_before).equals(before.select(as_before))
        assert second.usage == Usage(reused_texts=3, reused_tokens=cost_of([5, 2, 9]))
        assert second.outcome_M == [""] * 3
        assert second.mark is None
        assert bench.store("second").names(SENT_DIR) == []

    @pytest.mark.parametrize("seed", range(3))
    def test_what_is_new_is_asked_and_the_order_kept(self, bench, seed):
        rng = np.random.default_rng(seed)
        rows = rng.permutation(20).tolist()
        there = [row for row in rows if rng.random() < 0.5]
        new = [row for row in rows if row not in there]
        bench.answer(bench.worker("first", FakeTeacher()), 0, leased(0, sorted(there)))
        marks = []
        store = bench.store("second")
        teacher = FakeTeacher(
            failing={new[0]: "too_odd"},
            before_call=lambda: marks.extend(
                store.read_json(f"{SENT_DIR}/{name}") for name in store.names(SENT_DIR)
            ),
        )
        answers = bench.answer(bench.worker("second", teacher), 4, leased(4, rows))
        assert teacher.calls == [new]
        assert marks == [{"texts": len(new), "usage": {}}]
        answered = [row for row in rows if row != new[0]]
        assert answers.labels["row"].to_pylist() == numbers_of(answers.labels) == answered
        assert answers.labels["reused"].to_pylist() == [row in there for row in answered]
        assert answers.outcome_M == ["too_odd" if row == new[0] else "" for row in rows]
        assert (answers.usage.texts, answers.usage.tokens) == (len(new), cost_of(new))
        assert (answers.usage.reused_texts, answers.usage.reused_tokens) == (len(there), cost_of(there))

    def test_a_text_that_has_changed_is_asked_whatever_its_id(self, bench):
        bench.answer(bench.worker("first", FakeTeacher()), 0, leased(0, [5, 2]))
        teacher = FakeTeacher()
        answers = bench.answer(bench.worker("second", teacher), 0, leased(0, [5, 2], words="other text"))
        assert teacher.calls == [[5, 2]]
        assert answers.usage.reused_texts == 0

    @pytest.mark.parametrize(
        "changed",
        [
            {"prompt": {"instruction": "Say which."}},
            {"dtype": "float32"},
            {"confidence": {"method": "votes"}},
        ],
    )
    def test_a_teacher_that_would_answer_otherwise_is_asked(self, bench, changed):
        bench.answer(bench.worker("first", FakeTeacher()), 0, leased(0, [5, 2]))
        teacher = FakeTeacher()
        other = bench.config(bench.one(**changed))
        bench.answer(bench.worker("second", teacher, other), 0, leased(0, [5, 2]))
        assert teacher.calls == [[5, 2]]

    def test_a_teacher_is_the_same_however_it_is_spread_out_and_paid(self, bench):
        bench.answer(bench.worker("first", FakeTeacher()), 0, leased(0, [5, 2]))
        teacher = FakeTeacher()
        same = bench.one(
            actors=3, gpus=1, ticket_size=4, price={"input": 1.0}, confidence={"method": "batch"}
        )
        sections = {"run": {"dir": str(bench.folder), "seed": 5}, "selection": {"policy": "random"}}
        config = make_config(teacher=same, **sections)
        answers = bench.answer(bench.worker("second", teacher, config), 0, leased(0, [5, 2]))
        assert teacher.calls == []
        assert answers.usage.reused_texts == 2

    def test_without_a_cache_nothing_is_found_and_nothing_told(self, bench):
        config = bench.config(bench.one(cache=None))
        for run in ("first", "second"):
            teacher = FakeTeacher()
            bench.answer(bench.worker(run, teacher, config), 0, leased(0, [5, 2]))
            assert teacher.calls == [[5, 2]]
        assert not (bench.folder / CACHE_DIR).exists()

    def test_a_folder_of_the_users_choice(self, bench):
        folder = bench.folder / "elsewhere" / "answers"
        config = bench.config(bench.one(cache=str(folder)))
        bench.answer(bench.worker("first", FakeTeacher(), config), 0, leased(0, [5]))
        teacher = FakeTeacher()
        bench.answer(bench.worker("second", teacher, config), 0, leased(0, [5]))
        assert teacher.calls == []
        assert folder.exists()
        assert not (bench.folder / CACHE_DIR).exists()

    def test_what_a_cascade_was_told_serves_a_run_of_either_teacher(self, bench):
        cascade = bench.cascade()
        bench.answer(bench.worker("cascade", FakeTeacher(), cascade, 0), 0, leased(0, [1, 2, 3]), SMALL_DIR)
        bench.answer(bench.worker("cascade", FakeTeacher(), cascade, 1), 0, leased(0, [3, 4]))
        for config, there in ((bench.config(), [3, 4]), (bench.config(cascade_small(cascade)), [1, 2, 3])):
            teacher = FakeTeacher()
            answers = bench.answer(
                bench.worker(f"alone-{len(there)}", teacher, config), 0, leased(0, [1, 2, 3, 4])
            )
            assert teacher.calls == [[row for row in (1, 2, 3, 4) if row not in there]]
            assert answers.labels["member"].to_pylist() == [0] * 4

    def test_an_only_teacher_serves_a_cascade_under_the_cascades_number(self, bench):
        bench.answer(bench.worker("alone", FakeTeacher()), 0, leased(0, [1, 2]))
        teacher = FakeTeacher()
        answers = bench.answer(bench.worker("cascade", teacher, bench.cascade(), 1), 0, leased(0, [2, 3]))
        assert teacher.calls == [[3]]
        assert answers.labels["member"].to_pylist() == [1, 1]
        assert answers.labels["reused"].to_pylist() == [True, False]


def cascade_small(cascade: Config) -> dict[str, Any]:
    assert cascade.teacher.cascade is not None
    return cascade.teacher.cascade.small.model_dump()


class TestCap:
    def cap(self, bench: Bench, tokens: int) -> Config:
        return bench.config(budget={"cap": {"tokens": tokens}})

    def test_what_may_be_used_is_in_the_mark_before_it_is(self, bench):
        store, used, written = bench.store("first"), [0], []

        def after_request(meter):
            used[0] += meter.prompt_tokens + meter.answer_tokens
            (name,) = store.names(SENT_DIR)
            mark = store.read_json(f"{SENT_DIR}/{name}")
            written.append((name, mark["usage"]["teacher"]))
            assert Usage(**mark["usage"]["teacher"]).tokens >= used[0]
            assert mark["usage"]["teacher"]["texts"] >= len(written)
            assert mark["texts"] == 6

        teacher, selector = FakeTeacher(after_request=after_request), Selector()
        worker = bench.worker("first", teacher, self.cap(bench, 10**6), selector=selector)
        bench.answer(worker, 3, leased(3, range(6)))
        assert len(written) == 6
        attempts = {(ticket, attempt, teacher) for ticket, attempt, teacher, _ in selector.calls}
        assert attempts == {(3, written[0][0], "teacher")}
        granted = sum((usage for *_, usage in selector.calls), Usage())
        assert granted == Usage(**written[-1][1])

    def test_nothing_is_used_that_is_not_granted(self, bench):
        tokens = cost_of([0, 1, 2]) + 5
        teacher, selector = FakeTeacher(), Selector(tokens)
        worker = bench.worker("first", teacher, self.cap(bench, tokens), selector=selector)
        answers = bench.answer(worker, 3, leased(3, range(6)))
        assert answers.usage.tokens <= tokens - selector.left
        assert answers.unasked == 6 - len(answers.labels) > 0
        assert [outcome for outcome in answers.outcome_M if outcome] == [UNASKED] * answers.unasked
        assert answers.usage.texts == len(answers.labels)

    def test_answers_that_are_there_need_no_grant(self, bench):
        bench.answer(bench.worker("first", FakeTeacher()), 0, leased(0, [5, 2]))
        selector = Selector(tokens=0)
        worker = bench.worker("second", FakeTeacher(), self.cap(bench, 1), selector=selector)
        answers = bench.answer(worker, 0, leased(0, [5, 2, 7]))
        assert answers.labels["row"].to_pylist() == [5, 2]
        assert answers.outcome_M == ["", "", UNASKED]
        assert sum(usage.texts for *_, usage in selector.calls) == 1

    def test_without_a_cap_nobody_is_asked_for_leave(self, bench):
        selector = Selector(tokens=0)
        answers = bench.answer(bench.worker("first", FakeTeacher(), selector=selector), 0, leased(0, [5, 2]))
        assert selector.calls == []
        assert answers.unasked == 0

    def test_each_attempt_has_a_name_of_its_own(self, bench):
        selector = Selector()
        teacher = FakeTeacher(errors=[TeacherDown("gone")])
        worker = bench.worker("first", teacher, self.cap(bench, 10**6), selector=selector)
        with pytest.raises(TeacherDown):
            asyncio.run(worker.label(3, leased(3, [1])))
        first = bench.store("first").names(SENT_DIR)
        bench.answer(worker, 3, leased(3, [1]))
        assert [attempt for _, attempt, _, _ in selector.calls if attempt in first] == []
        assert bench.store("first").names(SENT_DIR) == first, "what was lost stays on the books"


class TestMark:
    def test_it_goes_when_the_labels_are_in_place(self, bench):
        worker = bench.worker("first", FakeTeacher())
        answers = asyncio.run(worker.label(12, leased(12, [1, 2])))
        assert answers.mark is not None
        assert answers.mark.startswith("ticket-00000012.")
        assert worker.store.exists(mark_file(answers.mark))
        asyncio.run(worker.clear_mark(answers))
        assert worker.store.names(SENT_DIR) == []
        asyncio.run(worker.clear_mark(answers))

    @pytest.mark.parametrize("error", [TeacherDown("all gone"), RuntimeError("a mistake of ours")])
    def test_it_stays_where_the_teacher_breaks(self, bench, error):
        worker = bench.worker("first", FakeTeacher(errors=[error]))
        with pytest.raises(type(error), match=str(error)):
            asyncio.run(worker.label(3, leased(3, [1, 2, 4])))
        (name,) = worker.store.names(SENT_DIR)
        assert worker.store.read_json(f"{SENT_DIR}/{name}") == {"texts": 3, "usage": {}}


class TestTeacher:
    @pytest.fixture
    def made(self, monkeypatch):
        """What teachers were made of; each hears of its engine's start when it is made."""
        made = []

        def make(settings, labels, on_start, prestart):
            made.append((settings, labels, prestart, FakeTeacher()))
            on_start(12.5)
            return made[-1][3]

        monkeypatch.setattr(worker_module, "make_teacher", make)
        return made

    def test_it_is_made_once_and_before_it_is_needed(self, bench, made):
        cascade = bench.cascade()
        worker = TeacherWorker(cascade, bench.store("first").root, 1, Selector().reserve)
        wait_until(lambda: made)

        async def script():
            return await asyncio.gather(*(worker.label(t, leased(t, [t])) for t in range(4)))

        rows = [answers.labels["row"].to_pylist() for answers in asyncio.run(script())]
        assert rows == [[0], [1], [2], [3]]
        ((settings, labels, prestart, teacher),) = made
        assert settings == cascade.teacher.cascade.large
        assert labels == cascade.labels
        assert prestart, "there are no answers of earlier runs, so it will be asked"
        assert (worker.name, teacher.is_closed) == ("large", False)
        worker.close()
        assert teacher.is_closed

    def test_one_that_may_not_be_needed_does_not_begin(self, bench, made):
        bench.answer(bench.worker("first", FakeTeacher()), 0, leased(0, [0]))
        config = bench.config()
        key = cache_key(config, config.teacher)
        worker = TeacherWorker(config, bench.store("second").root, 0, Selector().reserve, key=key)
        asyncio.run(worker.label(0, leased(0, [0])))
        assert [prestart for _, _, prestart, _ in made] == [False]

    def test_one_that_was_never_needed_is_closed_all_the_same(self, bench, made):
        TeacherWorker(bench.config(), bench.store("first").root, 0, Selector().reserve).close()
        wait_until(lambda: made and made[0][3].is_closed)

    def test_what_keeps_it_from_being_made_is_told_to_all_who_ask(self, bench, monkeypatch):
        def make(*arguments, **more):
            raise OSError("the tokenizer is gone")

        monkeypatch.setattr(worker_module, "make_teacher", make)
        worker = TeacherWorker(bench.config(), bench.store("first").root, 0, Selector().reserve)
        for ticket in range(2):
            with pytest.raises(OSError, match="the tokenizer is gone"):
                asyncio.run(worker.label(ticket, leased(ticket, [0])))
        worker.close()

    def test_each_engine_that_starts_leaves_a_file(self, bench, made):
        store = bench.store("first")
        worker = TeacherWorker(bench.cascade(), store.root, 0, Selector().reserve)
        asyncio.run(worker.label(0, leased(0, [1])))
        (name,) = store.names(ENGINES_DIR, ".json")
        facts = store.read_json(f"{ENGINES_DIR}/{name}")
        assert facts["seconds_to_start"] == 12.5
        assert (facts["teacher"], facts["model"]) == ("small", bench.model)
        assert {"host", "pid"} <= facts.keys()
