"""A run's figures against values worked out by hand, on files written by hand."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from toys import make_config, put_label_file

from llkd_ray.config.schedule import Schedule
from llkd_ray.evaluation.measure import Measure, write_insight
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import (
    BATCH,
    CANDIDATE_SAMPLE,
    EXAMPLES_INDEX,
    INSIGHT,
    TRAINED,
    RunStore,
    predictions_file,
    round_file,
)
from llkd_ray.storage.tables import list_column

# 40 pool rows; 4 of them (3, 8, 20, 31) are held out. 5 test rows, 40..44, the last without gold.
HOLDOUT = [3, 8, 20, 31]
TEST_GOLD = [0, 1, 1, 0, -1]
N_POOL = 40


def one_sure(labels, top=0.8) -> np.ndarray:
    """Distributions over two labels with ``top`` on the given ones."""
    return np.array([[top, 1 - top] if label == 0 else [1 - top, top] for label in labels])


class HandMade:
    """The files of a run, as many as a test asks for."""

    def __init__(self, folder, pool_gold=None, test_gold=TEST_GOLD):
        self.store = RunStore(str(folder))
        config = make_config(labels={"names": ["no", "yes"]}, budget={"rounds": 2, "train": 8})
        gold = [*(pool_gold or [-1] * N_POOL), *test_gold]
        index = {}
        for part, start, stop in (("pool", 0, N_POOL), ("test", N_POOL, len(gold))):
            rows = range(start, stop)
            columns = [[f"id-{row}" for row in rows], [f"text {row}" for row in rows], gold[start:stop], rows]
            self.store.write_table(f"examples/{part}.parquet", pa.table(columns, schema=tables.EXAMPLES))
            index[part] = [{"file": f"examples/{part}.parquet", "rows": len(rows)}]
        self.store.write_json(EXAMPLES_INDEX, index)
        self.config = config
        self.schedule = Schedule.plan(config, N_POOL, len(test_gold))
        assert self.schedule.holdout == len(HOLDOUT)

    def label(self, ticket, rows, probs, off_label=0.0):
        off_label_N = np.broadcast_to(off_label, len(rows))
        put_label_file(self.store, ticket, np.array(rows), np.asarray(probs), off_label_N=off_label_N)

    def predict(self, k, *ranks):
        """One (rows, probs) for each rank."""
        for rank, (rows, probs) in enumerate(ranks):
            columns = [pa.array(rows, pa.int64()), list_column(np.asarray(probs))]
            self.store.write_table(
                predictions_file(k, rank, len(ranks)),
                pa.Table.from_arrays(columns, schema=tables.PREDICTIONS),
            )
        facts = {"ranks": len(ranks), "checkpoint": f"checkpoints/student/round-{k:04d}"}
        self.store.write_json(round_file(k, TRAINED), facts)
        if not self.store.exists(round_file(k, CANDIDATE_SAMPLE)):
            self.sample(k, [], [], [], [], [])

    def sample(self, k, *columns):
        """Rows, labels, confidences, uncertainties and whether they were selected."""
        columns = [*columns[:4], [0.5] * len(columns[0]), columns[4]]
        arrays = [pa.array(x, field.type) for x, field in zip(columns, tables.CANDIDATE_SAMPLE, strict=True)]
        self.store.write_table(
            round_file(k, CANDIDATE_SAMPLE), pa.Table.from_arrays(arrays, schema=tables.CANDIDATE_SAMPLE)
        )

    def batch(self, k, rows, labels):
        n = len(rows)
        columns = [
            pa.array(rows, pa.int64()),
            pa.array([f"text {row}" for row in rows], pa.string()),
            pa.array(labels, pa.int16()),
            list_column(one_sure(labels).reshape(-1, 2)),
            pa.array([1.0] * n, pa.float32()),
        ]
        self.store.write_table(round_file(k, BATCH), pa.Table.from_arrays(columns, schema=tables.ROUND))

    def measure(self) -> Measure:
        return Measure(self.store, self.schedule, self.config)


@pytest.fixture
def run(tmp_path):
    made = HandMade(tmp_path / "run")
    # The teacher says 0 0 1 1 of the hold-out.
    made.label(0, HOLDOUT, one_sure([0, 0, 1, 1], 0.6) * 0.9)
    # The student says 0 0 1 1 (1) of the test rows: of the four with gold, 3 are right; and 0 1 1 0 of
    # the hold-out: half agree. Two ranks have every other row, as the training run deals them.
    rows = np.array([40, 41, 42, 43, 44, *HOLDOUT])
    probs = one_sure([0, 0, 1, 1, 1, 0, 1, 1, 0])
    made.predict(0, (rows[::2], probs[::2]), (rows[1::2], probs[1::2]))
    made.batch(0, [0, 1, 2], [0, 1, 1])
    return made


def test_labels_that_no_test_text_has_are_named(tmp_path):
    assert HandMade(tmp_path / "both").measure().labels_without_gold() == []
    assert HandMade(tmp_path / "one", test_gold=[1, 1, -1, 1]).measure().labels_without_gold() == ["no"]
    assert HandMade(tmp_path / "none", test_gold=[-1] * 4).measure().labels_without_gold() == []


class TestRound:
    def test_by_hand_however_many_ranks_there_were(self, run):
        figures = run.measure().round(0)
        # Gold 0 1 1 0, said 0 0 1 1: each class has one hit, is said twice, is true twice. All confidences
        # are 0.8, so in one bin: |0.5 - 0.8|. The pool has no gold.
        assert figures == {
            "accuracy": 0.5,
            "macro_f1": pytest.approx(0.5),
            "ece": pytest.approx(0.3),
            "teacher_agreement": 0.5,
            "pseudo_label_accuracy": None,
        }
        assert json.loads(json.dumps(figures)) == figures
        run.predict(0, ([40, 41, 42, 43, 44, *HOLDOUT], one_sure([0, 0, 1, 1, 1, 0, 1, 1, 0])))
        assert run.measure().round(0) == figures
        assert run.measure().checkpoint(0) == "checkpoints/student/round-0000"
        # Files of an earlier number of ranks do not count.
        stray = pa.table([[40], [[0.0, 1.0]]], schema=tables.PREDICTIONS)
        run.store.write_table(predictions_file(0, 2, 3), stray)
        assert run.measure().round(0) == figures

    def test_pseudo_labels_are_held_against_gold_where_it_is_known(self, tmp_path):
        gold = [-1] * N_POOL
        gold[5], gold[6], gold[7] = 1, 0, 1
        run = HandMade(tmp_path / "gold", pool_gold=gold)
        run.predict(0, ([40], one_sure([0])))
        run.batch(0, [5, 4, 7, 6], [1, 0, 0, 0])  # right, unknown, wrong, right
        assert run.measure().round(0)["pseudo_label_accuracy"] == pytest.approx(2 / 3)

    def test_gold_of_the_pool_is_no_test(self, tmp_path):
        """Hold-out rows are predicted too, and their gold may be known; accuracy is of the test set."""
        run = HandMade(tmp_path / "gold", pool_gold=[1] * N_POOL)
        run.predict(0, ([40, 41, *HOLDOUT], one_sure([0, 1, 0, 0, 0, 0])))
        run.batch(0, [0], [1])
        assert run.measure().round(0)["accuracy"] == 1.0

    def test_what_cannot_be_known_is_none(self, tmp_path):
        run = HandMade(tmp_path / "bare", test_gold=[])
        run.predict(0, (HOLDOUT, one_sure([0, 0, 0, 0])))
        run.batch(0, [], [])
        assert run.measure().round(0) == dict.fromkeys(
            ("accuracy", "macro_f1", "ece", "teacher_agreement", "pseudo_label_accuracy")
        )
        assert run.measure().teacher(np.random.default_rng(0)) is None

    def test_agreement_is_over_the_holdout_rows_that_the_teacher_answered(self, run):
        run.store.delete("labels/ticket-00000000.parquet")  # the fixture's, which has all four
        run.label(0, HOLDOUT[:3], one_sure([0, 1, 0]))
        run.predict(0, ([*HOLDOUT, 40], one_sure([0, 1, 1, 0, 0])))
        # Other tickets are none of it.
        run.label(run.schedule.pool_tickets.start, [40, 41, 0], one_sure([1, 1, 1]))
        run.label(run.schedule.test_tickets.start, [40, 41, 42], one_sure([1, 1, 1]))
        assert run.measure().round(0)["teacher_agreement"] == pytest.approx(2 / 3)

    def test_what_is_the_same_in_every_round_is_read_once(self, run, monkeypatch):
        measure = run.measure()
        first = measure.round(0)
        read = []
        read_table = RunStore.read_table
        monkeypatch.setattr(
            RunStore,
            "read_table",
            lambda self, file, *rest: read.append(file) or read_table(self, file, *rest),
        )
        assert measure.round(0) == first
        assert len(read) == 3, "two ranks' predictions and the batch"


class TestStudent:
    def test_intervals_hold_the_figures(self, run):
        figures = run.measure().student(0, np.random.default_rng(0))
        assert figures == run.measure().student(0, np.random.default_rng(0))
        assert json.loads(json.dumps(figures))
        of_round = run.measure().round(0)
        assert {name: figures[name] for name in of_round} == of_round
        assert set(figures) - set(of_round) == {"accuracy_interval", "macro_f1_interval"}
        for name in ("accuracy", "macro_f1"):
            low, high = figures[f"{name}_interval"]
            assert 0 <= low <= figures[name] <= high <= 1
            assert low < high

    def test_no_intervals_without_gold(self, tmp_path):
        run = HandMade(tmp_path / "bare", test_gold=[-1, -1])
        run.predict(0, ([40, 41], one_sure([0, 1])))
        run.batch(0, [], [])
        assert "accuracy_interval" not in run.measure().student(0, np.random.default_rng(0))


class TestTeacher:
    def test_by_hand_once_it_has_labelled_the_test_set(self, run):
        assert run.measure().teacher(np.random.default_rng(0)) is None
        mass = np.array([[0.9, 0.0], [0.3, 0.1], [0.1, 0.7], [0.45, 0.15], [0.2, 0.2]])
        run.label(run.schedule.test_tickets.start, [40, 41, 42, 43, 44], mass, 1 - mass.sum(axis=1))
        figures = run.measure().teacher(np.random.default_rng(0))
        # gold 0 1 1 0 -, said 0 0 1 0 -.
        assert figures["accuracy"] == 0.75
        assert figures["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
        # Confidences over the labels: 1, .75, .875, .75; the two of .75 share a bin, one right.
        assert figures["ece"] == pytest.approx((0 + abs(1 - 1.5) + 0.125) / 4)
        assert figures["off_label"] == pytest.approx(np.mean([0.1, 0.6, 0.2, 0.4, 0.6]))
        assert json.loads(json.dumps(figures))


class TestInsight:
    def insight(self, run, last=0):
        write_insight(run.store, run.measure(), last, None)
        return run.store.read_json(INSIGHT)

    def test_mistakes_and_bins_are_those_of_the_test_texts_with_gold(self, run):
        found = self.insight(run)
        # Gold 0 1 1 0, answered 0 0 1 1 … as the fixture says: each pair with its count.
        pairs = {(gold, answer): n for gold, answer, n in found["confusion"]}
        assert sum(pairs.values()) == 4
        right = sum(n for (gold, answer), n in pairs.items() if gold == answer)
        assert right / 4 == run.measure().round(0)["accuracy"]
        assert sum(one["texts"] for one in found["reliability"]) == 4

    def test_disagreements_are_of_texts_nobody_trained_on_and_name_both(self, run):
        found = self.insight(run)["disagreements"]
        assert found
        for one in found:
            assert one["student"] != one["teacher"]
            assert int(one["text"].removeprefix("text ")) in [*HOLDOUT, *range(N_POOL, N_POOL + 5)]
        sure = [min(one["student_confidence"], one["teacher_confidence"]) for one in found]
        assert sure == sorted(sure, reverse=True)

    def test_without_gold_it_says_nothing_of_mistakes(self, tmp_path):
        made = HandMade(tmp_path / "run", test_gold=[-1, -1])
        made.label(0, HOLDOUT, one_sure([0, 0, 1, 1]))
        made.predict(0, ([*HOLDOUT, 40, 41], one_sure([0, 0, 1, 1, 0, 1])))
        found = self.insight(made)
        assert found["confusion"] is found["reliability"] is found["pool_gold"] is None
        assert found["disagreements"] == found["useful"] == found["doubtful"] == []

    def test_gold_of_the_pool_is_counted_as_far_as_it_is_known(self, tmp_path):
        made = HandMade(tmp_path / "run", pool_gold=[0] * 10 + [1] * 5 + [-1] * 25)
        made.label(0, HOLDOUT, one_sure([0, 0, 1, 1]))
        made.predict(0, (HOLDOUT, one_sure([0, 0, 1, 1])))
        assert self.insight(made)["pool_gold"] == [10, 5]

    def test_what_to_read_comes_from_the_candidate_samples_each_text_once(self, run):
        for k, uncertainty in ((0, [np.nan] * 4), (1, [0.9, 0.1, 0.8, 0.2])):
            run.sample(
                k,
                [10, 11, 12, 13],
                [0, 1, 0, 1],
                [0.9, 0.8, 0.3, 0.2],
                uncertainty,
                [True, True, False, True],
            )
        run.predict(1, ([40], one_sure([0])))
        assert self.insight(run)["useful"] == [], "in round 0 the student had scored nothing"
        found = self.insight(run, last=1)
        assert [one["text"] for one in found["useful"]] == ["text 10", "text 11", "text 13"]
        assert [one["text"] for one in found["doubtful"]] == ["text 13", "text 12", "text 11", "text 10"]
        assert found["doubtful"][0]["uncertainty"] is None
