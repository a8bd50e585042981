"""A trial: one line of a comparison on recorded labels, with one seed, in one process and without Ray.

The rounds are those of a run (``run.loop``): acquire, score, select, train, evaluate. Table, policies and
student use the same code; the teacher's answers, however, are read from a matrix, so no text is labelled
twice, regardless of the number of trials. Every round writes a file, so a trial that was killed, or one
with a larger budget, resumes from the files. One difference: in a trial the student finishes a round before
the next texts are acquired; in a run the teacher labels at the same time, so acquisition uses the student's
scores of the previous round.

Shapes in names: N texts of the pool, T texts of the test set, M texts of a round, C classes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import Config
from llkd_ray.metrics.quality import classification
from llkd_ray.metrics.uncertainty import Floats, Ints, StudentScores, confidence, normalise
from llkd_ray.selection.acquisition import AcquisitionPolicy, find_acquisition
from llkd_ray.selection.policies import SelectionPolicy, effective, find_selection, target_prior
from llkd_ray.selection.rounds import RoundSelection
from llkd_ray.selection.table import ScoreTable
from llkd_ray.storage.tables import Examples
from llkd_ray.student.inference import predict
from llkd_ray.student.model import build_student
from llkd_ray.student.train import Batch, train_round
from llkd_ray.teacher.recorded import read_recorded

# First word of the seed of each generator, so that no two share a random stream.
_ACQUIRE_SEED = 2
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Texts:
    """Pool and test set, in memory; gold is known for both."""

    pool: list[str]
    gold_N: Ints
    test: list[str]
    gold_T: Ints
    names: tuple[str, ...]


@dataclass(frozen=True)
class Labels:
    """A teacher's labels of all texts of the pool."""

    p_NC: Floats
    tokens_N: Ints
    """Prompt tokens of each text; zero if they are not recorded."""
    digest: str
    """Hash of the labels, used to look up results."""
    test_label_T: Ints | None = None
    """The teacher's answers on the test texts; None for the true labels, which come from no teacher."""


@dataclass(frozen=True)
class Trial:
    """What a trial runs: a config, the texts trained on after each round, and where results are stored."""

    config: Config
    """``selection``, ``acquisition``, ``student``, ``run.seed`` and the label counts of ``budget``."""
    sizes: tuple[int, ...]
    """Texts trained on after each round, ascending."""
    reported: tuple[int, ...]
    """The sizes at which the student is evaluated; all are in ``sizes``."""
    folder: Path

    @cached_property
    def policy(self) -> SelectionPolicy:
        """Raises ConfigError if the policy or one of its options is unknown."""
        return find_selection(self.config.selection)

    @cached_property
    def acquisition(self) -> AcquisitionPolicy:
        """Raises ConfigError if the policy is unknown."""
        return find_acquisition(self.config.acquisition)

    def round_selection(self, table: ScoreTable, k: int) -> RoundSelection:
        """The selection of round ``k``, from all labels that exist by then."""
        return RoundSelection(self.config, self.policy, self.acquisition, table, k, tickets_below=k + 1)

    def key(self, digest: str, k: int) -> str:
        """Hash of everything that determines the result of round ``k``; later sizes are not part of it."""
        config = self.config
        decisive = {
            "labels": digest,
            "sizes": self.sizes[: k + 1],
            "rounds": len(self.sizes) if self._labels_grow else None,
            "seed": config.run.seed,
            "student": config.student.model_dump(mode="json"),
            "selection": config.selection.model_dump(mode="json") | self._exponents,
            # With `off` the known shares are not used, which the exponents alone do not show.
            "known_prior": () if config.selection.prior == "off" else config.labels.known_prior,
            "acquisition": config.acquisition.model_dump(mode="json") if self._labels_grow else None,
            "budget": [config.budget.labels, config.budget.first_labels] if self._labels_grow else None,
        }
        return hashlib.blake2b(json.dumps(decisive, sort_keys=True).encode(), digest_size=8).hexdigest()

    def prior(self, count_C: Ints) -> Floats | None:
        """float[C]: the class prior of the student's loss, from the pseudo-labels' counts."""
        config = self.config
        return target_prior(count_C, config.selection.prior, self.policy.prior, config.labels.known_prior)

    @property
    def _exponents(self) -> dict[str, float | None]:
        """The values in effect, so that a changed default of a policy changes the key."""
        policy, selection = self.policy, self.config.selection
        return {
            "quota": effective(selection.quota, policy.quota),
            "prior": effective(selection.prior, policy.prior),
        }

    @property
    def _labels_grow(self) -> bool:
        return self.config.budget.first_labels < 1 or self.config.budget.labels is not None

    def labelled_before(self, k: int, n_pool: int) -> int:
        """Number of texts the teacher has labelled before round ``k``; like ``schedule.tickets_before``."""
        budget = self.config.budget
        total = min(budget.labels or n_pool, n_pool)
        first = max(budget.first_labels, 1 / len(self.sizes))
        later = (1 - first) * k / (len(self.sizes) - 1) if len(self.sizes) > 1 else 1 - first
        return max(min(total, self.sizes[k]), round(total * (first + later)))


