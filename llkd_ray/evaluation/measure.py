"""The figures of a round and of a run, computed from files, so that a resumed driver gets the same values.

Comparisons with gold and comparisons with the teacher are kept apart. ``write_insight`` stores the texts and
counts that the report shows in a small file, so that the report does not have to read all texts.

Legend: N texts, C classes, B blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from llkd_ray.config.schedule import Schedule
from llkd_ray.config.schema import Config
from llkd_ray.metrics.calibration import Calibrator, at_temperature
from llkd_ray.metrics.quality import (
    accuracy_interval,
    agreement,
    classification,
    macro_f1_interval,
    quality_of,
    reliability,
)
from llkd_ray.metrics.uncertainty import Floats, Ints, confidence
from llkd_ray.storage.run_dir import (
    BATCH,
    CANDIDATE_SAMPLE,
    INSIGHT,
    TRAINED,
    RunStore,
    round_file,
)
from llkd_ray.storage.tables import Examples, matrix_of, read_calibrator, read_labels, read_predictions


class Measure:
    """Reads a run's predictions, labels and gold, and compares them."""

    def __init__(self, store: RunStore, schedule: Schedule, config: Config) -> None:
        self.store, self.schedule, self.config = store, schedule, config
        self.n_classes = len(config.labels.names)
        self.examples = Examples.open(store)

    def round(self, round_number: int) -> dict[str, Any]:
        """Accuracy, macro-F1 and ECE on gold, agreement with the teacher, accuracy of the pseudo-labels.

        A figure is None if it cannot be computed because gold or a hold-out is missing.
        """
        row_N, p_NC = self.predictions(round_number)
        on_gold = self._against_gold(row_N, p_NC)
        return {
            **(on_gold or dict.fromkeys(("accuracy", "macro_f1", "ece"))),
            "teacher_agreement": self._teacher_agreement(row_N, p_NC),
            "pseudo_label_accuracy": self._pseudo_label_accuracy(round_number),
        }

    def student(self, round_number: int, rng: np.random.Generator) -> dict[str, Any]:
        """The round's figures, with 95 % intervals: exact for accuracy, bootstrap for macro-F1."""
        figures = self.round(round_number)
        row_N, p_NC = self.predictions(round_number)
        known, gold_N = self.gold(row_N)
        if known.any():
            predicted_N = p_NC[known].argmax(axis=1)
            figures["accuracy_interval"] = accuracy_interval(gold_N[known], predicted_N)
            figures["macro_f1_interval"] = macro_f1_interval(gold_N[known], predicted_N, rng)
        return figures

    def teacher(self, rng: np.random.Generator) -> dict[str, Any] | None:
        """The teacher's figures and the quality of its confidence on the test set.

        If the teacher has not labelled the test set: its quality on pool texts with gold; None without gold.
        The hold-out is excluded, because a temperature is fitted on it.
        """
        labels = read_labels(self.store, self.schedule.test_tickets)
        row_N, p_NC = self._teacher_probabilities(labels)
        figures = self._against_gold(row_N, p_NC)
        if figures is None:
            quality = self._quality(read_labels(self.store, self.schedule.pool_tickets), rng)
            return quality and {"quality": {"on": "pool texts with gold", **quality}}
        figures["off_label"] = float(np.mean(labels["off_label"].to_numpy()))
        quality = self._quality(labels, rng)
        assert quality is not None
        return figures | {"quality": {"on": "test set", **quality}}

    def checkpoint(self, round_number: int) -> str:
        """The folder of the student's weights after a round."""
        return str(self.store.read_json(round_file(round_number, TRAINED))["checkpoint"])

    def predictions(self, round_number: int) -> tuple[Ints, Floats]:
        """int64[N], float[N, C]: rows of test set and hold-out, and the student's probabilities."""
        return read_predictions(self.store, round_number, self.n_classes)

    def gold(self, row_N: Ints) -> tuple[np.ndarray, Ints]:
        """bool[N]: whether a test row's gold is known, and int[N]: the gold label, -1 if unknown."""
        gold_N = np.full(row_N.size, -1, dtype=np.int64)
        is_test_N = row_N >= self.examples.n_pool
        gold_N[is_test_N] = self._gold_of_test[row_N[is_test_N] - self.examples.n_pool]
        return gold_N >= 0, gold_N

    def labels_without_gold(self) -> list[str]:
        """The labels that no text of the test set has; none without a test set with gold."""
        known_N = self._gold_of_test[self._gold_of_test >= 0]
        counts_C = np.bincount(known_N, minlength=self.n_classes)
        names = self.config.labels.names
        return [name for name, n in zip(names, counts_C, strict=True) if not n] if known_N.size else []

    @cached_property
    def _gold_of_test(self) -> Ints:
        """int64[n_test]"""
        gold = self.examples.read(self.examples.test_rows, ["gold"])["gold"]
        return gold.to_numpy().astype(np.int64)

    def _against_gold(self, row_N: Ints, p_NC: Floats) -> dict[str, Any] | None:
        known, gold_N = self.gold(row_N)
        if not known.any():
            return None
        scores = classification(gold_N[known], p_NC[known], self.n_classes)
        return {"accuracy": scores.accuracy, "macro_f1": scores.macro_f1, "ece": scores.ece}

    def _quality(self, labels: pa.Table, rng: np.random.Generator) -> dict[str, Any] | None:
        gold_N = self.examples.read(labels["row"].to_numpy(), ["gold"])["gold"].to_numpy()
        mass_NC = matrix_of(labels["probs"], self.n_classes)
        return quality_of(mass_NC, gold_N.astype(np.int64), self._calibrator(), rng)

    def _calibrator(self) -> Calibrator:
        calibrator = read_calibrator(self.store, self.config)
        assert calibrator is not None, "it is fitted before the first round is selected"
        return calibrator

    def _teacher_agreement(self, row_N: Ints, p_NC: Floats) -> float | None:
        teacher_row_N, p_teacher_NC = self._teacher_on_holdout
        both, mine, theirs = np.intersect1d(row_N, teacher_row_N, return_indices=True)
        return agreement(p_NC[mine], p_teacher_NC[theirs]) if both.size else None

    @cached_property
    def _teacher_on_holdout(self) -> tuple[Ints, Floats]:
        """The same in every round: the hold-out is labelled before the first round is selected."""
        return self.teacher_probabilities(self.schedule.holdout_tickets)

    def teacher_probabilities(self, tickets: Iterable[int]) -> tuple[Ints, Floats]:
        """int64[N], float[N, C]: rows of the given tickets, and the teacher's calibrated probabilities."""
        return self._teacher_probabilities(read_labels(self.store, tickets))

    def _teacher_probabilities(self, labels: pa.Table) -> tuple[Ints, Floats]:
        return labels["row"].to_numpy(), self._calibrator().apply(matrix_of(labels["probs"], self.n_classes))

    def _pseudo_label_accuracy(self, round_number: int) -> float | None:
        batch = self.store.read_table(round_file(round_number, BATCH), ["row", "label"])
        gold_M = self.examples.read(batch["row"].to_numpy(), ["gold"])["gold"].to_numpy()
        known = gold_M >= 0
        return float(np.mean(gold_M[known] == batch["label"].to_numpy()[known])) if known.any() else None


