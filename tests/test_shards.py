"""Shards choose what one table would choose, bit for bit, whatever the borders between them."""

from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_table import copy_of, fill

from llkd_ray import chunks
from llkd_ray.acquisition import ACQUISITION
from llkd_ray.policies import SELECTION
from llkd_ray.shards import Shard, choose_from_shards, read_from_shards
from llkd_ray.table import ScoreTable

N_CLASSES = 3


def make_table(n: int, seed: int, scored: bool) -> ScoreTable:
    table = ScoreTable(N_CLASSES, n)
    fill(table, seed)
    if not scored:
        blank = copy_of(ScoreTable(N_CLASSES, n))
        of_student = {name: blank[name] for name in ("uncertainty", "margin", "support", "refreshed")}
        table.restore(copy_of(table) | of_student)
    return table


def divide(table: ScoreTable, borders: list[int]) -> list[Shard]:
    """Row ranges of a table; some may be empty."""
    edges = sorted([0, len(table), *(min(border, len(table)) for border in borders)])
    shards = []
    for start, stop in pairwise(edges):
        part = ScoreTable(table.n_classes, stop - start)
        part.restore({name: column[start:stop] for name, column in copy_of(table).items()})
        shards.append(Shard(part, start))
    return shards


tables = st.builds(make_table, st.integers(0, 120), st.integers(0, 999), st.booleans())
borders = st.lists(st.integers(0, 120), max_size=5)


@pytest.mark.parametrize("name", sorted(SELECTION))
@settings(max_examples=40)
@given(
    table=tables,
    borders=borders,
    order=st.randoms(use_true_random=False),
    n=st.integers(0, 60),
    seed=st.integers(0, 99),
    quota=st.sampled_from([None, "off", 0.0, 0.5]),
    trained=st.one_of(st.none(), st.lists(st.integers(0, 30), min_size=N_CLASSES, max_size=N_CLASSES)),
    options=st.sampled_from([{}, {"thresholds": "global"}, {"order": "product"}]),
)
def test_the_same_selection(name, table, borders, order, n, seed, quota, trained, options):
    policy = SELECTION[name]
    how = {
        "quota": quota,
        "trained_C": None if trained is None else np.array(trained),
        "options": options if name == "llkd" else {},
    }
    one = policy.choose(table.candidates(2), n, np.random.default_rng(seed), **how)
    shards = divide(table, borders)
    order.shuffle(shards)
    several = choose_from_shards(shards, policy, n, np.random.default_rng(seed), tickets_below=2, **how)
    np.testing.assert_array_equal(several.row_M, one.row_M)
    np.testing.assert_array_equal(several.weight_M, one.weight_M)


@pytest.mark.parametrize("name", sorted(ACQUISITION))
@settings(max_examples=40)
@given(
    table=tables,
    borders=borders,
    order=st.randoms(use_true_random=False),
    n=st.integers(0, 60),
    seed=st.integers(0, 99),
    explore=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_the_same_texts_are_read(name, table, borders, order, n, seed, explore):
    policy, how = ACQUISITION[name], {"seed": seed, "explore": explore}
    one = policy.choose(table.unread(), n, np.random.default_rng(seed), **how)
    shards = divide(table, borders)
    order.shuffle(shards)
    several = read_from_shards(shards, policy, n, np.random.default_rng(seed), **how)
    np.testing.assert_array_equal(several, one)


@pytest.mark.parametrize("name", sorted(SELECTION))
def test_the_same_selection_where_a_shard_has_many_chunks(name, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 257)
    table, policy = make_table(20_000, 3, scored=True), SELECTION[name]
    one = policy.choose(table.candidates(2), 500, np.random.default_rng(0), quota=0.5)
    assert len(one) == 500
    shards = divide(table, [1_000, 1_001, 13_333])
    several = choose_from_shards(shards, policy, 500, np.random.default_rng(0), tickets_below=2, quota=0.5)
    np.testing.assert_array_equal(several.row_M, one.row_M)
    np.testing.assert_array_equal(several.weight_M, one.weight_M)


@pytest.mark.parametrize("name", sorted(SELECTION))
def test_what_is_sent_is_small_and_can_be_sent(name):
    table, policy = make_table(50_000, 3, scored=True), SELECTION[name]
    shard = divide(table, [])[0]
    survey = pickle.loads(pickle.dumps(shard.survey(policy, 2)))
    search = pickle.loads(pickle.dumps(policy.search(survey, 100, np.random.default_rng(0))))
    found = pickle.dumps(shard.find(search, 2))
    assert len(found) < 200 * 4 * 8 + 1_000, "twice the wanted texts, four numbers each"
    grades = N_CLASSES * 49_153 * 8 if policy.ranks else 0
    assert len(pickle.dumps(survey)) < grades + 1_000
