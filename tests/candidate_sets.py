"""Candidates for tests of policies and of the search, and scores of a student."""

from __future__ import annotations

import numpy as np

from llkd_ray.metrics.uncertainty import StudentScores
from llkd_ray.selection.table import Candidates, ScoreTable


def make_candidates(n: int, seed: int = 0, n_classes: int = 4, scored: float = 1.0) -> Candidates:
    rng = np.random.default_rng(seed)
    signals = rng.uniform(size=(3, n))
    signals[:, rng.uniform(size=n) >= scored] = np.nan
    return Candidates(
        row_N=np.sort(rng.choice(10 * n + 1, n, replace=False)),
        label_N=rng.integers(0, n_classes, n).astype(np.int16),
        confidence_N=rng.uniform(1 / n_classes, 1, n).astype(np.float32),
        uncertainty_N=signals[0].astype(np.float32),
        margin_N=signals[1].astype(np.float16),
        support_N=signals[2].astype(np.float16),
        n_classes=n_classes,
    )


def refresh(table: ScoreTable, k: int, row_M: np.ndarray, p_MC: np.ndarray) -> None:
    """Note a student's answers on rows with the labels that they have."""
    table.refresh(k, row_M, StudentScores.of(p_MC, table.label[row_M]))
