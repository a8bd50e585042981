"""Reading recorded answers, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toys import put_label_file, toy_probs, write_answers, write_corpus

from llkd_ray.config.base import ConfigError
from llkd_ray.config.teacher import RecordedConfig
from llkd_ray.storage.run_dir import LABELS_DIR, RunStore
from llkd_ray.teacher.base import UNASKED, Allowance, Answers, Unlimited, Usage
from llkd_ray.teacher.recorded import RecordedTeacher, read_recorded


def write(tmp_path, **columns) -> str:
    path = tmp_path / "recorded.parquet"
    pq.write_table(pa.table(columns), path)
    return str(path)


def refusal(n_classes=3, **fields) -> str:
    with pytest.raises(ConfigError) as caught:
        read_recorded(RecordedConfig(**fields), n_classes)
    return str(caught.value)


def test_columns_take_their_types(tmp_path):
    uri = write(tmp_path, key=[7, 8], p=[[0.5, 0.5], [1.0, 0.0]], n=[3, 4])
    table = read_recorded(RecordedConfig(uri=uri, id="key", probs="p", prompt_tokens="n"), 2)
    assert table.place == {"7": 0, "8": 1}
    assert table.probs_RC.tolist() == [[0.5, 0.5], [1.0, 0.0]]
    assert table.prompt_tokens_R.tolist() == [3, 4]


def test_tokens_are_0_where_they_were_not_recorded(tmp_path):
    uri = write(tmp_path, id=["a"], probs=[[0.5, 0.5]])
    assert read_recorded(RecordedConfig(uri=uri), 2).prompt_tokens_R.tolist() == [0]


def test_file_that_is_not_there(tmp_path):
    uri = str(tmp_path / "nowhere.parquet")
    message = refusal(uri=uri)
    assert message.startswith(f"teacher.recorded.uri: {uri!r} matches no file")


def test_file_that_is_no_parquet(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    assert "cannot be read" in refusal(uri=str(tmp_path / "bad.parquet"))


@pytest.mark.parametrize("field", ["id", "probs", "prompt_tokens"])
def test_column_that_is_not_there(tmp_path, field):
    uri = write(tmp_path, id=["a"], probs=[[0.5, 0.5]])
    message = refusal(2, uri=uri, **{field: "typo"})
    assert message == f"teacher.recorded.{field}: no column 'typo' in {uri!r}; there are id, probs"


def test_other_number_of_labels(tmp_path):
    uri = write(tmp_path, id=["a", "b"], probs=[[0.5, 0.5], [0.1, 0.9]])
    message = refusal(3, uri=uri)
    assert message.startswith("teacher.recorded.probs: 'probs' holds [2] numbers a row")
    assert "labels.names has 3 labels" in message


def test_other_number_of_labels_in_a_late_row(tmp_path):
    probs = [[0.5, 0.5]] * 3000 + [[0.2, 0.3, 0.5]]
    uri = write(tmp_path, id=[str(i) for i in range(3001)], probs=probs)
    assert "teacher.recorded.probs" in refusal(2, uri=uri)


def test_column_that_holds_no_lists(tmp_path):
    uri = write(tmp_path, id=["a"], probs=[0.5])
    assert "teacher.recorded.probs" in refusal(2, uri=uri)


def test_row_without_probabilities(tmp_path):
    uri = write(tmp_path, id=["a", "b"], probs=[[0.5, 0.5], None])
    assert "teacher.recorded.probs" in refusal(2, uri=uri)


def test_no_rows(tmp_path):
    empty = pa.table({"id": pa.array([], pa.string()), "probs": pa.array([], pa.list_(pa.float32()))})
    pq.write_table(empty, tmp_path / "empty.parquet")
    assert "teacher.recorded" in refusal(2, uri=str(tmp_path / "empty.parquet"))


def test_glob(tmp_path):
    for i in range(2):
        pq.write_table(pa.table({"id": [str(i)], "probs": [[0.5, 0.5]]}), tmp_path / f"part-{i}.parquet")
    (tmp_path / "notes.txt").write_text("not a parquet file")
    table = read_recorded(RecordedConfig(uri=str(tmp_path / "part-*.parquet")), 2)
    assert sorted(table.place) == ["0", "1"]


def test_folder_of_a_run_with_an_unfinished_file(tmp_path):
    pq.write_table(pa.table({"id": ["a"], "probs": [[0.5, 0.5]]}), tmp_path / "ticket-00000000.parquet")
    (tmp_path / "ticket-00000001.parquet.0123.tmp").write_bytes(b"PAR1 half")
    assert list(read_recorded(RecordedConfig(uri=str(tmp_path)), 2).place) == ["a"]


@pytest.mark.parametrize("probs", [[0.5, float("nan")], [1.5, -0.5]])
def test_numbers_that_are_no_probabilities(tmp_path, probs):
    assert "no probabilities" in refusal(2, uri=write(tmp_path, id=["a"], probs=[probs]))


def test_first_of_two_answers_counts(tmp_path):
    uri = write(tmp_path, id=["a", "a"], probs=[[0.9, 0.1], [0.1, 0.9]])
    recorded = read_recorded(RecordedConfig(uri=uri), 2)
    assert recorded.probs_RC[recorded.place["a"]].tolist() == pytest.approx([0.9, 0.1])


# --- the teacher


class Purse:
    """An allowance of so many tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    async def take(self, *, texts: int = 0, prompt_tokens: int = 0, answer_tokens: int = 0) -> bool:
        fits = prompt_tokens + answer_tokens <= self.tokens
        self.tokens -= (prompt_tokens + answer_tokens) * fits
        return fits


