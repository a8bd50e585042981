"""People's labels in the table, in a round's batch, and in a selector that dies."""

from __future__ import annotations

import asyncio

import numpy as np
import pyarrow as pa
from candidate_sets import refresh
from selector_bench import Bench
from toys import make_run

from llkd_ray.selection.recovery import apply_human_labels
from llkd_ray.selection.table import ScoreTable
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import round_file
from llkd_ray.storage.tables import AuditAnswers, list_column


def test_they_come_back_from_their_file(tmp_path):
    store = make_run(tmp_path, 20)
    assert len(AuditAnswers.read(store)) == 0
    AuditAnswers.of({9: 2, 3: 0}).write(store)
    assert AuditAnswers.read(store).by_row() == {3: 0, 9: 2}
    AuditAnswers.of({}).keep_for(store, 0)
    assert not store.exists(round_file(0, "audited.parquet"))


def test_a_batch_gets_them_for_certain():
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


def test_in_the_table_they_are_sure_and_count_once():
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
        candidates = bench.selector.table.candidates(bench.schedule.tickets_before(1))
        # The other class than the teacher's, for texts that are still to be chosen and for one that was.
        said = {int(row): int(1 - min(label, 1)) for row, label in zip(
            candidates.row_N[:40], candidates.label_N[:40], strict=True)}  # fmt: skip
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
            batch = bench.batch(k)
            for row, label, probs in zip(
                *(batch[name].to_pylist() for name in ("row", "label", "probs")), strict=True
            ):
                if row in said:
                    assert label == said[row]
                    assert max(probs) == 1.0
        assert not len(AuditAnswers.of_round(bench.store, 1)), "it was selected before"
        assert set(said) & {row for rows in bench.batch_rows()[2:] for row in rows}, (
            "some of them are trained on"
        )

    one, other = Bench(tmp_path / "one"), Bench(tmp_path / "other")
    asyncio.run(run(one, dies=False))
    asyncio.run(run(other, dies=True))
    assert one.batch_rows() == other.batch_rows()
