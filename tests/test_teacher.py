"""What all teachers share, and recorded answers; without Ray's actors and without an engine."""

from __future__ import annotations

import asyncio

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toys import make_config, write_answers, write_corpus
from transformers import AutoConfig

from llkd_ray import schemas
from llkd_ray.config import ConfigError
from llkd_ray.store import LABELS_DIR, QUARANTINE_DIR, SENT_DIR, RunStore, ticket_file
from llkd_ray.teacher import Answers, RecordedTeacher, Teacher, check_teacher, load_tokenizer


class FakeSelector:
    """Notes what it is told; ``fails`` times it breaks before that."""

    def __init__(self, fails: int = 0):
        self.told: list[tuple] = []
        self.fails = fails
        self.put_labels = self

    async def remote(self, *arguments):
        if self.fails:
            self.fails -= 1
            raise ConnectionError("the selector is away")
        self.told.append(arguments)
        return len(arguments[1])


def leased(ticket: int, rows: list[int]) -> pa.Table:
    """What the leaser hands on."""
    columns = [[ticket] * len(rows), rows, [f"id-{row}" for row in rows], [f"text {row}" for row in rows]]
    names = ("ticket", "row", "id", "text")
    types = (pa.int32(), pa.int64(), pa.string(), pa.string())
    return pa.table(columns, schema=pa.schema(list(zip(names, types, strict=True))))


def ask(teacher: Teacher, table: pa.Table) -> list[dict]:
    """The receipts of one call."""

    async def script():
        return [receipt async for receipt in teacher(table)]

    return pa.concat_tables(asyncio.run(script())).to_pylist()


class CountingTeacher(Teacher):
    """Answers with the text's own number, to the ids it knows; breaks ``breaks`` times first."""

    def __init__(
        self, store: RunStore, selector: FakeSelector, unknown: tuple[str, ...] = (), breaks: int = 0
    ):
        super().__init__(make_config(), store.root, selector)
        self.unknown, self.breaks = unknown, breaks
        self.asked: list[list[str]] = []
        self.marks_while_asked: list[list[str]] = []

    async def answer(self, ids, texts):
        self.asked.append(list(texts))
        self.marks_while_asked.append(self.store.names(SENT_DIR))
        assert not self.store.names(LABELS_DIR)
        if self.breaks:
            self.breaks -= 1
            raise RuntimeError("engine trouble")
        number_N = np.array([int(one.removeprefix("id-")) for one in ids])
        return Answers(
            probs_NC=np.stack([number_N / 100, 0.1 + 0 * number_N, 0.2 + 0 * number_N], axis=1),
            off_label_N=0.7 - number_N / 100,
            prompt_tokens_N=number_N,
            answered_N=np.array([one not in self.unknown for one in ids]),
            reason="did_not_say",
        )


@pytest.fixture
def store(tmp_path):
    return RunStore(str(tmp_path / "run"))


def label_file(store: RunStore, ticket: int) -> pa.Table:
    return store.read_table(ticket_file(LABELS_DIR, ticket))


