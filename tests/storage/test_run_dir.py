"""Files are whole or not there, and texts come back by row number."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import make_run, put_label_file, toy_texts

from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import (
    LABELS_DIR,
    RunStore,
    predictions_file,
    round_file,
    ticket_file,
    ticket_of,
)
from llkd_ray.storage.tables import Examples, Shard, list_column, matrix_of, read_labels

N_POOL, N_TEST = 150, 40


@pytest.fixture
def store(tmp_path):
    return RunStore(str(tmp_path / "run"))


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Shards of 64, 64, 22 and 40 rows in row groups of 16."""
    return Examples.open(make_run(tmp_path_factory.mktemp("run"), N_POOL, N_TEST))


class DyingStream:
    """Takes half of what it is given, then breaks."""

    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def write(self, content):
        self.stream.write(content[: len(content) // 2])
        raise OSError("disk full")


class DyingFileSystem:
    def __init__(self, fs):
        self.fs = fs

    def open_output_stream(self, path, **options):
        return DyingStream(self.fs.open_output_stream(path, **options))

    def __getattr__(self, name):
        return getattr(self.fs, name)


class TestWriting:
    def test_what_is_written_is_read(self, store):
        store.write_bytes("a/b/c.bin", b"\x00abc")
        assert store.read_bytes("a/b/c.bin") == b"\x00abc"
        store.write_bytes("a/b/c.bin", b"second")
        assert store.read_bytes("a/b/c.bin") == b"second"
        store.write_json("x.json", {"name": "é", "list": [1, None]})
        assert store.read_json("x.json") == {"name": "é", "list": [1, None]}

    def test_nothing_else_is_left(self, store, tmp_path):
        store.write_bytes("folder/one.txt", b"1")
        assert [path.name for path in (tmp_path / "run" / "folder").iterdir()] == ["one.txt"]

    def test_a_gz_name_is_not_packed_or_unpacked(self, store):
        store.write_bytes("x.gz", b"plain")
        assert store.read_bytes("x.gz") == b"plain"

    @pytest.mark.parametrize("there_before", [False, True])
    def test_failure_in_the_middle_leaves_what_was(self, store, tmp_path, there_before):
        if there_before:
            store.write_bytes("labels/t.bin", b"the old content")
        store.fs = DyingFileSystem(store.fs)
        with pytest.raises(OSError, match="disk full"):
            store.write_bytes("labels/t.bin", b"the new content")
        left = {path.name: path.read_bytes() for path in (tmp_path / "run" / "labels").iterdir()}
        assert left == ({"t.bin": b"the old content"} if there_before else {})

    def test_failing_move_leaves_no_half_file(self, store, tmp_path, monkeypatch):
        class NoMove(DyingFileSystem):
            def open_output_stream(self, path, **options):
                return self.fs.open_output_stream(path, **options)

            def move(self, source, target):
                raise OSError("no")

        store.fs = NoMove(store.fs)
        with pytest.raises(OSError, match="no"):
            store.write_bytes("labels/t.bin", b"content")
        assert list((tmp_path / "run" / "labels").iterdir()) == []

    def test_what_a_killed_writer_left_is_no_file_of_the_run(self, store, tmp_path):
        store.write_bytes("sent/ticket-00000001.abc", b"16")
        (tmp_path / "run" / "sent" / "ticket-00000002.def.0123.tmp").write_bytes(b"")
        assert store.names("sent") == ["ticket-00000001.abc"]

    def test_table_keeps_schema_and_row_groups(self, store):
        table = tables.LABELS.empty_table()
        store.write_table("empty.parquet", table)
        assert store.read_table("empty.parquet").schema == tables.LABELS
        rows = pa.table({"row": np.arange(10)}, schema=pa.schema([tables.LABELS.field("row")]))
        store.write_table("rows.parquet", rows, row_group_size=4)
        assert store.read_table("rows.parquet", ["row"]).equals(rows)
        assert pq.ParquetFile(store.path("rows.parquet")).metadata.num_row_groups == 3


class TestFolders:
    def test_names_are_sorted_and_filtered(self, store):
        for name in ("b.parquet", "a.parquet", "c.json", "inner/d.parquet"):
            store.write_bytes(f"labels/{name}", b"")
        assert store.names("labels") == ["a.parquet", "b.parquet", "c.json"]
        assert store.names("labels", ".parquet") == ["a.parquet", "b.parquet"]
        assert store.folders("labels") == ["inner"]

    def test_no_folder_is_an_empty_one(self, store):
        assert store.names("nothing") == []
        assert store.folders("nothing") == []

    def test_delete_and_exists(self, store):
        store.write_bytes("x", b"")
        assert store.exists("x")
        store.delete("x")
        assert not store.exists("x")
        store.delete("x")

    def test_relative_and_home_paths_become_absolute(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert RunStore("runs/a").root == str(tmp_path / "runs" / "a")
        assert RunStore("~/a/").root == str(tmp_path / "a")

    def test_uri(self, tmp_path):
        store = RunStore(f"file://{tmp_path}/run")
        store.write_bytes("x", b"1")
        assert (tmp_path / "run" / "x").read_bytes() == b"1"
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["x"]


class TestMetrics:
    def test_none_yet(self, store):
        assert store.read_metrics() == []

    def test_lines_are_in_order_and_a_round_is_there_once(self, store):
        for k in (1, 0, 2):
            store.append_metrics({"round": k, "accuracy": k / 10})
        store.append_metrics({"round": 1, "accuracy": None, "note": "again\u2028\n"})
        assert store.read_metrics() == [
            {"round": 0, "accuracy": 0.0},
            {"round": 1, "accuracy": None, "note": "again\u2028\n"},
            {"round": 2, "accuracy": 0.2},
        ]
        lines = store.read_bytes("metrics.jsonl").decode().split("\n")
        assert lines[-1] == ""
        assert [json.loads(line)["round"] for line in lines[:-1]] == [0, 1, 2]

    def test_lines_of_earlier_rounds_are_kept_as_they_are(self, store, monkeypatch):
        """All of them were parsed in every round: seconds a round after a thousand."""
        for k in range(20):
            store.append_metrics({"round": k})
        parsed = []
        loads = json.loads
        monkeypatch.setattr(json, "loads", lambda line: parsed.append(line) or loads(line))
        store.append_metrics({"round": 20})
        assert len(parsed) == 1


class TestNames:
    @given(st.integers(0, 10**9))
    def test_ticket_of_is_ticket_file_backwards(self, ticket):
        assert ticket_of(ticket_file(LABELS_DIR, ticket).rpartition("/")[2]) == ticket

    def test_files_of_a_round(self):
        assert round_file(3, "batch.parquet") == "rounds/0003/batch.parquet"
        assert predictions_file(3, 1, 4) == "rounds/0003/predictions-0001-of-0004.parquet"


class TestMatrices:
    @settings(deadline=None)
    @given(n=st.integers(0, 20), c=st.integers(1, 5), cut=st.integers(0, 20))
    def test_column_and_back(self, n, c, cut):
        matrix_NC = np.random.default_rng(0).uniform(size=(n, c)).astype(np.float32)
        column = list_column(matrix_NC)
        assert column.type == tables.LABELS.field("probs").type
        assert matrix_of(pa.chunked_array([column]), c).tolist() == matrix_NC.tolist()
        halves = pa.chunked_array([column.slice(0, cut), column.slice(cut)])
        assert matrix_of(halves, c).tolist() == matrix_NC.tolist()
        assert matrix_of(halves.slice(cut), c).tolist() == matrix_NC[cut:].tolist()

    def test_no_chunks(self):
        assert matrix_of(pa.chunked_array([], pa.list_(pa.float32())), 4).shape == (0, 4)


def test_read_labels_leaves_out_tickets_without_a_file(store):
    for ticket, row in ((0, 5), (2, 9)):
        put_label_file(store, ticket, np.array([row]), np.array([[0.5, 0.5]]))
    assert read_labels(store, [2, 1, 0])["row"].to_pylist() == [9, 5]
    assert read_labels(store, [1]).equals(tables.LABELS.empty_table())
    assert read_labels(store, []).schema == tables.LABELS


class TestExamples:
    def test_counts(self, examples):
        assert (examples.n_pool, examples.n_test, examples.n_rows) == (N_POOL, N_TEST, N_POOL + N_TEST)
        assert examples.test_rows.tolist() == list(range(N_POOL, N_POOL + N_TEST))

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, N_POOL + N_TEST - 1), max_size=80))
    def test_any_rows_in_any_order_with_repeats(self, examples, rows):
        texts, gold_N = toy_texts(N_POOL + N_TEST, 3, seed=0)
        table = examples.read(np.array(rows, dtype=np.int64))
        assert table.schema == tables.NUMBERED_EXAMPLES
        assert table["row"].to_pylist() == rows
        assert table["id"].to_pylist() == [f"toy-{row}" for row in rows]
        assert table["text"].to_pylist() == [texts[row] for row in rows]
        assert table["gold"].to_pylist() == [gold_N[row] for row in rows]

    @pytest.mark.parametrize("rows", [[], [70, 3]])
    def test_columns_come_in_the_order_asked_for(self, examples, rows):
        assert examples.read(rows, ["text", "id"]).column_names == ["row", "text", "id"]
        assert examples.read(rows, ["gold"]).column_names == ["row", "gold"]

    def test_nothing(self, examples):
        assert examples.read([]).equals(tables.NUMBERED_EXAMPLES.empty_table())

    @pytest.mark.parametrize("rows", [[-1], [0, N_POOL + N_TEST]])
    def test_row_that_is_not_there(self, examples, rows):
        with pytest.raises(IndexError, match=f"of {N_POOL + N_TEST}"):
            examples.read(rows)

    def test_opens_only_what_it_needs(self, examples, monkeypatch):
        opened, groups_read = [], []
        plain_init, plain_read = pq.ParquetFile.__init__, pq.ParquetFile.read_row_groups

        def counting_init(self, source, **options):
            opened.append(source.rpartition("/")[2])
            plain_init(self, source, **options)

        def counting_read(self, groups, **options):
            groups_read.append(groups)
            return plain_read(self, groups, **options)

        monkeypatch.setattr(pq.ParquetFile, "__init__", counting_init)
        monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counting_read)
        rows = [63, 17, 63, 0, N_POOL + 33]
        assert examples.read(rows)["row"].to_pylist() == rows
        assert opened == ["pool-00000.parquet", "test-00000.parquet"]
        assert groups_read == [[0, 1, 3], [2]]

    def test_shards_without_rows(self, store):
        def write(name, ids):
            columns = [ids, [f"text of {one}" for one in ids], [-1] * len(ids)]
            store.write_table(name, pa.table(columns, schema=tables.EXAMPLES))
            return Shard(name, len(ids))

        pool = [write("a", []), write("b", ["b0", "b1"]), write("c", []), write("d", ["d0"])]
        examples = Examples(store, pool, [write("e", []), write("f", ["f0"])])
        assert examples.read([3, 0, 2, 1])["id"].to_pylist() == ["f0", "b0", "d0", "b1"]

    def test_examples_of_a_run_with_further_facts_in_the_index(self, tmp_path):
        store = make_run(tmp_path / "run", 10)
        index = store.read_json("examples/index.json")
        store.write_json("examples/index.json", index | {"rows_in": {"pool": 12}})
        assert Examples.open(store).n_rows == 10
        assert Examples.open(store).test_rows.size == 0
