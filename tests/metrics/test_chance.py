"""Numbers of a row and a key, that look random."""

from __future__ import annotations

import numpy as np
import pytest

from llkd_ray.metrics.uncertainty import RowRandom, hash_uniform


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