@dataclass
class State:
    """The state of a trial between two rounds."""

    table: ScoreTable
    row_M: Ints
    """The rows selected so far, in order of selection."""
    weight_M: Floats
    opinion: tuple[int, Ints, Floats] | None = None
    """The last round after which the student scored texts, their rows, and its answers float[M, C]."""


def run_trial(
    trial: Trial,
    texts: Texts,
    labels: Labels,
    say: Callable[[str], None] = lambda note: None,
    *,
    device: torch.device = CPU,
) -> list[dict[str, Any]]:
    """The figures at every reported size, from files if they exist; ``say`` reports each new one."""
    state = State(_empty_table(labels), np.empty(0, dtype=np.int64), np.empty(0))
    figures = []
    for k in range(len(trial.sizes)):
        file = trial.folder / f"{trial.key(labels.digest, k)}.npz"
        if not _is_enough(trial, k, file):
            _advance(trial, texts, labels, state, k, file, device)
            say(f"{trial.sizes[k]} texts")
        facts = _restore(file, state, labels, k)
        if trial.sizes[k] in trial.reported:
            figures.append(facts)
    return figures


def finished(trial: Trial, digest: str) -> list[dict[str, Any]]:
    """The figures of the reported sizes that already have a file, for labels with this digest."""
    figures = []
    for k, size in enumerate(trial.sizes):
        file = trial.folder / f"{trial.key(digest, k)}.npz"
        if size in trial.reported and _is_enough(trial, k, file):
            with np.load(file) as saved:
                figures.append(json.loads(str(saved["facts"])))
    return figures


def _uses_student(trial: Trial, k: int) -> bool:
    """Whether the student's scores after round ``k`` affect any later result."""
    asks = trial.policy.uses_student or trial.acquisition.uses_student
    return asks and k < len(trial.sizes) - 1


def _is_enough(trial: Trial, k: int, file: Path) -> bool:
    """Whether the round's file contains everything this trial needs.

    A trial with fewer sizes, or with fewer reported ones, writes the same file with less content.
    """
    if not file.exists():
        return False
    is_scored, is_evaluated = _holds(file)
    return (is_scored or not _uses_student(trial, k)) and (
        is_evaluated or trial.sizes[k] not in trial.reported
    )


def _holds(file: Path) -> tuple[bool, bool]:
    """Whether a round's file contains the student's scores of the pool, and its test-set evaluation."""
    if not file.exists():
        return False, False
    with np.load(file) as saved:
        return "p" in saved, "accuracy" in json.loads(str(saved["facts"]))