def accuracy_difference(
    first: RunStore, second: RunStore, n_classes: int
) -> tuple[float, float, float] | None:
    """The accuracy of one run's last student minus that of another, with a 95 % interval.

    The interval is that of a mean of paired differences, by the normal approximation. None if they do not
    have the same test texts with gold.
    """
    row_N, right_N = _right_on_test(first, n_classes)
    other_row_N, other_right_N = _right_on_test(second, n_classes)
    if not row_N.size or not np.array_equal(row_N, other_row_N):
        return None
    difference_N = right_N.astype(float) - other_right_N
    mean, half = float(difference_N.mean()), 1.96 * float(difference_N.std()) / row_N.size**0.5
    return mean, mean - half, mean + half


def _right_on_test(store: RunStore, n_classes: int) -> tuple[Ints, np.ndarray]:
    """int64[N], bool[N]: test rows with gold in order, and whether the last student is right on them."""
    lines = store.read_metrics()
    if not lines or not store.exists(round_file(lines[-1]["round"], TRAINED)):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=bool)
    row_N, p_NC = read_predictions(store, lines[-1]["round"], n_classes)
    examples = Examples.open(store)
    is_test_N = row_N >= examples.n_pool
    row_N, answer_N = row_N[is_test_N], p_NC[is_test_N].argmax(axis=1)
    gold_N = examples.read(row_N, ["gold"])["gold"].to_numpy()
    order = np.argsort(row_N[gold_N >= 0])
    return row_N[gold_N >= 0][order], (answer_N == gold_N)[gold_N >= 0][order]


SAMPLES = 8
"""Texts stored of each kind."""
SAMPLE_CHARS = 500
MAX_POOL_GOLD = 200_000
"""Maximum number of pool texts whose gold is counted."""
BLOCK = 10_000
MAX_PAIRS = 5_000
"""Maximum number of (true, predicted) class pairs stored, the most frequent first."""


def write_insight(store: RunStore, measure: Measure, last: int, temperature: float | None) -> None:
    """Write INSIGHT for a run that finished after round ``last``, with the confidence of its final model."""
    row_N, p_NC = measure.predictions(last)
    if temperature is not None:
        p_NC = at_temperature(p_NC, temperature)
    store.write_json(
        INSIGHT,
        {
            **_against_gold(measure, row_N, p_NC),
            "pool_gold": _pool_gold(measure),
            "disagreements": _disagreements(measure, row_N, p_NC),
            **_candidates_to_read(store, measure, last),
        },
    )


