"""What work costs in counts that no machine changes, so that nobody makes it dearer unawares.

Engines' starts are counted in cluster/test_vllm.py, an object store's requests in cluster/test_s3.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pytest
from fake_teacher import FakeLabeller
from test_teacher import FakeSelector, leased, pass_through
from toys import make_config, make_run

from llkd_ray.config import StudentConfig
from llkd_ray.store import Examples, RunStore
from llkd_ray.student import by_length, plan_steps
from llkd_ray.teacher import Leaser, OnlyStage

LENGTHS = np.clip(np.random.default_rng(0).lognormal(np.log(40), 0.9, 4_000), 3, 128).astype(np.int64)
"""Tokens of each text, as long texts are cut."""


def padded(batches: Iterable[np.ndarray]) -> float:
    """Tokens with padding per token without."""
    places = list(batches)
    assert np.array_equal(np.sort(np.concatenate(places)), np.arange(LENGTHS.size)), "every text once"
    return sum(int(LENGTHS[index_B].max()) * index_B.size for index_B in places) / int(LENGTHS.sum())


class TestPadding:
    def test_as_texts_come_it_would_be_more_than_half(self):
        assert padded(np.array_split(np.arange(LENGTHS.size), LENGTHS.size // 32)) > 2.4

    @pytest.mark.parametrize("size", [16, 32, 64])
    @pytest.mark.parametrize("ranks", [1, 2])
    def test_in_training(self, size, ranks):
        config = StudentConfig(model="none", batch_size=size)
        steps = [
            step.index_B
            for rank in range(ranks)
            for step in plan_steps(LENGTHS, config, rank, ranks, np.random.default_rng(1))
        ]
        assert padded(steps) <= 1.08

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
        calls, asked = self.label(tmp_path, rows, opened)
        assert asked == [list(range(rows))], "every text once, all of them together"
        assert calls == {"put_labels": 1}
        assert opened["writing"] == 2
        assert opened["read_table"] + opened["read_bytes"] == 0

    def test_under_a_cap_the_selector_is_asked_in_growing_blocks(self, tmp_path, opened):
        calls, _ = self.label(tmp_path, ROWS, opened, budget={"cap": {"tokens": 10**6}})
        assert calls["put_labels"] == 1
        assert 1 <= calls["reserve"] <= 2 * (1 + np.log2(ROWS)), "for texts, and for tokens"

    def label(self, tmp_path, rows, opened, **sections):
        store = make_run(tmp_path / "run", 200, 30)
        selector, labeller = FakeSelector(), FakeLabeller()
        stage = OnlyStage(make_config(**sections), store.root, selector, labeller)
        opened.clear()
        pass_through(stage, leased(3, list(range(rows))))
        return Counter(name for name, _ in selector.calls), labeller.asked
