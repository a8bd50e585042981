"""What the files of a run say of single rounds, classes and texts, thinned to what a page can bear.

Runs of older versions lack some of these files; what they would tell is empty then.

Legend: N texts of a candidate_sample, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import yaml

from llkd_ray.evaluation.run_record import RunRecord
from llkd_ray.metrics.uncertainty import Floats, Ints
from llkd_ray.storage.run_dir import (
    CANDIDATE_SAMPLE,
    CONFIG,
    INSIGHT,
    QUARANTINE_DIR,
    SELECTED,
    RunStore,
    round_file,
)

POINTS = 1_600
"""Texts that the page draws, over all rounds."""
PANELS = 6
"""Rounds that are drawn: the first, the last, and some between."""
PER_REASON = 2
"""Rows of each reason for quarantine that are shown."""
QUARANTINE_FILES = 20
"""Files of quarantine that are looked into."""


class CandidateSample(NamedTuple):
    """Some of what a round could choose from."""

    round_number: int
    label_N: Ints
    confidence_N: Floats
    uncertainty_N: Floats
    """nan where the student had not looked."""
    selected_N: np.ndarray


class Balance(NamedTuple):
    """How a class stands, as shares of all; None where it is not known."""

    label: str
    pool: float | None
    """By gold."""
    labelled: float | None
    trained: float | None


@dataclass(frozen=True)
class RoundRecords:
    """All that the page says of single rounds, classes and texts."""

    glances: list[CandidateSample]
    thresholds: list[tuple[int, dict[str, list[float]]]]
    """Round, and by signal the threshold of each class."""
    balance: list[Balance]
    confusion_CC: Ints | None
    """Test texts by true class (row) and the student's answer (column)."""
    reliability: list[dict[str, Any]]
    useful: list[dict[str, Any]]
    doubtful: list[dict[str, Any]]
    disagreements: list[dict[str, Any]]
    quarantined: list[dict[str, Any]]

    def mistakes(self, at_most: int) -> list[tuple[int, int, int]]:
        """True class, answer and count of the most frequent mistakes."""
        if self.confusion_CC is None:
            return []
        wrong_CC = self.confusion_CC * (1 - np.eye(len(self.confusion_CC), dtype=np.int64))
        order = np.argsort(-wrong_CC, axis=None, kind="stable")[:at_most]
        pairs = zip(*np.unravel_index(order, wrong_CC.shape), strict=True)
        return [(int(g), int(a), int(wrong_CC[g, a])) for g, a in pairs if wrong_CC[g, a]]


def read_round_records(store: RunStore, run: RunRecord) -> RoundRecords:
    """Read glances, selections, INSIGHT and quarantine of a run."""
    done = [line["round"] for line in run.rounds]
    selections = [(k, store.read_json(file)) for k in done if store.exists(file := round_file(k, SELECTED))]
    insight = store.read_json(INSIGHT) if store.exists(INSIGHT) else {}
    return RoundRecords(
        glances=_candidate_samples(store, done),
        thresholds=[(k, facts["thresholds"]) for k, facts in selections if facts.get("thresholds")],
        balance=_balance(run, selections[-1][1] if selections else {}, insight),
        confusion_CC=_confusion(insight.get("confusion"), len(run.labels)),
        reliability=insight.get("reliability") or [],
        useful=insight.get("useful") or [],
        doubtful=insight.get("doubtful") or [],
        disagreements=insight.get("disagreements") or [],
        quarantined=_quarantined(store),
    )


def _candidate_samples(store: RunStore, rounds: list[int]) -> list[CandidateSample]:
    there = [k for k in rounds if store.exists(round_file(k, CANDIDATE_SAMPLE))]
    spread = np.unique(np.linspace(0, len(there) - 1, min(PANELS, len(there))).round().astype(int))
    return [
        _thinned(k, store.read_table(round_file(k, CANDIDATE_SAMPLE)))
        for k in np.array(there, dtype=int)[spread]
    ]


