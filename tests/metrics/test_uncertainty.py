"""Signals of a label distribution, and random numbers of a row and a key."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from llkd_ray.metrics import uncertainty
from llkd_ray.metrics.uncertainty import RowRandom, StudentScores, hash_uniform


def test_normalise_divides_by_the_mass_on_labels_and_gives_uniform_where_there_is_none():
    mass = np.array([[0.2, 0.6], [1.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(uncertainty.normalise(mass), [[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]])


@pytest.mark.parametrize("n_classes", [2, 5, 77])
def test_signals_of_distributions_certain_ones_and_uniform_ones_among_them(n_classes):
    drawn = np.random.default_rng(0).dirichlet(np.full(n_classes, 0.5), 50)
    p_MC = np.concatenate([np.eye(n_classes)[:1], np.full((1, n_classes), 1 / n_classes), drawn])
    label_M = np.arange(52) % (n_classes + 1) - 1
    scores, ranked_MC = StudentScores.of(p_MC, label_M), np.sort(p_MC, axis=1)
    np.testing.assert_allclose(uncertainty.confidence(p_MC), ranked_MC[:, -1])
    expected_M = scipy.stats.entropy(p_MC, axis=1) / np.log(n_classes)
    np.testing.assert_allclose(scores.uncertainty_M, expected_M, atol=1e-6)
    np.testing.assert_allclose(scores.margin_M, ranked_MC[:, -1] - ranked_MC[:, -2], atol=1e-6)
    expected_M = [np.nan if label < 0 else p_C[label] for p_C, label in zip(p_MC, label_M, strict=True)]
    np.testing.assert_allclose(scores.support_M, expected_M, atol=1e-6)
    assert scores.take(np.array([0, 2])).label_M.tolist() == label_M[[0, 2]].tolist()
    assert uncertainty.entropy(p_MC)[0] == 0.0


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

    def test_depends_on_seed_and_row_alone_and_stays_what_it_is(self):
        rows = np.array([7, 0, 123456789])
        np.testing.assert_array_equal(hash_uniform(3, rows)[::-1], hash_uniform(3, rows[::-1]))
        np.testing.assert_array_equal(hash_uniform(3, rows), hash_uniform(3, rows.astype(np.int32)))
        # A run that goes on after an update must decide as before.
        assert hash_uniform(0, np.array([0]))[0] == pytest.approx(0.883311, abs=1e-6)
