"""Reading recorded answers, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toys import NAMES, put_label_file, toy_probs, write_answers, write_corpus

from llkd_ray.config.base import ConfigError
from llkd_ray.config.teacher import RecordedConfig
from llkd_ray.storage.run_dir import LABELS_DIR, RunStore
from llkd_ray.teacher.base import UNASKED, Allowance, Answers, Unlimited, Usage
from llkd_ray.teacher.recorded import RecordedTeacher, read_recorded


def write(path: Path, **columns) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "recorded.parquet"


def test_columns_take_their_types_and_the_first_of_two_answers_counts(file):
    uri = write(file, key=[7, 8, 7], p=[[0.5, 0.5], [1.0, 0.0], [0.1, 0.9]], n=[3, 4, 5])
    recorded = read_recorded(RecordedConfig(uri=uri, id="key", probs="p", prompt_tokens="n"), "ab")
    assert recorded.place == {"7": 0, "8": 1}
    assert recorded.probs_RC[:2].tolist() == [[0.5, 0.5], [1.0, 0.0]]
    assert recorded.prompt_tokens_R.tolist() == [3, 4, 5]
    untold = read_recorded(RecordedConfig(uri=uri, id="key", probs="p"), "ab")
    assert untold.prompt_tokens_R.tolist() == [0, 0, 0]


def test_several_files_and_a_folder_of_a_run_with_an_unfinished_one(tmp_path):
    for i in range(2):
        write(tmp_path / f"ticket-0000000{i}.parquet", id=[str(i)], probs=[[0.5, 0.5]])
    (tmp_path / "notes.txt").write_text("not a parquet file")
    (tmp_path / "ticket-00000002.parquet.0123.tmp").write_bytes(b"PAR1 half")
    for uri in (tmp_path, tmp_path / "ticket-*.parquet"):
        assert sorted(read_recorded(RecordedConfig(uri=str(uri)), "ab").place) == ["0", "1"]


def test_probabilities_are_those_of_the_labels_that_the_file_names(file):
    """Once by position: with the labels in another order, every answer was taken for another label."""

    def write_named(names: list[str]) -> None:
        table = pa.table({"id": ["1", "2"], "probs": [[0.7, 0.2, 0.1], [0.0, 0.0, 1.0]]})
        pq.write_table(table.replace_schema_metadata({"labels": json.dumps(names)}), file)

    write_named(["sea", "kitchen", "garden"])
    recorded = read_recorded(RecordedConfig(uri=str(file)), ["garden", "sea", "kitchen"])
    assert recorded.probs_RC == pytest.approx(np.array([[0.1, 0.7, 0.2], [1.0, 0.0, 0.0]]))
    write_named(["sea", "kitchen", "street"])
    with pytest.raises(ConfigError, match=r"labels\.names: .* sea, kitchen, street, and not for garden, sea"):
        read_recorded(RecordedConfig(uri=str(file)), ["garden", "sea", "kitchen"])


@pytest.mark.parametrize(
    ("probs", "n_classes", "message"),
    [
        ([[0.5, 0.5], [0.1, 0.9]], 3, r"probs: 'probs' holds \[2\] numbers.*labels\.names has 3 labels"),
        ([[0.5, 0.5]] * 3000 + [[0.2, 0.3, 0.5]], 2, "probs"),
        ([0.5], 2, "probs"),
        ([[0.5, 0.5], None], 2, "probs"),
        ([[0.5, float("nan")]], 2, "probs: .*no probabilities"),
        ([[1.5, -0.5]], 2, "probs: .*no probabilities"),
        (pa.array([], pa.list_(pa.float32())), 2, "uri: .*holds no answers"),
    ],
    ids=["other labels", "in a late row", "no lists", "no row", "nan", "negative", "nothing"],
)
def test_rows_that_are_no_distribution_over_the_labels(file, probs, n_classes, message):
    uri = write(file, id=pa.array(map(str, range(len(probs))), pa.string()), probs=probs)
    with pytest.raises(ConfigError, match=rf"^teacher\.recorded\.{message}"):
        read_recorded(RecordedConfig(uri=uri), "abc"[:n_classes])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("uri", "nowhere.parquet", "uri: 'nowhere.parquet' matches no file"),
        ("uri", "bad", "uri: .*cannot be read"),
        ("id", "typo", "id: no column 'typo' in .*; there are id, probs"),
        ("probs", "typo", "probs: no column 'typo'"),
        ("prompt_tokens", "typo", "prompt_tokens: no column 'typo'"),
    ],
)
def test_a_file_or_column_that_is_not_there(file, field, value, message):
    uri = write(file, id=["a"], probs=[[0.5, 0.5]])
    if value == "bad":
        file.write_bytes(b"not parquet at all")
        value = uri
    with pytest.raises(ConfigError, match=rf"^teacher\.recorded\.{message}"):
        read_recorded(RecordedConfig(**({"uri": uri} | {field: value})), "ab")


# --- the teacher


class Purse:
    """An allowance of so many tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    async def take(self, *, texts: int = 0, prompt_tokens: int = 0, answer_tokens: int = 0) -> bool:
        fits = prompt_tokens + answer_tokens <= self.tokens
        self.tokens -= (prompt_tokens + answer_tokens) * fits
        return fits


