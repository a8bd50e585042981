"""What work costs in counts that no machine changes, so that nobody makes it dearer unawares.

Engines' starts are counted in cluster/test_vllm.py, an object store's requests in cluster/test_s3.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fake_selector import FakeSelector, pass_through
from fake_teacher import FakeTeacher, leased
from toys import make_config, make_run

from llkd_ray.config.schedule import Schedule
from llkd_ray.config.schema import StudentConfig
from llkd_ray.selection.selector import Selector
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import BATCH, RunStore, round_file
from llkd_ray.storage.tables import Examples, list_column
from llkd_ray.student import ray_train
from llkd_ray.student.inference import by_length
from llkd_ray.student.ray_train import StudentWorker
from llkd_ray.student.train import Batch, plan_steps
from llkd_ray.teacher.labels import TicketLabels
from llkd_ray.teacher.stream import Leaser
from llkd_ray.teacher.worker import OnlyStage

LENGTHS = np.clip(np.random.default_rng(0).lognormal(np.log(40), 0.9, 4_000), 3, 128).astype(np.int64)
"""Tokens of each text, as long texts are cut."""


def padded(batches: Iterable[np.ndarray]) -> float:
    """Tokens with padding per token without."""
    places = list(batches)
    assert np.array_equal(np.sort(np.concatenate(places)), np.arange(LENGTHS.size)), "every text once"
    return sum(int(LENGTHS[index_B].max()) * index_B.size for index_B in places) / int(LENGTHS.sum())


class TestPadding:
    @pytest.mark.parametrize("size", [16, 32, 64])
    @pytest.mark.parametrize("ranks", [1, 2])
    def test_in_training(self, size, ranks):
        config, rng = StudentConfig(model="none", batch_size=size), np.random.default_rng
        of_ranks = [plan_steps(LENGTHS, config, rank, ranks, rng(1)) for rank in range(ranks)]
        assert padded(step.index_B for steps in of_ranks for step in steps) <= 1.08

    @pytest.mark.parametrize(("size", "budget"), [(32, None), (64, None), (1, 2_048)])
    def test_in_scoring(self, size, budget):
        tokens_N = [{"input_ids": [0] * length} for length in LENGTHS.tolist()]
        assert padded(by_length(tokens_N, size, budget)) <= 1.02


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often RunStore and Examples open a file from now on, by what for."""
    counts: Counter[str] = Counter()

    def counting(owner: type, method: str) -> None:
        original = getattr(owner, method)

        def call(self, *arguments, **options):
            counts[method] += 1
            return original(self, *arguments, **options)

        monkeypatch.setattr(owner, method, call)

    for method in ("writing", "read_bytes", "read_table", "names"):
        counting(RunStore, method)
    counting(Examples, "_read_shard")
    return counts


ROWS = 64
"""Of a ticket."""


class TestTicket:
    def test_a_lease_is_one_call_and_opens_each_shard_once(self, tmp_path, opened):
        store = make_run(tmp_path / "run", 200, 30)  # shards of 64 rows
        selector = FakeSelector()
        selector.leases = {3: (3, np.arange(0, 128, 2))}
        opened.clear()
        pass_through(Leaser(store.root, selector), pa.table({"ticket": [3]}))
        assert [name for name, _ in selector.calls] == ["lease"]
        assert opened["_read_shard"] == 2

    @pytest.mark.parametrize("rows", [1, ROWS])
    def test_labelling_is_one_call_and_two_files_however_many_texts_it_has(self, tmp_path, rows, opened):
        """The labels, and the mark of what was sent, which goes again."""
        calls, answers = self.label(tmp_path, rows, opened)
        assert answers == [list(range(rows))], "every text once, all of them together"
        assert calls == {"put_labels": 1}
        assert opened["writing"] == 2
        assert opened["read_table"] + opened["read_bytes"] == 0

    def test_under_a_cap_the_selector_is_asked_in_growing_blocks(self, tmp_path, opened):
        calls, _ = self.label(tmp_path, ROWS, opened, budget={"cap": {"tokens": 10**6}})
        assert calls["put_labels"] == 1
        assert 1 <= calls["reserve"] <= 2 * (1 + np.log2(ROWS)), "for texts, and for tokens"

    def label(self, tmp_path, rows, opened, **sections):
        store = make_run(tmp_path / "run", 200, 30)
        selector, teacher = FakeSelector(), FakeTeacher()
        stage = OnlyStage(make_config(**sections), store.root, selector, teacher)
        opened.clear()
        pass_through(stage, leased(3, list(range(rows))))
        return Counter(name for name, _ in selector.calls), teacher.calls