def _against_gold(measure: Measure, row_N: Ints, p_NC: Floats) -> dict[str, Any]:
    """The student on the test set: counts of (true, predicted) class pairs, and confidence bins."""
    known_N, gold_N = measure.gold(row_N)
    if not known_N.any():
        return {"confusion": None, "reliability": None}
    gold_N, p_NC = gold_N[known_N], p_NC[known_N]
    predicted_N = p_NC.argmax(axis=1)
    pairs, times = np.unique(np.stack([gold_N, predicted_N], axis=1), axis=0, return_counts=True)
    kept = np.sort(np.argsort(-times, kind="stable")[:MAX_PAIRS])
    return {
        "confusion": [[*pair, n] for pair, n in zip(pairs[kept].tolist(), times[kept].tolist(), strict=True)],
        "reliability": reliability(confidence(p_NC), predicted_N == gold_N),
    }


def _pool_gold(measure: Measure) -> list[int] | None:
    """int[C]: pool texts of each true class where gold is known; a large pool is sampled in spaced blocks."""
    examples = measure.examples
    n_blocks = -(-min(examples.n_pool, MAX_POOL_GOLD) // BLOCK)
    start_B = np.linspace(0, max(0, examples.n_pool - BLOCK), n_blocks).astype(np.int64)
    row_N = np.unique(np.concatenate([np.arange(start, start + BLOCK) for start in start_B]))
    gold_N = examples.read(row_N[row_N < examples.n_pool], ["gold"])["gold"].to_numpy()
    known_N = gold_N[gold_N >= 0]
    return np.bincount(known_N, minlength=measure.n_classes).tolist() if known_N.size else None


def _disagreements(measure: Measure, row_N: Ints, p_NC: Floats) -> list[dict[str, Any]]:
    """Texts not trained on for which student and teacher are most confident of different labels."""
    tickets = [*measure.schedule.holdout_tickets, *measure.schedule.test_tickets]
    teacher_row, p_teacher = measure.teacher_probabilities(tickets)
    both_N, mine, theirs = np.intersect1d(row_N, teacher_row, return_indices=True)
    p_student_NC, p_teacher_NC = p_NC[mine], p_teacher[theirs]
    student_N, teacher_N = p_student_NC.argmax(axis=1), p_teacher_NC.argmax(axis=1)
    confidence_N = np.minimum(confidence(p_student_NC), confidence(p_teacher_NC))
    differ = np.flatnonzero(student_N != teacher_N)
    chosen = differ[np.argsort(-confidence_N[differ], kind="stable")[:SAMPLES]]
    return [
        text
        | {
            "student": int(student_N[i]),
            "student_confidence": float(p_student_NC[i].max()),
            "teacher": int(teacher_N[i]),
            "teacher_confidence": float(p_teacher_NC[i].max()),
        }
        for i, text in zip(chosen, _texts(measure, both_N[chosen]), strict=True)
    ]


def _candidates_to_read(store: RunStore, measure: Measure, last: int) -> dict[str, list[dict[str, Any]]]:
    """From the rounds' candidate samples: selected texts for which both signals are high, and texts for which
    neither the teacher nor the student is confident.
    """
    table = pa.concat_tables(store.read_table(round_file(k, CANDIDATE_SAMPLE)) for k in range(last + 1))
    confidence_N, uncertainty_N = (table[name].to_numpy() for name in ("confidence", "uncertainty"))
    is_useful_N = table["selected"].to_numpy() & ~np.isnan(uncertainty_N)
    doubt_N = (1.0 - confidence_N) * np.where(np.isnan(uncertainty_N), 1.0, uncertainty_N)
    return {
        "useful": _top(measure, table, np.where(is_useful_N, confidence_N * uncertainty_N, -np.inf)),
        "doubtful": _top(measure, table, doubt_N),
    }


def _top(measure: Measure, table: pa.Table, value_N: Floats) -> list[dict[str, Any]]:
    """The texts with the largest values, each once; minus infinity excludes a text."""
    by_value = np.argsort(-value_N, kind="stable")
    by_value = by_value[np.isfinite(value_N[by_value])]
    first = np.sort(np.unique(table["row"].to_numpy()[by_value], return_index=True)[1])[:SAMPLES]
    chosen = table.take(pa.array(by_value[first])).to_pylist()
    texts = _texts(measure, np.array([one["row"] for one in chosen], dtype=np.int64))
    return [
        text
        | {
            "teacher": one["label"],
            "teacher_confidence": one["confidence"],
            "uncertainty": None if np.isnan(one["uncertainty"]) else one["uncertainty"],
        }
        for one, text in zip(chosen, texts, strict=True)
    ]


def _texts(measure: Measure, row_N: Ints) -> list[dict[str, Any]]:
    """The beginning of each text, and its gold label if known."""
    table = measure.examples.read(row_N, ["text", "gold"])
    return [
        {"text": one["text"][:SAMPLE_CHARS], "gold": one["gold"] if one["gold"] >= 0 else None}
        for one in table.to_pylist()
    ]