class TestTeacher:
    def test_file_first_then_the_selector(self, store):
        selector = FakeSelector()
        teacher = CountingTeacher(store, selector)
        receipts = ask(teacher, leased(3, [5, 2, 9]))
        assert receipts == [{"ticket": 3, "rows": 3}]
        labels = label_file(store, 3)
        assert labels.schema == schemas.LABELS
        assert labels["row"].to_pylist() == [5, 2, 9]
        assert labels["id"].to_pylist() == ["id-5", "id-2", "id-9"]
        assert np.array(labels["probs"].to_pylist())[:, 0] == pytest.approx([0.05, 0.02, 0.09])
        assert labels["off_label"].to_numpy() == pytest.approx([0.65, 0.68, 0.61])
        assert labels["prompt_tokens"].to_pylist() == [5, 2, 9]
        ((ticket, row_M, probs_MC, tokens),) = selector.told
        assert (ticket, row_M.tolist(), tokens) == (3, [5, 2, 9], 16)
        assert probs_MC.tolist() == labels["probs"].to_pylist()

    def test_label_file_that_is_there_is_not_answered_again(self, store):
        """The first attempt dies between its file and its word to the selector."""
        selector = FakeSelector(fails=1)
        teacher = CountingTeacher(store, selector)
        with pytest.raises(ConnectionError):
            ask(teacher, leased(3, [5, 2]))
        assert len(teacher.asked) == 1
        assert label_file(store, 3)["row"].to_pylist() == [5, 2]
        again = CountingTeacher(store, selector)
        assert ask(again, leased(3, [5, 2])) == [{"ticket": 3, "rows": 2}]
        assert again.asked == []
        ((ticket, row_M, probs_MC, tokens),) = selector.told
        assert (ticket, row_M.tolist(), tokens) == (3, [5, 2], 7)
        assert probs_MC.shape == (2, 3)

    def test_mark_is_there_while_the_teacher_reads_and_gone_after(self, store):
        teacher = CountingTeacher(store, FakeSelector())
        ask(teacher, leased(7, [1, 2]))
        ((mark,),) = teacher.marks_while_asked
        assert mark.startswith("ticket-00000007.")
        assert store.names(SENT_DIR) == []

    def test_mark_of_texts_that_were_never_answered_stays(self, store):
        selector = FakeSelector()
        teacher = CountingTeacher(store, selector, breaks=1)
        with pytest.raises(RuntimeError, match="engine trouble"):
            ask(teacher, leased(7, [1, 2, 4]))
        (mark,) = store.names(SENT_DIR)
        assert store.read_bytes(f"{SENT_DIR}/{mark}") == b"3"
        assert not store.exists(ticket_file(LABELS_DIR, 7))
        assert selector.told == []
        # The retry has a mark of its own, and the first one still counts the lost texts.
        ask(teacher, leased(7, [1, 2, 4]))
        assert len(teacher.marks_while_asked[1]) == 2
        assert store.names(SENT_DIR) == [mark]
        assert len(selector.told) == 1

    def test_texts_without_an_answer_go_to_quarantine(self, store):
        selector = FakeSelector()
        teacher = CountingTeacher(store, selector, unknown=("id-2", "id-9"))
        assert ask(teacher, leased(3, [5, 2, 9])) == [{"ticket": 3, "rows": 1}]
        assert label_file(store, 3)["row"].to_pylist() == [5]
        refused = store.read_table(f"{QUARANTINE_DIR}/teacher-00000003.parquet")
        assert refused.schema == schemas.QUARANTINE
        assert refused.to_pylist() == [
            {
                "source": "teacher",
                "position": row,
                "reason": "did_not_say",
                "detail": "ticket 3",
                "start_of_text": f"text {row}",
            }
            for row in (2, 9)
        ]
        assert selector.told[0][1].tolist() == [5]
        assert selector.told[0][3] == 5, "tokens of the answered ones only"

    def test_ticket_without_any_answer_is_done_all_the_same(self, store):
        selector = FakeSelector()
        teacher = CountingTeacher(store, selector, unknown=("id-2",))
        assert ask(teacher, leased(3, [2])) == [{"ticket": 3, "rows": 0}]
        assert len(label_file(store, 3)) == 0
        ((ticket, row_M, probs_MC, tokens),) = selector.told
        assert (ticket, row_M.tolist(), probs_MC.shape, tokens) == (3, [], (0, 3), 0)

    def test_empty_lease_is_nobodys_business(self, store):
        selector = FakeSelector()
        teacher = CountingTeacher(store, selector)
        assert ask(teacher, leased(3, [])) == []
        assert (teacher.asked, selector.told) == ([], [])
        assert store.names(LABELS_DIR) == store.names(SENT_DIR) == []

    def test_block_of_two_tickets_is_our_own_mistake(self, store):
        both = pa.concat_tables([leased(1, [1]), leased(2, [2])])
        with pytest.raises(AssertionError, match="a block holds one ticket"):
            ask(CountingTeacher(store, FakeSelector()), both)


