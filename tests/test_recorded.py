"""Reading recorded answers, and what is refused."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llkd_ray.config import ConfigError, RecordedConfig
from llkd_ray.recorded import read_recorded


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
