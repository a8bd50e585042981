"""Intervals hold what they promise; bills and caps add up."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from llkd_ray.config.schema import CapConfig
from llkd_ray.config.teacher import PriceConfig
from llkd_ray.run import estimate
from llkd_ray.run.estimate import (
    NOTHING,
    UTILISATION,
    Bill,
    Estimate,
    bill,
    count_weights,
    hours,
    matmul_flops,
    mean,
    tokens_per_s,
    what_caps_do,
)
from llkd_ray.teacher.footprint import RequestCounts, requests_by_trie, requests_by_votes
from llkd_ray.teacher.label_trie import LabelTrie

exactly = Estimate.exactly


class TestMean:
    def test_a_sample_of_everything_leaves_no_doubt_and_one_value_has_bounds_alone(self):
        assert mean(np.array([1.0, 2.0, 6.0]), population=3, taken=3) == exactly(3.0)
        assert mean(np.array([5.0]), 10, 10, most=40) == Estimate(0.0, 5.0, 40.0)
        assert mean(np.array([5.0]), 1, 1, most=40) == exactly(5.0)

    def test_it_is_the_textbook_interval_for_a_large_population(self):
        value_N = np.arange(100.0)
        found = mean(value_N, math.inf, math.inf)
        half = 1.96 * value_N.std(ddof=1) / 10
        assert (found.low, found.middle, found.high) == pytest.approx((49.5 - half, 49.5, 49.5 + half))

    @pytest.mark.parametrize(("population", "taken"), [(400, 400), (5000, 5000), (5000, 300)])
    def test_nineteen_of_twenty_intervals_hold_the_truth(self, population, taken):
        rng = np.random.default_rng(0)
        hits = 0
        for _ in range(400):
            value = rng.gamma(4.0, 20.0, population)
            truth = rng.choice(value, taken, replace=False).mean()
            found = mean(rng.choice(value, 200, replace=False), population, taken)
            hits += found.low <= truth <= found.high
        assert 0.92 <= hits / 400 <= 0.98

    @given(values=st.lists(st.integers(0, 50), min_size=1, max_size=30), more=st.integers(0, 10**6))
    def test_it_is_always_in_order_and_within_bounds(self, values, more):
        n = len(values)
        found = mean(np.array(values, dtype=float), n + more, n + more, most=50)
        assert 0 <= found.low <= found.middle <= found.high <= 50 + 1e-9


class TestWords:
    @pytest.mark.parametrize(
        ("found", "words"),
        [
            (exactly(1234.4), "1,234"),
            (Estimate(1100, 1200, 1300), "1,200 (1,100 to 1,300)"),
            (Estimate.between(0, 1300), "0 to 1,300"),
            (Estimate(1.1, 1.2, 1.3), "1"),
        ],
    )
    def test_they_say_no_more_than_is_known(self, found, words):
        assert found.words() == words

    def test_an_unknown_factor_leaves_no_middle(self):
        assert Estimate(10, 11, 12).times(2) == Estimate(20, 22, 24)
        assert Estimate(10, 11, 12).times(2, 3) == Estimate(20, None, 36)
        assert (Estimate(1, 2, 3) + Estimate.between(0, 4)) == Estimate(1, None, 7)


@pytest.mark.parametrize(
    ("labels", "requests"),
    [
        ([(1,), (2,), (3,)], RequestCounts((1, 1), (0, 0), (1, 1))),
        # Every branch may be followed: from nothing to 1, 2; from 1 (a label, too) to 3, 4; from 1, 4 to 5.
        ([(1,), (2,), (1, 3), (1, 4, 5)], RequestCounts((1, 3), (0, 3), (1, 3))),
        # More first tokens than one request may name.
        ([(token,) for token in range(300)], RequestCounts((3, 3), (0, 0), (3, 3))),
    ],
)
def test_requests_by_trie(labels, requests):
    assert requests_by_trie(LabelTrie.of(labels)) == requests
    assert requests.is_known == (requests.prompts[0] == requests.prompts[1])


def test_requests_by_votes_and_not_knowing_which():
    votes = requests_by_votes(10, longest_answer=3, prompts=10)
    assert votes == RequestCounts((1, 10), (0, 0), (10, 30))
    either = requests_by_votes(10, 3) | requests_by_trie(LabelTrie.of([(1,), (2,)]))
    assert either == RequestCounts((1, 1), (0, 0), (1, 30))


class TestBill:
    def test_by_hand(self):
        price = PriceConfig(input=2.0, cached=0.5, output=10.0)
        found = bill(exactly(1000), exactly(50_000), RequestCounts((1, 3), (0, 4), (1, 3)), price)
        assert found.prompt_tokens == Estimate(50_000, None, 154_000)
        assert found.answer_tokens == Estimate(1000, None, 3000)
        assert found.cost.low == pytest.approx(0.1 + 0.01)
        assert found.cost.high == pytest.approx(0.1 + 104_000 * 0.5e-6 + 0.03)
        assert found.tokens == Estimate(51_000, None, 157_000)

    def test_any_part_of_it_and_hours(self):
        whole = Bill(exactly(9), exactly(90), exactly(9), exactly(1.0)).from_none_up()
        assert (whole.texts, whole.cost) == (Estimate.between(0, 9), Estimate.between(0, 1.0))
        assert hours(Estimate(3600, 7200, 10_800), 2, 2) == Estimate(0.5, 1.0, 1.5)
        assert hours(exactly(7200), 1, 2) == Estimate(1.0, None, 2.0)


WHOLE = Bill(exactly(100), Estimate(9000, 9500, 10_000), exactly(100), Estimate.between(1.0, 2.0))
NONE_NEEDED = Bill(NOTHING, NOTHING, NOTHING, NOTHING)


@pytest.mark.parametrize(
    ("cap", "need", "said"),
    [
        ({"texts": 100}, WHOLE, ["budget.cap.texts of 100 texts is enough for all labels"]),
        ({"texts": 40}, WHOLE, ["will end the run before all labels are had: after about 40.0% of them"]),
        ({"tokens": 10_100}, WHOLE, ["of 10,100 tokens is enough"]),
        ({"tokens": 9_600}, WHOLE, ["may end the run before all labels are had, after 95% of them"]),
        ({"tokens": 1}, WHOLE, ["will end the run before all labels are had: after about 0.0% of them"]),
        (
            {"cost": 0.5},
            WHOLE,
            ["of 0.5 EUR will end the run before all labels are had: after about 25.0% to"],
        ),
        ({"cost": 1.5}, WHOLE, ["may end"]),
        ({}, WHOLE, []),
        ({"texts": 1, "tokens": 1}, NONE_NEEDED, ["is enough", "is enough"]),
    ],
)
def test_what_a_cap_does(cap, need, said):
    lines = what_caps_do(CapConfig(**cap), need, "EUR")
    assert all(words in line for words, line in zip(said, lines, strict=True)), lines


# --- speed


def test_weights_are_those_that_work_on_every_token(tiny_llm):
    model = AutoModelForCausalLM.from_pretrained(tiny_llm)
    working = sum(one.numel() for one in model.model.layers.parameters()) + model.model.norm.weight.numel()
    assert count_weights(Path(tiny_llm)) == working


def test_what_is_no_checkpoint_here_has_no_guess(tmp_path):
    assert count_weights(tmp_path / "nothing") == count_weights(tmp_path) == 0
    assert tokens_per_s("org/model", "auto", on_gpu=False) is None
    assert tokens_per_s(str(tmp_path), "auto", on_gpu=False) is None


@pytest.mark.parametrize(("dtype", "kind"), [("float32", torch.float32), ("auto", torch.bfloat16)])
def test_the_guess_follows_the_machine_and_the_model(tiny_llm, monkeypatch, dtype, kind):
    measured = []

    def flops(device, kind):
        measured.append((device, kind))
        return 1e12

    monkeypatch.setattr(estimate, "matmul_flops", flops)
    found = tokens_per_s(tiny_llm, dtype, on_gpu=False)
    most = 1e12 / (2 * count_weights(Path(tiny_llm)))
    assert found == pytest.approx(tuple(share * most for share in UTILISATION))
    assert measured == [("cpu", kind)]


def test_products_are_measured_on_this_machine_only(tiny_llm, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tokens_per_s(tiny_llm, "auto", on_gpu=True) is None, "a GPU is not guessed from a CPU"
    clock = iter([0.0, 0.1, 0.2, 0.5])
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(estimate, "SIZE", 8)
    assert matmul_flops("cpu", torch.float32) == pytest.approx(2 * 8**3 * 2 / 0.5)
