"""What a round and a run have come to: figures from files, so that a resumed driver finds the same.

What is known against the truth (gold) and what is known against the teacher are kept apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from llkd_ray.confidence import Calibrator
from llkd_ray.config import Config
from llkd_ray.evaluate import (
    accuracy_by_confidence,
    agreement,
    bootstrap_interval,
    classification,
)
from llkd_ray.intake import read_calibrator
from llkd_ray.schedule import Schedule
from llkd_ray.signals import Floats, Ints, confidence
from llkd_ray.store import (
    BATCH,
    TRAINED,
    Examples,
    RunStore,
    matrix_of,
    read_labels,
    read_predictions,
    round_file,
)
from llkd_ray.teacher_quality import quality_of


class Measure:
    """Reads a run's predictions, labels and gold, and holds them against each other."""

    def __init__(self, store: RunStore, schedule: Schedule, config: Config) -> None:
        self.store, self.schedule, self.config = store, schedule, config
        self.n_classes = len(config.labels.names)
        self.examples = Examples.open(store)

    def round(self, round_number: int) -> dict[str, Any]:
        """Accuracy, macro-F1 and ECE on gold, agreement with the teacher, accuracy of the pseudo-labels.

        None stands for what cannot be known, for want of gold or of a hold-out.
        """
        row_N, p_NC = self.predictions(round_number)
        on_gold = self._against_gold(row_N, p_NC)
        return {
            **(on_gold or dict.fromkeys(("accuracy", "macro_f1", "ece"))),
            "teacher_agreement": self._teacher_agreement(row_N, p_NC),
            "pseudo_label_accuracy": self._pseudo_label_accuracy(round_number),
        }

    def student(self, round_number: int, rng: np.random.Generator) -> dict[str, Any]:
        """The round's figures with 95 % bootstrap intervals of accuracy and macro-F1."""
        figures = self.round(round_number)
        row_N, p_NC = self.predictions(round_number)
        known, gold_N = self.gold(row_N)
        if known.any():
            predicted_N = p_NC[known].argmax(axis=1)
            figures["accuracy_interval"] = bootstrap_interval(gold_N[known], predicted_N, "accuracy", rng)
            figures["macro_f1_interval"] = bootstrap_interval(gold_N[known], predicted_N, "macro_f1", rng)
        return figures

    def teacher(self, rng: np.random.Generator) -> dict[str, Any] | None:
        """The teacher's own figures on the test set, and what its confidence is worth there; where it has not
        labelled the test set, the latter on pool texts with gold; None where no gold is known at all.

        Of the hold-out nothing counts, for a temperature is fitted on it.
        """
        labels = read_labels(self.store, self.schedule.test_tickets)
        row_N, p_NC = self._teacher_opinion(labels)
        figures = self._against_gold(row_N, p_NC)
        if figures is None:
            quality = self._quality(read_labels(self.store, self.schedule.pool_tickets), rng)
            return quality and {"quality": {"on": "pool texts with gold", **quality}}
        known, gold_N = self.gold(row_N)
        correct_N = p_NC[known].argmax(axis=1) == gold_N[known]
        figures["by_confidence"] = accuracy_by_confidence(confidence(p_NC[known]), correct_N)
        figures["off_label"] = float(np.mean(labels["off_label"].to_numpy()))
        quality = self._quality(labels, rng)
        assert quality is not None
        return figures | {"quality": {"on": "test set", **quality}}

    def checkpoint(self, round_number: int) -> str:
        """The folder of the student's weights after a round."""
        return str(self.store.read_json(round_file(round_number, TRAINED))["checkpoint"])

    def predictions(self, round_number: int) -> tuple[Ints, Floats]:
        """int64[N], float[N, C]: rows of test set and hold-out, and the student's answers after a round."""
        return read_predictions(self.store, round_number, self.n_classes)

    def gold(self, row_N: Ints) -> tuple[np.ndarray, Ints]:
        """bool[N]: where a test row's gold is known, and int[N]: the gold, -1 elsewhere."""
        gold_N = np.full(row_N.size, -1, dtype=np.int64)
        is_test_N = row_N >= self.examples.n_pool
        gold_N[is_test_N] = self._gold_of_test[row_N[is_test_N] - self.examples.n_pool]
        return gold_N >= 0, gold_N

    @cached_property
    def _gold_of_test(self) -> Ints:
        """int64[n_test]: the same in every round."""
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
        teacher_row, p_teacher = self._teacher_on_holdout
        both, mine, theirs = np.intersect1d(row_N, teacher_row, return_indices=True)
        return agreement(p_NC[mine], p_teacher[theirs]) if both.size else None

    @cached_property
    def _teacher_on_holdout(self) -> tuple[Ints, Floats]:
        """Labelled before the first round is selected, and then for good."""
        return self.teacher_opinion(self.schedule.holdout_tickets)

    def teacher_opinion(self, tickets: Iterable[int]) -> tuple[Ints, Floats]:
        """int64[N], float[N, C]: the rows of some tickets, and the teacher's answers as they are used."""
        return self._teacher_opinion(read_labels(self.store, tickets))

    def _teacher_opinion(self, labels: pa.Table) -> tuple[Ints, Floats]:
        return labels["row"].to_numpy(), self._calibrator().apply(matrix_of(labels["probs"], self.n_classes))

    def _pseudo_label_accuracy(self, round_number: int) -> float | None:
        batch = self.store.read_table(round_file(round_number, BATCH), ["row", "label"])
        gold_M = self.examples.read(batch["row"].to_numpy(), ["gold"])["gold"].to_numpy()
        known = gold_M >= 0
        return float(np.mean(gold_M[known] == batch["label"].to_numpy()[known])) if known.any() else None