class TestRecordedTeacher:
    @pytest.fixture
    def answers(self, tmp_path):
        return write_answers(tmp_path / "answers.parquet", [write_corpus(tmp_path / "pool.parquet", 30)])

    def teacher(self, store, answers, selector=None):
        config = make_config(teacher={"recorded": {"uri": str(answers)}})
        return RecordedTeacher(config, store.root, selector or FakeSelector())

    def test_answers_by_id(self, store, answers):
        recorded = pq.read_table(answers)
        teacher = self.teacher(store, answers)
        places = [17, 3, 29]
        ids = [recorded["id"][place].as_py() for place in places]
        said = asyncio.run(teacher.answer(ids, ["x"] * 3))
        expected = np.array([recorded["probs"][place].as_py() for place in places])
        assert said.probs_NC == pytest.approx(expected)
        assert said.off_label_N == pytest.approx(1 - expected.sum(axis=1), abs=1e-6)
        assert said.prompt_tokens_N.tolist() == [recorded["prompt_tokens"][place].as_py() for place in places]
        assert said.answered_N.all()

    def test_unknown_ids_go_to_quarantine(self, store, answers):
        selector = FakeSelector()
        known = pq.read_table(answers)["id"][4].as_py()
        table = leased(0, [0, 1]).set_column(2, "id", pa.array(["nobody knows me", known]))
        assert ask(self.teacher(store, answers, selector), table) == [{"ticket": 0, "rows": 1}]
        assert label_file(store, 0)["id"].to_pylist() == [known]
        refused = store.read_table(f"{QUARANTINE_DIR}/teacher-00000000.parquet").to_pylist()
        assert [(one["position"], one["reason"]) for one in refused] == [(0, "no_recorded_answer")]

    def test_labels_of_an_earlier_run_serve_a_later_one(self, store, answers, tmp_path):
        ids = pq.read_table(answers)["id"].to_pylist()
        for ticket in (0, 1):
            rows = list(range(15 * ticket, 15 * ticket + 15))
            table = leased(ticket, rows).set_column(2, "id", pa.array([ids[row] for row in rows]))
            ask(self.teacher(store, answers), table)
        later = self.teacher(RunStore(str(tmp_path / "later")), store.path(LABELS_DIR))
        first = self.teacher(store, answers)
        said, before = (asyncio.run(teacher.answer(ids, ids)) for teacher in (later, first))
        assert said.answered_N.all()
        assert np.array_equal(said.probs_NC, before.probs_NC)


class TestCheck:
    def test_recorded(self, tmp_path):
        answers = write_answers(tmp_path / "answers.parquet", [write_corpus(tmp_path / "pool.parquet", 12)])
        facts = check_teacher(make_config(teacher={"recorded": {"uri": str(answers)}}))
        assert facts == {"kind": "recorded", "uri": str(answers), "answers": 12}

    def test_vllm(self, tiny_llm):
        def facts(**prompt):
            vllm = {"kind": "vllm", "model": tiny_llm, "max_model_len": 256, "prompt": prompt}
            return check_teacher(make_config(teacher=vllm))

        assert facts()["model"] == tiny_llm
        assert facts()["prompt_hash"] == facts()["prompt_hash"] != facts(instruction="Say.")["prompt_hash"]

    def test_prompt_that_does_not_fit(self, tiny_llm):
        vllm = {"kind": "vllm", "model": tiny_llm, "max_model_len": 16}
        with pytest.raises(ConfigError, match=r"teacher\.max_model_len leaves no room for a text"):
            check_teacher(make_config(teacher=vllm))

    def test_labels_that_collide(self, tiny_llm):
        vllm = {"kind": "vllm", "model": tiny_llm, "prompt": {"answer": "names"}}
        with pytest.raises(ConfigError, match="begin with the same token"):
            check_teacher(make_config(teacher=vllm, labels={"names": ["sea calm", "sea rough"]}))

    def test_model_that_is_not_there(self, tmp_path):
        vllm = {"kind": "vllm", "model": str(tmp_path / "nowhere")}
        with pytest.raises(ConfigError, match=r"teacher\.model: no tokenizer can be loaded from .*nowhere"):
            load_tokenizer(make_config(teacher=vllm))

    @pytest.mark.parametrize(
        "kind",
        [
            "llama",
            "qwen2",
        ],
    )
    def test_model_without_tokenizer_files(self, tmp_path, kind):
        # For some types, transformers makes an empty tokenizer, without a word.
        AutoConfig.for_model(kind).save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=r"teacher\.model: "):
            check_teacher(make_config(teacher={"kind": "vllm", "model": str(tmp_path)}))