def _advance(
    trial: Trial, texts: Texts, labels: Labels, state: State, k: int, file: Path, device: torch.device
) -> None:
    """Run one round; writes what the next round and the report need to ``file``, by rename."""
    began = time.monotonic()
    config, table = trial.config, state.table
    read_M = _acquire(trial, labels, state, k)
    chosen = trial.round_selection(table, k).choose(trial.sizes[k] - state.row_M.size)
    arrays: dict[str, Any] = {
        "read": read_M,
        "row": np.concatenate([state.row_M, chosen.row_M]),
        "weight": np.concatenate([state.weight_M, chosen.weight_M]),
    }
    # Results that another trial has written to the file are kept.
    is_scored, is_evaluated = _holds(file)
    reported = is_evaluated or trial.sizes[k] in trial.reported
    uses_student = is_scored or _uses_student(trial, k)
    facts: dict[str, Any] = {"size": trial.sizes[k], "trained": int(arrays["row"].size)}
    # Every round starts from the pre-trained weights, so a round neither reported nor used can be skipped.
    if reported or uses_student:
        row_M, label_M = arrays["row"], table.label[arrays["row"]]
        batch = Batch(
            [texts.pool[row] for row in row_M],
            label_M.astype(np.int64),
            arrays["weight"],
            labels.p_NC[row_M],
            trial.prior(table.labelled_of_class(tickets_below=k + 1)),
        )
        seed = config.run.seed * 1_000 + k
        student = build_student(config.student, config.labels, config.run.seed, device)
        facts |= train_round(student, batch, config.student, seed=seed)
        if reported:
            p_TC = predict(student, texts.test, config.student)
            facts |= against_gold(texts, p_TC)
            if labels.test_label_T is not None:
                facts["agreement"] = float(np.mean(p_TC.argmax(axis=1) == labels.test_label_T))
        if uses_student:
            table.mark_trained(k, row_M)
            score_M = table.untrained()
            if not trial.acquisition.uses_student:
                score_M = score_M[table.label[score_M] >= 0]
            arrays["scored"] = score_M
            p_MC = predict(student, [texts.pool[row] for row in score_M], config.student)
            arrays["p"] = p_MC.astype(np.float32)
    labelled_M = np.flatnonzero(table.label >= 0)
    facts |= {
        "labelled": int(labelled_M.size),
        "teacher_tokens": int(labels.tokens_N[labelled_M].sum()),
        "pseudo_label_accuracy": float(np.mean(table.label[arrays["row"]] == texts.gold_N[arrays["row"]])),
        "seconds": time.monotonic() - began,
    }
    arrays["facts"] = np.array(json.dumps(facts))
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{time.monotonic_ns()}.partial")
    with partial.open("wb") as out:
        np.savez_compressed(out, **arrays)
    partial.rename(file)


def _acquire(trial: Trial, labels: Labels, state: State, k: int) -> Ints:
    """Label what the acquisition policy chooses before round ``k``; returns the rows."""
    table = state.table
    n = trial.labelled_before(k, len(table)) - table.count_labelled()
    config = trial.config
    rng = np.random.default_rng([config.run.seed, _ACQUIRE_SEED, k])
    seed, explore = config.run.seed, config.acquisition.explore
    row_M = trial.acquisition.choose(table.unread(), n, rng, seed=seed, explore=explore)
    _note_labels(table, labels, row_M, k)
    if state.opinion is not None:
        _refresh(table, *state.opinion)  # the student's support for the new labels
    return row_M


def _restore(file: Path, state: State, labels: Labels, k: int) -> dict[str, Any]:
    """Restore the state to the end of round ``k``; returns the round's facts."""
    with np.load(file) as saved:
        _note_labels(state.table, labels, saved["read"], k)
        state.row_M, state.weight_M = saved["row"], saved["weight"]
        state.table.mark_trained(k, state.row_M)
        if "p" in saved:
            state.opinion = k, saved["scored"], saved["p"]
            _refresh(state.table, *state.opinion)
        facts: dict[str, Any] = json.loads(str(saved["facts"]))
    return facts


