"""The student's temperature, which makes its confidence match its accuracy.

It is fitted on texts that the student was not trained on, using the best gold available:

1. pool texts with gold, if there are at least 100: those of the hold-out (gold from the corpus or from human
      answers) and those of an audit's random sample; measured on the test set if that has gold;
2. the test set's gold; cross-validated, so that no text is evaluated with a temperature fitted on it;
3. fewer pool texts, also cross-validated;
4. the teacher's labels of the hold-out: confidence is then the probability of agreement with the teacher.

The last layer of the weights in model/ is divided by it, so that every program that loads them sees the
same confidence; the weights in checkpoints/ stay as they were trained. config.json says how it was fitted.
Predicted labels do not change. Shapes in names: N texts, C labels.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llkd_ray.config.schedule import Schedule
from llkd_ray.config.schema import Config
from llkd_ray.metrics.calibration import MIN_GOLD, TEMPERATURES, at_temperature, cross_fitted, fit_temperature
from llkd_ray.metrics.quality import expected_calibration_error
from llkd_ray.metrics.uncertainty import Floats, Ints, confidence
from llkd_ray.storage.checkpoints import CALIBRATION_KEY
from llkd_ray.storage.run_dir import ASKED, MODEL_DIR, RunStore
from llkd_ray.storage.tables import (
    AuditAnswers,
    Examples,
    matrix_of,
    read_calibrator,
    read_labels,
    read_predictions,
    trained_rows,
)
from llkd_ray.student.model import divide_logits

TEST_GOLD = "gold of the test set"
ENOUGH = 100
"""With at least this many pool texts, the test set's gold is used for measuring only."""
_FOLDS_SEED = 0


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with labels, and the student's probabilities."""

    words: str
    """Source of the labels and of the texts; shown to users."""
    p_NC: Floats
    gold_N: Ints

    def __len__(self) -> int:
        return int(self.gold_N.size)

    def log_loss(self, p_NC: Floats) -> float:
        """Mean negative log-probability of the labels."""
        p_gold_N = p_NC[np.arange(len(self)), self.gold_N]
        return float(-np.log(np.maximum(p_gold_N, 1e-12)).mean())

    def ece(self, p_NC: Floats) -> float:
        return expected_calibration_error(confidence(p_NC), p_NC.argmax(axis=1) == self.gold_N)


def fit_student(
    store: RunStore, config: Config, last: int, audited: tuple[Ints, Floats] | None = None
) -> dict[str, Any]:
    """Fit the student's temperature after round ``last``, and measure its effect on the calibration error.

    ``audited``: further pool rows that people may have labelled, with the student's probabilities.
    ``temperature`` is None if none could be fitted; ``reason`` then says why.
    """
    pool, test, agreement = _sources(store, config, last, audited)
    for fitted_on, measured_on, enough in (
        (pool, test, ENOUGH),
        (test, test, MIN_GOLD),
        (pool, pool, MIN_GOLD),
        (agreement, agreement, MIN_GOLD),
    ):
        if len(fitted_on) >= enough:
            return _fitted(fitted_on, measured_on if len(measured_on) >= MIN_GOLD else fitted_on)
    return {
        "temperature": None,
        "reason": f"there are fewer than {MIN_GOLD} texts to fit it to: give a test set with gold, or "
        "enlarge evaluation.holdout",
    }


def _fitted(fitted_on: LabelledTexts, measured_on: LabelledTexts) -> dict[str, Any]:
    is_right_N = fitted_on.p_NC.argmax(axis=1) == fitted_on.gold_N
    if is_right_N.all() or not is_right_N.any():
        all_alike = "right" if is_right_N.all() else "wrong"
        return {
            "temperature": None,
            "reason": f"all answers on {len(fitted_on)} texts ({fitted_on.words}) are {all_alike}, which no "
            "temperature can be fitted to: give more texts",
        }
    temperature = fit_temperature(fitted_on.p_NC, fitted_on.gold_N)
    in_folds_NC = cross_fitted(fitted_on.p_NC, fitted_on.gold_N, np.random.default_rng(_FOLDS_SEED))
    at_bound = not TEMPERATURES[0] * 1.01 < temperature < TEMPERATURES[1] / 1.01
    if at_bound or fitted_on.log_loss(in_folds_NC) >= fitted_on.log_loss(fitted_on.p_NC):
        return {
            "temperature": None,
            "reason": f"no temperature makes it better on {len(fitted_on)} texts ({fitted_on.words}), "
            "cross-validated",
        }
    in_folds = measured_on is fitted_on
    after_NC = in_folds_NC if in_folds else at_temperature(measured_on.p_NC, temperature)
    return {
        "temperature": temperature,
        "fitted_on": fitted_on.words,
        "texts": len(fitted_on),
        "measured_on": measured_on.words
        + (", in folds of which none was fitted on itself" if in_folds else ""),
        "measured_texts": len(measured_on),
        "ece_before": measured_on.ece(measured_on.p_NC),
        "ece_after": measured_on.ece(after_NC),
    }