class CountedRange:
    """Counts how often it is gone through."""

    gone_through = 0

    def __init__(self, stop: int) -> None:
        self.numbers = range(stop)

    def __len__(self) -> int:
        return len(self.numbers)

    def __contains__(self, one: object) -> bool:
        return one in self.numbers

    def __iter__(self) -> Iterator[int]:
        self.gone_through += 1
        return iter(self.numbers)


class TestSelector:
    def test_the_calibrators_tickets_are_gone_through_once(self, tmp_path, monkeypatch):
        """They were at every ticket that came in."""
        n_tickets = 50
        store = make_run(tmp_path / "run", 4 * n_tickets)
        teacher = {"ticket_size": 4, "confidence": {"method": "batch"}}
        sections = {"teacher": teacher, "evaluation": {"holdout": 0}, "test": None}
        selector = Selector(make_config(**sections, budget={"rounds": 1, "train": 10}), store.root)
        fitted_on = CountedRange(n_tickets)
        monkeypatch.setattr(selector.ingest, "_fitted_on", lambda: fitted_on)
        p_MC = np.tile([0.2, 0.6, 0.1], (4, 1))
        for ticket in reversed(range(n_tickets)):
            assert selector.ingest.calibrator is None
            row_M = np.arange(4 * ticket, 4 * ticket + 4)
            selector.ingest.take(ticket, TicketLabels(row_M, p_MC, np.zeros(4), {}, 0))
        assert selector.ingest.done == set(range(n_tickets))
        assert fitted_on.gone_through == 1

    def test_the_round_of_a_ticket_is_found_in_few_looks(self, monkeypatch):
        rounds, looks = 256, []
        config = make_config(teacher={"ticket_size": 1}, budget={"rounds": rounds, "train": rounds})
        schedule, real = Schedule.plan(config, 2_000, 0), Schedule.tickets_before
        monkeypatch.setattr(Schedule, "tickets_before", lambda self, k: looks.append(k) or real(self, k))
        assert schedule.round_of(schedule.pool_tickets[-1]) == rounds - 1
        assert len(looks) <= 10


class TestRank:
    """A rank of the student without Ray Train."""

    @pytest.fixture
    def rank(self, tmp_path, monkeypatch) -> StudentWorker:
        rank: Any = StudentWorker.__new__(StudentWorker)
        rank.rank, rank.world, rank.store = 0, 1, RunStore(str(tmp_path))
        rank.config, rank.batches, rank.seconds = make_config(student={"start": "warm"}), {}, {}
        rank.student = None
        rank.calls, rank.trained_on = [], []

        def ask(method: str, *arguments: Any) -> Any:
            rank.calls.append(method)
            return (np.arange(250), np.zeros(250, dtype=np.int16)) if method == "rows_to_score" else None

        def train(student: object, batch: Batch, *_: object, **__: object) -> dict[str, float]:
            rank.trained_on.append(batch.texts)
            return {}

        rank.ask = ask
        rank._say = lambda note: None
        rank._predict = lambda rows: np.full((rows.size, 3), 1 / 3)
        monkeypatch.setattr(ray_train, "train_round", train)
        monkeypatch.setattr(ray_train.dist, "barrier", lambda: None)
        return rank

    def test_scoring_is_a_call_a_chunk_and_two(self, rank, monkeypatch):
        monkeypatch.setattr(ray_train, "SCORE_CHUNK", 100)
        rank.score(1)
        assert rank.calls == ["rows_to_score", *["refresh"] * 3, "refresh_done"]

    @pytest.mark.parametrize("replay", ["all", "new"])
    def test_a_batch_is_read_once_and_in_one_call(self, rank, replay, opened):
        """All batches so far were read in every round, even where the newest alone was trained on."""
        rank.config = make_config(student={"start": "warm", "replay": replay})
        files = []
        for k in range(4):
            files.append(round_file(k, BATCH))
            columns = [[k], [f"text {k}"], [0], list_column(np.ones((1, 3)) / 3), [1.0]]
            rank.store.write_table(files[-1], pa.table(columns, schema=tables.ROUND))
            rank.train(k, list(files))
        assert opened["read_table"] == 4
        assert rank.calls == ["target_prior"] * 4
        numbers = [[k] if replay == "new" else list(range(k + 1)) for k in range(4)]
        assert rank.trained_on == [[f"text {i}" for i in of_round] for of_round in numbers]