def _refresh(table: ScoreTable, k: int, row_M: Ints, p_MC: Floats) -> None:
    table.refresh(k, row_M, StudentScores.of(p_MC, table.label[row_M]))


def _empty_table(labels: Labels) -> ScoreTable:
    return ScoreTable(labels.p_NC.shape[1], len(labels.p_NC))


def _note_labels(table: ScoreTable, labels: Labels, row_M: Ints, k: int) -> None:
    p_MC = labels.p_NC[row_M]
    table.lease(k, row_M)
    table.put_labels(row_M, p_MC.argmax(axis=1), confidence(p_MC), np.zeros(row_M.size, dtype=np.int8))


def against_gold(texts: Texts, p_TC: Floats) -> dict[str, Any]:
    """Test-set answers against gold: accuracy, macro-F1, calibration error, F1 of each class."""
    scores = classification(texts.gold_T, p_TC, len(texts.names))
    by_class_C = f1_score(
        texts.gold_T, p_TC.argmax(axis=1), labels=range(len(texts.names)), average=None, zero_division=0
    )
    return {
        "accuracy": scores.accuracy,
        "macro_f1": scores.macro_f1,
        "ece": scores.ece,
        "f1_by_class": [float(f1) for f1 in by_class_C],
    }


def read_texts(examples: Examples, names: Sequence[str]) -> Texts:
    """Read all texts into memory; raises ConfigError if gold is missing, which a comparison requires."""
    table = examples.read(np.arange(examples.n_rows), ["text", "gold"])
    text, gold_N = table["text"].to_pylist(), table["gold"].to_numpy().astype(np.int64)
    if not examples.n_test or (gold_N < 0).any():
        raise ConfigError(
            "corpus.gold, test: a comparison needs a test set, and gold for it and for the pool"
        )
    n = examples.n_pool
    return Texts(text[:n], gold_N[:n], text[n:], gold_N[n:], tuple(names))


def read_teacher(config: Config, examples: Examples) -> tuple[Labels, Floats]:
    """A recorded teacher's labels of the pool, and its answers on the test set, float[T, C].

    Raises ConfigError if a text has no answer.
    """
    if config.teacher.recorded is None:
        raise ConfigError("teacher.kind: a comparison needs recorded answers, such as the labels/ of a run")
    recorded = read_recorded(config.teacher.recorded, config.labels.names)
    ids = examples.read(np.arange(examples.n_rows), ["id"])["id"].to_pylist()
    place_R = np.array([recorded.place.get(text_id, -1) for text_id in ids])
    if (place_R < 0).any():
        raise ConfigError(
            f"teacher.recorded.uri: no answer to {np.count_nonzero(place_R < 0)} of {len(ids)} texts, "
            f"{ids[int(np.argmax(place_R < 0))]!r} for one; a comparison needs all of them"
        )
    p_RC, n = normalise(recorded.probs_RC[place_R]), examples.n_pool
    labels = labels_of(ids[:n], p_RC[:n], recorded.prompt_tokens_R[place_R[:n]])
    return replace(labels, test_label_T=p_RC[n:].argmax(axis=1)), p_RC[n:]


def gold_labels(examples: Examples, texts: Texts) -> Labels:
    """The true labels, in the form of a teacher's labels."""
    ids = examples.read(np.arange(examples.n_pool), ["id"])["id"].to_pylist()
    return labels_of(ids, np.eye(len(texts.names))[texts.gold_N], np.zeros(len(ids), dtype=np.int64))


def labels_of(ids: Sequence[str], p_NC: Floats, tokens_N: Ints) -> Labels:
    """Labels of the texts with these ids; the digest covers ids and distributions."""
    digest = hashlib.blake2b("\n".join(ids).encode(), digest_size=8)
    digest.update(np.round(p_NC, 6).astype(np.float32).tobytes())
    return Labels(p_NC, tokens_N, digest.hexdigest())
