"""Records of single rounds, classes and texts, read from a run's files and reduced to what fits on a page.

An unfinished run lacks some of these files; the corresponding records are empty.

Legend: N texts of a candidate sample, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from llkd_ray.evaluation.run_record import RunRecord
from llkd_ray.metrics.uncertainty import Floats, Ints
from llkd_ray.storage.run_dir import (
    CANDIDATE_SAMPLE,
    INSIGHT,
    QUARANTINE_DIR,
    SELECTED,
    RunStore,
    round_file,
)

POINTS = 1_600
"""Texts in the scatter plots, over all rounds."""
PANELS = 6
"""Maximum number of rounds with a scatter plot: the first, the last, and some in between."""
PER_REASON = 2
"""Quarantined rows shown for each reason."""
QUARANTINE_FILES = 20
"""Maximum number of quarantine files read."""


class CandidateSample(NamedTuple):
    """A sample of the texts that a round could select."""

    round_number: int
    label_N: Ints
    confidence_N: Floats
    uncertainty_N: Floats
    """nan if the student had not scored the text."""
    selected_N: np.ndarray


class Balance(NamedTuple):
    """A class's shares; None if unknown."""

    label: str
    pool: float | None
    """By gold."""
    labelled: float | None
    trained: float | None


@dataclass(frozen=True)
class RoundRecords:
    """What the report shows of single rounds, classes and texts."""

    samples: list[CandidateSample]
    thresholds: list[tuple[int, dict[str, list[float]]]]
    """Round number, and the threshold of each class by signal."""
    balance: list[Balance]
    confusion_CC: Ints | None
    """Test texts by true class (row) and predicted class (column)."""
    reliability: list[dict[str, Any]]
    useful: list[dict[str, Any]]
    doubtful: list[dict[str, Any]]
    disagreements: list[dict[str, Any]]
    quarantined: list[dict[str, Any]]

    def mistakes(self, at_most: int) -> list[tuple[int, int, int]]:
        """True class, predicted class and count of the most frequent mistakes."""
        if self.confusion_CC is None:
            return []
        wrong_CC = self.confusion_CC * (1 - np.eye(len(self.confusion_CC), dtype=np.int64))
        order = np.argsort(-wrong_CC, axis=None, kind="stable")[:at_most]
        pairs = zip(*np.unravel_index(order, wrong_CC.shape), strict=True)
        return [(int(g), int(a), int(wrong_CC[g, a])) for g, a in pairs if wrong_CC[g, a]]


def read_round_records(store: RunStore, record: RunRecord) -> RoundRecords:
    """Read candidate samples, selections, INSIGHT and quarantine of a run."""
    done = [line["round"] for line in record.rounds]
    selections = [(k, store.read_json(round_file(k, SELECTED))) for k in done]
    insight = store.read_json(INSIGHT) if store.exists(INSIGHT) else {}
    return RoundRecords(
        samples=_read_candidate_samples(store, done),
        thresholds=[(k, one["thresholds"]) for k, one in selections if one["thresholds"]],
        balance=_balance(record, selections[-1][1] if selections else {}, insight),
        confusion_CC=_confusion(insight.get("confusion"), len(record.labels)),
        reliability=insight.get("reliability") or [],
        useful=insight.get("useful") or [],
        doubtful=insight.get("doubtful") or [],
        disagreements=insight.get("disagreements") or [],
        quarantined=_read_quarantined(store),
    )


def _read_candidate_samples(store: RunStore, rounds: list[int]) -> list[CandidateSample]:
    spread = np.unique(np.linspace(0, len(rounds) - 1, min(PANELS, len(rounds))).round().astype(int))
    return [_thin(rounds[i], store.read_table(round_file(rounds[i], CANDIDATE_SAMPLE))) for i in spread]


def _thin(round_number: int, table: pa.Table) -> CandidateSample:
    """Half of a plot's points are selected texts; these come last, so that they are drawn on top."""
    selected_N = table["selected"].to_numpy()
    kept = []
    for part in (np.flatnonzero(~selected_N), np.flatnonzero(selected_N)):
        n = min(POINTS // PANELS // 2, part.size)
        kept.append(part[np.linspace(0, part.size - 1, n).round().astype(int)])
    slim = table.take(pa.array(np.concatenate(kept)))
    columns = (slim[name].to_numpy() for name in ("label", "confidence", "uncertainty", "selected"))
    return CandidateSample(round_number, *columns)


def _balance(record: RunRecord, selection: dict[str, Any], insight: dict[str, Any]) -> list[Balance]:
    counts = (
        insight.get("pool_gold"),
        selection.get("labelled_of_class"),
        [one.texts for one in record.selected],
    )
    shares = [
        [None] * len(record.labels) if not count or not sum(count) else [n / sum(count) for n in count]
        for count in counts
    ]
    return [Balance(*one) for one in zip(record.labels, *shares, strict=True)]


def _confusion(pairs: list[list[int]] | None, n_classes: int) -> Ints | None:
    if not pairs:
        return None
    found_CC = np.zeros((n_classes, n_classes), dtype=np.int64)
    gold, predicted, times = np.array(pairs).T
    found_CC[gold, predicted] = times
    return found_CC


def _read_quarantined(store: RunStore) -> list[dict[str, Any]]:
    """Some rows for each reason, from the first files."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in store.names(QUARANTINE_DIR, ".parquet")[:QUARANTINE_FILES]:
        table = store.read_table(f"{QUARANTINE_DIR}/{name}")
        reason_N = table["reason"].to_numpy(zero_copy_only=False)
        for reason in np.unique(reason_N.astype(str)):
            rows = found.setdefault(reason, [])
            wanted = np.flatnonzero(reason_N == reason)[: PER_REASON - len(rows)]
            rows += table.take(pa.array(wanted)).to_pylist()
    return [row for _, rows in sorted(found.items()) for row in rows]


class Baseline(NamedTuple):
    """Another run, which this run is compared with."""

    name: str
    rounds: list[dict[str, Any]]
    """Its metrics."""


def read_baseline(store: RunStore) -> Baseline:
    """Read the metrics of the run in a directory."""
    return Baseline(store.root.rpartition("/")[2], store.read_metrics())
