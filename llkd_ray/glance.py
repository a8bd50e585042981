"""A look at what a round could choose from, for people: a sample that is small however large the pool.

The report draws it. Nothing else reads it, so a run without it goes on as well.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from llkd_ray import schemas
from llkd_ray.signals import Ints
from llkd_ray.table import ScoreTable

GLANCE = "glance.parquet"
"""In a round's folder."""
AT_MOST = 1_000
"""Texts that were selected, and about as many that were not."""


def take_glance(table: ScoreTable, tickets_below: int, candidates: int, chosen_M: Ints) -> pa.Table:
    """GLANCE of a round, from the table as it is before the round's texts are marked as trained on.

    ``candidates`` is how many there are. The sample is every so-manieth row, so that no chance is used up.
    """
    chosen_M = np.asarray(chosen_M, dtype=np.int64)
    spread = np.linspace(0, chosen_M.size - 1, min(AT_MOST, chosen_M.size)).round().astype(np.int64)
    seen = table.glance(tickets_below, step=max(1, candidates // AT_MOST))
    others = seen.take(np.flatnonzero(~np.isin(seen.row_N, chosen_M)))
    parts = [(table.look_up(chosen_M[spread]), True), (others, False)]
    columns = [
        np.concatenate([getattr(part, name) for part, _ in parts])
        for name in ("row_N", "label_N", "confidence_N", "uncertainty_N", "support_N")
    ]
    columns.append(np.concatenate([np.full(len(part), is_chosen) for part, is_chosen in parts]))
    arrays = [pa.array(x, field.type) for x, field in zip(columns, schemas.GLANCE, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schemas.GLANCE)