def _thinned(round_number: int, table: pa.Table) -> CandidateSample:
    """Half of a panel's points are for what was selected, which comes last and so on top."""
    selected_N = table["selected"].to_numpy()
    kept = []
    for part in (np.flatnonzero(~selected_N), np.flatnonzero(selected_N)):
        n = min(POINTS // PANELS // 2, part.size)
        kept.append(part[np.linspace(0, part.size - 1, n).round().astype(int)])
    slim = table.take(pa.array(np.concatenate(kept)))
    columns = (slim[name].to_numpy() for name in ("label", "confidence", "uncertainty", "selected"))
    return CandidateSample(int(round_number), *columns)


def _balance(run: RunRecord, selection: dict[str, Any], insight: dict[str, Any]) -> list[Balance]:
    counts = (
        insight.get("pool_gold"),
        selection.get("labelled_of_class"),
        [one.texts for one in run.selected],
    )
    shares = [
        [None] * len(run.labels) if not count or not sum(count) else [n / sum(count) for n in count]
        for count in counts
    ]
    return [Balance(*one) for one in zip(run.labels, *shares, strict=True)]


def _confusion(pairs: list[list[int]] | None, n_classes: int) -> Ints | None:
    if not pairs:
        return None
    found_CC = np.zeros((n_classes, n_classes), dtype=np.int64)
    gold, answer, times = np.array(pairs).T
    found_CC[gold, answer] = times
    return found_CC


def _quarantined(store: RunStore) -> list[dict[str, Any]]:
    """Some rows of each reason, from the first files."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in store.names(QUARANTINE_DIR, ".parquet")[:QUARANTINE_FILES]:
        table = store.read_table(f"{QUARANTINE_DIR}/{name}")
        reason_N = table["reason"].to_numpy(zero_copy_only=False)
        for reason in np.unique(reason_N.astype(str)):
            rows = found.setdefault(reason, [])
            wanted = np.flatnonzero(reason_N == reason)[: PER_REASON - len(rows)]
            rows += table.take(pa.array(wanted)).to_pylist()
    return [row for _, rows in sorted(found.items()) for row in rows]


BASELINE = "random"
SAME = ("corpus", "test", "labels", "teacher", "student", "budget", "evaluation")
"""Sections in which the two must agree."""
LOOK_AT = 200
"""Runs beside this one that are looked at, the last by name."""


class Reference(NamedTuple):
    """The other run."""

    name: str
    rounds: list[dict[str, Any]]
    """Its metrics."""


def find_reference(store: RunStore, config: dict[str, Any]) -> Reference | None:
    """The run by random selection in the folder of this one, with all else alike; one of the same seed first.

    None where there is none, where this run is one itself, and where the folder may not be listed.
    """
    if config["selection"]["policy"] == BASELINE:
        return None
    folder, _, own = store.uri().partition("?")[0].rpartition("/")
    options = store.uri()[len(folder) + 1 + len(own) :]
    try:
        names = RunStore(folder + options).folders("")[-LOOK_AT:]
    except OSError:  # a key may open its own folder only; the report is whole without the line
        return None
    found = []
    for name in names:
        other = RunStore(f"{folder}/{name}{options}")
        if name == own or not other.exists(CONFIG):
            continue
        content = other.read_bytes(CONFIG)
        if f"policy: {BASELINE}".encode() not in content:  # reading YAML takes its time
            continue
        settings = yaml.safe_load(content)
        if _is_alike(settings, config) and (rounds := other.read_metrics()):
            is_same_seed = settings["run"]["seed"] == config["run"]["seed"]
            found.append((is_same_seed, name, rounds))
    if not found:
        return None
    _, name, rounds = max(found, key=lambda one: one[:2])
    return Reference(name, rounds)


def _is_alike(other: dict[str, Any], config: dict[str, Any]) -> bool:
    return other["selection"]["policy"] == BASELINE and all(
        other.get(section) == config.get(section) for section in SAME
    )