def write_model(store: RunStore, checkpoint: str, found: dict[str, Any]) -> None:
    """Write model/ from the weights in ``checkpoint``, a folder of the run, with this calibration."""
    with tempfile.TemporaryDirectory(prefix="llkd-model-") as folder:
        store.download(checkpoint, folder)
        if found["temperature"] is not None:
            divide_logits(folder, found["temperature"])
        config = Path(folder, "config.json")
        tree = json.loads(config.read_text(encoding="utf-8")) | {CALIBRATION_KEY: found}
        config.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
        store.upload(folder, MODEL_DIR)


def describe(found: dict[str, Any]) -> str:
    """The result as one line of text."""
    if found["temperature"] is None:
        return f"the student's confidence stays as it is: {found['reason']}"
    before, after = found["ece_before"], found["ece_after"]
    return (
        f"the student's confidence: temperature {found['temperature']:.3f}, fitted on {found['texts']:,} "
        f"texts ({found['fitted_on']}); calibration error {before:.3f} before, {after:.3f} after, on "
        f"{found['measured_texts']:,} texts ({found['measured_on']})"
    )


def audited_sample(store: RunStore) -> Ints:
    """int64[M]: rows of an audit's random sample that people have answered and no round was trained on.

    The other audited texts were chosen because they are doubtful, which would bias the figures.
    """
    if not store.exists(ASKED):
        return np.empty(0, dtype=np.int64)
    asked = store.read_table(ASKED, ["row", "is_random"])
    sample = asked["row"].to_numpy()[asked["is_random"].to_numpy(zero_copy_only=False)]
    answered = np.intersect1d(sample, AuditAnswers.read(store).row_M)
    return np.setdiff1d(answered, trained_rows(store))


def _sources(
    store: RunStore, config: Config, last: int, audited: tuple[Ints, Floats] | None
) -> tuple[LabelledTexts, LabelledTexts, LabelledTexts]:
    """Gold of the pool, gold of the test set, and the teacher's labels of the hold-out."""
    n_classes, examples = len(config.labels.names), Examples.open(store)
    row_N, p_NC = read_predictions(store, last, n_classes)
    in_pool_N = row_N < examples.n_pool
    gold_N = examples.read(row_N, ["gold"])["gold"].to_numpy().astype(np.int64)
    test_N = ~in_pool_N & (gold_N >= 0)
    test = LabelledTexts(TEST_GOLD, p_NC[test_N], gold_N[test_N])

    pool_row_N, pool_p_NC = row_N[in_pool_N], p_NC[in_pool_N]
    if audited is not None:
        beside = ~np.isin(audited[0], pool_row_N)
        pool_row_N = np.concatenate([pool_row_N, audited[0][beside]])
        pool_p_NC = np.concatenate([pool_p_NC, audited[1][beside]])
    said = AuditAnswers.read(store).by_row()
    sample = set(audited_sample(store).tolist())
    pool_gold_N = examples.read(pool_row_N, ["gold"])["gold"].to_numpy().astype(np.int64)
    by_people = 0
    for i, row in enumerate(pool_row_N.tolist()):
        if row in sample:
            pool_gold_N[i] = said[row]
            by_people += 1
    known_N = pool_gold_N >= 0
    words = "gold of pool texts that it was not trained on"
    if by_people:
        words += f", {by_people} of them labelled by people"
    pool = LabelledTexts(words, pool_p_NC[known_N], pool_gold_N[known_N])
    return pool, test, _agreement(store, config, examples, row_N[in_pool_N], p_NC[in_pool_N])


def _agreement(
    store: RunStore, config: Config, examples: Examples, row_N: Ints, p_NC: Floats
) -> LabelledTexts:
    words = "the teacher's labels of the hold-out, for there is no gold: it is agreement, not accuracy"
    schedule = Schedule.plan(config, examples.n_pool, examples.n_test)
    labels, calibrator = read_labels(store, schedule.holdout_tickets), read_calibrator(store, config)
    if calibrator is None:
        return LabelledTexts(words, np.empty((0, p_NC.shape[1])), np.empty(0, dtype=np.int64))
    _, mine, theirs = np.intersect1d(row_N, labels["row"].to_numpy(), return_indices=True)
    said_NC = calibrator.apply(matrix_of(labels["probs"], p_NC.shape[1]))
    return LabelledTexts(words, p_NC[mine], said_NC[theirs].argmax(axis=1))
