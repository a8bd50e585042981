"""Which labels people are asked about, and what their answers are worth."""

from __future__ import annotations

import numpy as np
import pytest

from llkd_ray.audit.job import (
    DISAGREE,
    RANDOM,
    UNSURE,
    SampleSizes,
    choose,
    describe,
    estimate,
    random_order,
    share,
)
from llkd_ray.metrics.uncertainty import normalise


@pytest.fixture
def opinions() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    row_N = np.sort(rng.choice(5000, 400, replace=False))
    return row_N, *(normalise(np.exp(rng.normal(0, 2, (400, 3)))) for _ in range(2))


def test_each_kind_is_what_it_says(opinions):
    row_N, teacher_NC, student_NC = opinions
    place_M, why_M, is_random_N = choose(
        row_N, teacher_NC, student_NC, np.zeros(400, dtype=bool), SampleSizes(40, 20, 10), seed=3
    )
    assert len(set(place_M.tolist())) == len(place_M) == 70
    of = {kind: place_M[[why == kind for why in why_M]] for kind in (RANDOM, DISAGREE, UNSURE)}
    assert [len(of[kind]) for kind in of] == [40, 20, 10]
    np.testing.assert_array_equal(np.sort(of[RANDOM]), np.flatnonzero(is_random_N))

    differ_N = teacher_NC.argmax(axis=1) != student_NC.argmax(axis=1)
    sure_N = teacher_NC.max(axis=1) * student_NC.max(axis=1)
    assert differ_N[of[DISAGREE]].all()
    left_N = differ_N & ~is_random_N
    left_N[of[DISAGREE]] = False
    assert sure_N[of[DISAGREE]].min() >= sure_N[left_N].max()
    first, second = np.sort(student_NC, axis=1)[:, [-1, -2]].T
    others = np.setdiff1d(np.arange(400), place_M)
    assert (first - second)[of[UNSURE]].max() <= (first - second)[others].min()
    assert list(place_M) != sorted(place_M), "kinds and rows come mixed"


def test_a_larger_sample_goes_on_where_the_smaller_one_ended(opinions):
    row_N, teacher_NC, student_NC = opinions
    none = np.zeros(400, dtype=bool)
    small, _, is_small_N = choose(row_N, teacher_NC, student_NC, none, SampleSizes(30, 0, 0), seed=1)
    answered = none.copy()
    answered[small] = True
    more, _, is_large_N = choose(row_N, teacher_NC, student_NC, answered, SampleSizes(50, 0, 0), seed=1)
    assert not set(small.tolist()) & set(more.tolist())
    assert set(np.flatnonzero(is_large_N)) == set(small.tolist()) | set(more.tolist())
    assert (is_small_N <= is_large_N).all()


def test_the_sample_depends_on_rows_and_seed_alone():
    row_N = np.arange(1000)
    some_M = row_N[::7]
    of_all = row_N[random_order(row_N, 5)]
    np.testing.assert_array_equal(some_M[random_order(some_M, 5)], of_all[np.isin(of_all, some_M)])
    assert not np.array_equal(random_order(row_N, 5), random_order(row_N, 6))


def test_only_the_random_sample_counts():
    row_M = np.arange(8)
    is_random_M = np.array([1, 1, 1, 1, 0, 0, 0, 0], dtype=bool)
    teacher_M = np.zeros(8, dtype=int)
    student_M = np.array([0, 1, 0, 0, 1, 1, 1, 1])
    why_M = [RANDOM] * 4 + [DISAGREE] * 4
    answers = {0: 0, 1: 1, 2: 0, 4: 1, 5: 1}  # of the sample, row 3 has none
    trained_M = np.array([1, 0, 0, 0, 0, 0, 0, 0], dtype=bool)
    of_both = teacher_M, student_M
    found = estimate(answers, row_M, is_random_M, *of_both, why_M, trained_M, 900, labelled_since=70)
    right = {"pseudo_labels": (2, 3), "trained_on": (1, 1), "student": (2, 2)}
    assert {name: (found[name]["right"], found[name]["texts"]) for name in right} == right
    assert found["asked_for"][DISAGREE] == {"texts": 2, "right": 0}
    assert (found["answered"], found["unanswered_in_sample"], found["sample"]) == (5, 1, 4)
    said = "\n".join(describe(found))
    assert "70 texts were labelled after the sample was drawn" in said
    missing = "1 of the random sample's 4 texts have no answer"
    assert all(words in said for words in ("2 of 3 right", "for 900 labelled texts without bias", missing))
    assert share(0, 0) == {"texts": 0, "right": 0, "share": None, "interval": [None, None]}
    # The interval is Clopper's and Pearson's.
    assert share(45, 50)["interval"] == pytest.approx([0.7819, 0.9667], abs=1e-4)
