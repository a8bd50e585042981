"""Numbers in 16 bits, and sums that no order changes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llkd_ray.selection import table
from llkd_ray.selection.table import UNIT, class_sums, from_16_bits, to_16_bits


@given(st.lists(st.floats(0, 1), min_size=1))
def test_a_share_comes_back_to_half_a_step(shares):
    back = from_16_bits(to_16_bits(np.array(shares)))
    assert back.dtype == np.float32
    # The second term is what float32 adds.
    np.testing.assert_allclose(back, shares, atol=1 / 131_068 + 2**-24, rtol=0)


def test_every_code_comes_back():
    codes = np.arange(65_536, dtype=np.uint16)
    np.testing.assert_array_equal(to_16_bits(from_16_bits(codes)), codes)


def test_unknown_stays_unknown_and_the_ends_are_exact():
    back = from_16_bits(to_16_bits(np.array([np.nan, 0.0, 1.0])))
    np.testing.assert_array_equal(back, [np.nan, 0.0, 1.0])


def test_nobody_is_warned_of_the_unknown():
    with np.errstate(all="raise"):
        assert to_16_bits(np.array([np.nan, 0.5])).size == 2


@given(
    texts=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 2)), max_size=40),
    order=st.randoms(use_true_random=False),
    border=st.integers(0, 40),
)
def test_sums_do_not_depend_on_order_or_parts(texts, order, border):
    def of(some):
        signal, label = np.array([s for s, _ in some]), np.array([c for _, c in some], dtype=np.int16)
        return class_sums(signal, label, 3)

    whole = of(texts)
    np.testing.assert_array_equal(of(texts[:border]) + of(texts[border:]), whole)
    order.shuffle(texts)
    np.testing.assert_array_equal(of(texts), whole)


def test_what_is_no_whole_number_of_units_is_rounded_before_it_is_added():
    tenths, label = np.full(10, 0.1), np.zeros(10, dtype=np.int16)
    parts = sum(class_sums(tenths[:1], label[:1], 1) for _ in range(10))
    assert class_sums(tenths, label, 1) == parts


def test_sums_of_several_chunks(monkeypatch):
    monkeypatch.setattr(table, "CHUNK", 10)
    rng = np.random.default_rng(0)
    signal, label = rng.uniform(0.01, 1, 95).astype(np.float32), rng.integers(0, 3, 95)
    # Such a float32 is a whole number of units, so its sum is exact.
    exact = [int(sum(int(s / UNIT) for s in signal[label == c].tolist())) for c in range(3)]
    assert class_sums(signal, label, 3).tolist() == exact


def test_the_largest_chunk_is_added_up_exactly():
    ones = np.ones(table.CHUNK)
    ones[0] = UNIT
    total = class_sums(ones, np.zeros(ones.size, dtype=np.int16), 1)
    assert total.tolist() == [(table.CHUNK - 1) * 2**32 + 1]


@pytest.mark.parametrize("n_classes", [1, 5])
def test_sums_of_nothing(n_classes):
    assert class_sums(np.empty(0), np.empty(0, dtype=np.int16), n_classes).tolist() == [0] * n_classes
