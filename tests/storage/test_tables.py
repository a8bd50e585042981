"""Texts come back by row number, label distributions as matrices, and people's answers take effect once."""

from __future__ import annotations

import asyncio

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from candidate_sets import refresh
from hypothesis import given, settings
from hypothesis import strategies as st
from selector_bench import Bench
from toys import make_run, put_label_file, toy_texts

from llkd_ray.corpus.cleaning import text_hash
from llkd_ray.selection.recovery import apply_human_labels
from llkd_ray.selection.table import ScoreTable
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import RunStore, round_file
from llkd_ray.storage.tables import AuditAnswers, Examples, Shard, list_column, matrix_of, read_labels

N_POOL, N_TEST = 150, 40


@pytest.fixture
def store(tmp_path):
    return RunStore(str(tmp_path / "run"))


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Shards of 64, 64, 22 and 40 rows in row groups of 16."""
    return Examples.open(make_run(tmp_path_factory.mktemp("run"), N_POOL, N_TEST))


@settings(deadline=None)
@given(n=st.integers(0, 20), c=st.integers(1, 5), cut=st.integers(0, 20))
def test_a_matrix_becomes_a_column_and_back_whatever_its_chunks(n, c, cut):
    matrix_NC = np.random.default_rng(0).uniform(size=(n, c)).astype(np.float32)
    column = list_column(matrix_NC)
    assert column.type == tables.LABELS.field("probs").type
    assert matrix_of(pa.chunked_array([column]), c).tolist() == matrix_NC.tolist()
    halves = pa.chunked_array([column.slice(0, cut), column.slice(cut)])
    assert matrix_of(halves, c).tolist() == matrix_NC.tolist()
    assert matrix_of(halves.slice(cut), c).tolist() == matrix_NC[cut:].tolist()
    assert matrix_of(pa.chunked_array([], column.type), c).shape == (0, c)


def test_read_labels_leaves_out_tickets_without_a_file(store):
    for ticket, row in ((0, 5), (2, 9)):
        put_label_file(store, ticket, np.array([row]), np.array([[0.5, 0.5]]))
    assert read_labels(store, [2, 1, 0])["row"].to_pylist() == [9, 5]
    assert read_labels(store, [1]).equals(tables.LABELS.empty_table())
    assert read_labels(store, []).schema == tables.LABELS


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=9), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_rows_are_taken_from_more_text_than_an_array_holds(texts, random):
    """With a limit of 80 bytes; that of Table.take is 2 GiB."""
    column = pa.chunked_array([[one] for one in texts], pa.string())
    table = pa.table({"text": column, "n": np.arange(len(texts))})
    index = np.array([random.randrange(len(texts)) for _ in range(25)])
    taken = tables.take_rows(table, index, limit=80)
    assert taken.equals(table.take(pa.array(index)))
    if table.nbytes > 80:
        assert all(len("".join(chunk.to_pylist()).encode()) <= 80 for chunk in taken["text"].chunks)


class TestExamples:
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
        assert table["text_hash"].to_pylist() == [text_hash(texts[row]) for row in rows]

    @pytest.mark.parametrize("rows", [[], [70, 3]])
    def test_columns_come_in_the_order_asked_for(self, examples, rows):
        assert examples.read(rows, ["text", "id"]).column_names == ["row", "text", "id"]
        assert examples.read(rows).schema == tables.NUMBERED_EXAMPLES

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
            columns = [ids, [f"text of {one}" for one in ids], [-1] * len(ids), range(len(ids))]
            store.write_table(name, pa.table(columns, schema=tables.EXAMPLES))
            return Shard(name, len(ids))

        pool = [write("a", []), write("b", ["b0", "b1"]), write("c", []), write("d", ["d0"])]
        examples = Examples(store, pool, [write("e", []), write("f", ["f0"])])
        assert examples.read([3, 0, 2, 1])["id"].to_pylist() == ["f0", "b0", "d0", "b1"]

    def test_counts_and_further_facts_in_the_index(self, examples, tmp_path):
        assert (examples.n_pool, examples.n_test, examples.n_rows) == (N_POOL, N_TEST, N_POOL + N_TEST)
        assert examples.test_rows.tolist() == list(range(N_POOL, N_POOL + N_TEST))
        store = make_run(tmp_path / "run", 10)
        index = store.read_json("examples/index.json")
        store.write_json("examples/index.json", index | {"rows_in": {"pool": 12}})
        assert (Examples.open(store).n_rows, Examples.open(store).test_rows.size) == (10, 0)


# --- people's answers


def test_people_s_answers_come_back_from_their_file(tmp_path):
    store = make_run(tmp_path, 20)
    assert len(AuditAnswers.read(store)) == 0
    AuditAnswers.of({9: 2, 3: 0}).write(store)
    assert AuditAnswers.read(store).by_row() == {3: 0, 9: 2}
    AuditAnswers.of({}).keep_for(store, 0)
    assert not store.exists(round_file(0, "audited.parquet"))


def test_a_batch_gets_people_s_answers_for_certain():
    p_NC = np.array([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    columns = [
        pa.array([8, 5, 30]),
        pa.array(["a", "b", "c"]),
        pa.array([0, 1, 2], pa.int16()),
        list_column(p_NC),
        pa.array([1.0, 2.0, 0.5], pa.float32()),
    ]
    batch = pa.Table.from_arrays(columns, schema=tables.ROUND)
    fixed = AuditAnswers.of({5: 2, 8: 0, 9: 1}).correct(batch, 3)
    assert fixed.schema == batch.schema
    assert fixed["label"].to_pylist() == [0, 2, 2]
    np.testing.assert_allclose(fixed["probs"].to_pylist(), [[1, 0, 0], [0, 0, 1], p_NC[2]], atol=1e-6)
    assert fixed["weight"].to_pylist() == [1.0, 2.0, 0.5]
    for nothing in (AuditAnswers.of({}), AuditAnswers.of({31: 1})):
        assert nothing.correct(batch, 3).equals(batch)


def test_in_the_table_people_s_answers_are_sure_and_count_once():
    table = ScoreTable(3, 10)
    rows = np.arange(6)
    table.put_labels(rows, np.zeros(6, dtype=int), np.full(6, 0.6), np.zeros(6, dtype=int))
    refresh(table, 0, rows, np.full((6, 3), 1 / 3))
    answers = AuditAnswers.of({1: 2, 2: 0, 8: 1})
    apply_human_labels(answers, table)
    candidates = table.candidates(1)
    assert candidates.label_N.tolist() == [0, 2, 0, 0, 0, 0]
    np.testing.assert_allclose(candidates.confidence_N, [0.6, 1, 1, 0.6, 0.6, 0.6], rtol=1e-6)
    assert np.flatnonzero(np.isnan(candidates.support_N)).tolist() == [1, 2], "the student looks again"
    assert table.count_labelled() == 6, "row 8 has no label yet"
    refresh(table, 1, rows, np.full((6, 3), 1 / 3))
    apply_human_labels(answers, table)
    assert not np.isnan(table.candidates(1).support_N).any()
    assert not table.contradicted(0.5, 10).size


def test_a_selector_that_dies_chooses_as_one_that_lives(tmp_path):
    async def run(bench: Bench, dies: bool) -> None:
        for k in range(2):
            await bench.round(k)
        candidates = bench.selector.table.candidates(bench.schedule.tickets_before(1)).take(slice(40))
        # The other class than the teacher's, for texts that are still to be chosen and for one that was.
        others_N = 1 - np.minimum(candidates.label_N, 1)
        said = dict(zip(candidates.row_N.tolist(), others_N.tolist(), strict=True))
        said[bench.batch_rows(1)[0][0]] = 2
        AuditAnswers.of(said).write(bench.store)
        bench.restart()
        for k in range(2, 4):
            await bench.teach_for(k)
            await bench.score(k)
            if dies:
                bench.restart()
            await bench.selector.select(k)
            await bench.selector.trained(k, {"ranks": 1, "loss": 0.1})
        for k in range(2, 4):
            assert AuditAnswers.of_round(bench.store, k).by_row() == said
            for text in bench.batch(k).to_pylist():
                if text["row"] in said:
                    assert (text["label"], max(text["probs"])) == (said[text["row"]], 1.0)
        assert not len(AuditAnswers.of_round(bench.store, 1)), "it was selected before"
        trained = {row for rows in bench.batch_rows()[2:] for row in rows}
        assert set(said) & trained, "some of them are trained on"

    one, other = Bench(tmp_path / "one"), Bench(tmp_path / "other")
    asyncio.run(run(one, dies=False))
    asyncio.run(run(other, dies=True))
    assert one.batch_rows() == other.batch_rows()
