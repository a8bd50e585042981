"""ROUND: what the student trains on in a round, with the teacher's answers as they were calibrated.

Shapes in names: M texts of the round, C labels.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from llkd_ray import schemas
from llkd_ray.confidence import Calibrator
from llkd_ray.policies import Selection
from llkd_ray.store import Examples, RunStore, list_column, matrix_of, read_labels
from llkd_ray.table import ScoreTable


def batch_of(
    chosen: Selection,
    store: RunStore,
    examples: Examples,
    table: ScoreTable,
    reviews: Iterable[int],
    calibrator: Calibrator,
) -> pa.Table:
    """ROUND of the chosen texts; ``reviews`` are the tickets that have looked at labels again so far."""
    row_M = np.asarray(chosen.row_M, dtype=np.int64)
    texts = examples.read(row_M, ["text"])["text"]
    # Reviews come last, and of several answers to a row the last counts.
    labels = read_labels(store, [*np.unique(table.ticket[row_M]).tolist(), *reviews])
    by_row = np.argsort(labels["row"].to_numpy(), kind="stable")
    place_M = by_row[np.searchsorted(labels["row"].to_numpy(), row_M, side="right", sorter=by_row) - 1]
    p_MC = calibrator.apply(matrix_of(labels["probs"].take(pa.array(place_M)), table.n_classes))
    columns = [
        pa.array(row_M),
        texts,
        pa.array(table.label[row_M]),
        list_column(p_MC),
        pa.array(np.asarray(chosen.weight_M, dtype=np.float32)),
    ]
    return pa.Table.from_arrays(columns, schema=schemas.ROUND)