def ask(teacher: RecordedTeacher, ids: Sequence[str], allowance: Allowance | None = None) -> Answers:
    return asyncio.run(teacher.label(ids, ["whatever it says"] * len(ids), allowance or Unlimited()))


class TestLabeller:
    @pytest.fixture
    def answers(self, tmp_path) -> str:
        corpus = write_corpus(tmp_path / "pool.parquet", 30)
        return str(write_answers(tmp_path / "answers.parquet", [corpus]))

    def teacher(self, uri: str) -> RecordedTeacher:
        return RecordedTeacher(RecordedConfig(uri=uri, prompt_tokens="prompt_tokens"), 3)

    def test_answers_by_id(self, answers):
        recorded = pq.read_table(answers).take([17, 3, 29])
        said = ask(self.teacher(answers), recorded["id"].to_pylist())
        expected = np.array(recorded["probs"].to_pylist())
        tokens = recorded["prompt_tokens"].to_pylist()
        assert said.probs_NC == pytest.approx(expected)
        assert said.off_label_N == pytest.approx(1 - expected.sum(axis=1), abs=1e-6)
        assert said.prompt_tokens_N.tolist() == tokens
        assert said.answered_N.all()
        assert said.usage == Usage(texts=3, requests=3, prompt_tokens=sum(tokens))

    def test_an_id_that_is_not_there_has_no_answer_and_costs_nothing(self, answers):
        known = pq.read_table(answers)["id"][4].as_py()
        said = ask(self.teacher(answers), ["nobody knows me", known])
        assert list(said.outcome_N) == ["no_recorded_answer", ""]
        assert said.usage.texts == 1
        assert said.prompt_tokens_N[0] == 0

    def test_mass_above_one_leaves_nothing_off_label(self, tmp_path):
        uri = write(tmp_path, id=["a"], probs=[[0.6, 0.5]])
        said = ask(RecordedTeacher(RecordedConfig(uri=uri), 2), ["a"])
        assert said.off_label_N.tolist() == [0.0]

    def test_the_cap_counts_the_tokens_that_the_answers_once_cost(self, answers):
        recorded = pq.read_table(answers)
        tokens = recorded["prompt_tokens"].to_numpy()
        said = ask(self.teacher(answers), recorded["id"].to_pylist(), Purse(int(tokens[:10].sum())))
        assert said.usage.tokens <= tokens[:10].sum()
        assert set(said.outcome_N) == {"", UNASKED}
        assert said.usage.tokens == tokens[said.answered_N].sum()

    def test_labels_of_an_earlier_run_serve_a_later_one(self, tmp_path):
        store, rng = RunStore(str(tmp_path)), np.random.default_rng(5)
        probs_NC = toy_probs(rng.integers(0, 3, 30), 3, 0.9, rng)
        for ticket in (0, 1):
            rows = np.arange(15 * ticket, 15 * ticket + 15)
            put_label_file(store, ticket, rows, probs_NC[rows], tokens=25)
        said = ask(self.teacher(store.path(LABELS_DIR)), [f"toy-{row}" for row in range(30)])
        assert said.answered_N.all()
        assert np.array_equal(said.probs_NC, probs_NC.astype(float))
        assert said.prompt_tokens_N.tolist() == [25] * 30
