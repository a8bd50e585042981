"""Signals of a label distribution, and random numbers of a row and a key."""

from __future__ import annotations

import numpy as np
import pytest

from llkd_ray.metrics import uncertainty
from llkd_ray.metrics.uncertainty import RowRandom, StudentScores, hash_uniform


def test_normalise_divides_by_the_mass_on_labels():
    np.testing.assert_allclose(
        uncertainty.normalise(np.array([[0.2, 0.6], [1.0, 1.0]])), [[0.25, 0.75], [0.5, 0.5]]
    )


def test_normalise_gives_uniform_where_no_label_has_mass():
    np.testing.assert_allclose(uncertainty.normalise(np.zeros((1, 4))), np.full((1, 4), 0.25))


def test_confidence_is_the_largest_probability():
    np.testing.assert_allclose(uncertainty.confidence(np.array([[0.2, 0.7, 0.1]])), [0.7])


@pytest.mark.parametrize("n_classes", [2, 5, 77])
def test_entropy_is_zero_when_certain_and_one_when_uniform(n_classes):
    certain = np.eye(n_classes)[:1]
    uniform = np.full((1, n_classes), 1 / n_classes)
    assert uncertainty.entropy(certain)[0] == 0.0
    assert uncertainty.entropy(uniform)[0] == pytest.approx(1.0)


def test_entropy_of_two_classes_in_bits():
    p = np.array([[0.25, 0.75]])
    assert uncertainty.entropy(p)[0] == pytest.approx(-(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75)))


def test_margin_is_the_best_less_the_second():
    p = np.array([[0.2, 0.7, 0.1], [0.5, 0.0, 0.5], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(uncertainty.margin(p), [0.5, 0.0, 1.0])


def test_support_is_what_one_model_gives_to_anothers_label():
    p = np.array([[0.2, 0.7, 0.1], [0.6, 0.3, 0.1]])
    np.testing.assert_allclose(uncertainty.support(p, np.array([2, 0])), [0.1, 0.6])


def test_scores_are_the_three_signals_and_support_needs_a_label():
    p_MC, label_M = np.array([[0.2, 0.7, 0.1], [0.6, 0.3, 0.1]]), np.array([2, -1])
    scores = StudentScores.of(p_MC, label_M)
    np.testing.assert_array_equal(scores.uncertainty_M, uncertainty.entropy(p_MC))
    np.testing.assert_array_equal(scores.margin_M, uncertainty.margin(p_MC))
    np.testing.assert_array_equal(scores.support_M, [0.1, np.nan])
    assert scores.take(np.array([1])).label_M.tolist() == [-1]


def test_a_generator_gives_another_draw_each_time():
    rng = np.random.default_rng(0)
    one, other = RowRandom.from_rng(rng), RowRandom.from_rng(rng)
    rows = np.arange(5)
    assert not np.array_equal(one(rows), other(rows))
    np.testing.assert_array_equal(RowRandom.from_rng(np.random.default_rng(0))(rows), one(rows))
    np.testing.assert_array_equal(one(rows[3:]), one(rows)[3:])


class TestHashUniform:
    @pytest.mark.parametrize("seed", [0, 1, 12345, 2**63])
    def test_is_uniform(self, seed):
        n, bins = 100_000, 100
        u = hash_uniform(seed, np.arange(n))
        assert (u >= 0).all()
        assert (u < 1).all()
        assert u.mean() == pytest.approx(0.5, abs=4 * np.sqrt(1 / 12 / n))
        expected = n / bins
        chi_square = ((np.histogram(u, bins, (0, 1))[0] - expected) ** 2 / expected).sum()
        assert 54 < chi_square < 160, "99 degrees of freedom: beyond these one time in ten thousand"

    def test_neighbours_and_seeds_have_nothing_to_do_with_each_other(self):
        n = 50_000
        u = hash_uniform(0, np.arange(n))
        pairs = {
            "next row": (u[:-1], u[1:]),
            "next seed": (u, hash_uniform(1, np.arange(n))),
            "far row": (u, hash_uniform(0, np.arange(n) + 2**40)),
        }
        for name, (one, other) in pairs.items():
            assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(n), name

    def test_depends_on_seed_and_row_alone(self):
        rows = np.array([7, 0, 123456789])
        np.testing.assert_array_equal(hash_uniform(3, rows)[::-1], hash_uniform(3, rows[::-1]))
        np.testing.assert_array_equal(hash_uniform(3, rows), hash_uniform(3, rows.astype(np.int32)))

    def test_stays_what_it_is(self):
        # A run that goes on after an update must decide as before.
        assert hash_uniform(0, np.array([0]))[0] == pytest.approx(0.883311, abs=1e-6)
