"""Rows in chunks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llkd_ray.selection import table
from llkd_ray.selection.table import Chunked, slices


@given(n=st.integers(0, 200), chunk=st.integers(1, 50))
def test_slices_cover_every_row_once_and_in_order(n, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "CHUNK", chunk)
        parts = list(slices(n))
    assert np.concatenate([np.arange(n)[part] for part in parts]).tolist() == list(range(n))
    assert all(0 < part.stop - part.start <= chunk for part in parts) or parts == [slice(0, 0)]


def test_what_is_chunked_can_be_gone_through_again():
    chunked = Chunked(lambda: iter([[1, 2], [], [3]]))
    assert list(chunked) == list(chunked) == [[1, 2], [], [3]]
    assert len(chunked) == 3