def ask(uri: str, ids: Sequence[str], allowance: Allowance | None = None) -> Answers:
    teacher = RecordedTeacher(RecordedConfig(uri=uri, prompt_tokens="prompt_tokens"), NAMES[:3])
    return asyncio.run(teacher.label(ids, ["whatever it says"] * len(ids), allowance or Unlimited()))


class TestTeacher:
    @pytest.fixture
    def answers(self, tmp_path) -> str:
        return str(write_answers(tmp_path / "answers.parquet", [write_corpus(tmp_path / "pool.parquet", 30)]))

    def test_answers_by_id_and_an_unknown_one_costs_nothing(self, answers):
        recorded = pq.read_table(answers).take([17, 3, 29])
        said = ask(answers, ["nobody knows me", *recorded["id"].to_pylist()])
        expected = np.array(recorded["probs"].to_pylist())
        tokens = recorded["prompt_tokens"].to_pylist()
        assert list(said.outcome_N) == ["no_recorded_answer", "", "", ""]
        assert said.probs_NC[1:] == pytest.approx(expected)
        assert said.off_label_N[1:] == pytest.approx(1 - expected.sum(axis=1), abs=1e-6)
        assert said.prompt_tokens_N.tolist() == [0, *tokens]
        assert said.usage == Usage(texts=3, requests=3, prompt_tokens=sum(tokens))

    def test_mass_above_one_leaves_nothing_off_label(self, file):
        uri = write(file, id=["a"], probs=[[0.6, 0.5, 0.0]], prompt_tokens=[1])
        assert ask(uri, ["a"]).off_label_N.tolist() == [0.0]

    def test_the_cap_counts_the_tokens_that_the_answers_once_cost(self, answers):
        recorded = pq.read_table(answers)
        tokens = recorded["prompt_tokens"].to_numpy()
        said = ask(answers, recorded["id"].to_pylist(), Purse(int(tokens[:10].sum())))
        assert set(said.outcome_N) == {"", UNASKED}
        assert said.usage.tokens == tokens[said.answered_N].sum() <= tokens[:10].sum()

    def test_labels_of_an_earlier_run_serve_a_later_one(self, tmp_path):
        store, rng = RunStore(str(tmp_path)), np.random.default_rng(5)
        probs_NC = toy_probs(rng.integers(0, 3, 30), 3, 0.9, rng)
        for ticket in (0, 1):
            rows = np.arange(15 * ticket, 15 * ticket + 15)
            put_label_file(store, ticket, rows, probs_NC[rows], tokens=25)
        said = ask(store.path(LABELS_DIR), [f"toy-{row}" for row in range(30)])
        assert said.answered_N.all()
        assert np.array_equal(said.probs_NC, probs_NC.astype(float))
        assert said.prompt_tokens_N.tolist() == [25] * 30
