"""Which texts are used: acquisition (before the teacher) and selection (after it).

A policy is a pure function of columns and a random generator, registered under its name. To add one,
see CONTRIBUTING.md. Shapes in names: N candidates, M chosen, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llkd_ray.signals import Floats, Ints, class_thresholds
from llkd_ray.table import Candidates


@dataclass(frozen=True)
class Selection:
    """The chosen rows, most wanted first, and what each counts in the loss (mean 1)."""

    row_M: Ints
    weight_M: Floats

    def __len__(self) -> int:
        return int(self.row_M.size)


SelectionRule = Callable[[Candidates, int, np.random.Generator], Selection]
AcquisitionRule = Callable[[Ints, int, np.random.Generator], Ints]


@dataclass(frozen=True)
class SelectionPolicy:
    """A selection rule and what it needs."""

    choose: SelectionRule
    uses_uncertainty: bool
    """Whether the student must score the candidates first."""


SELECTION: dict[str, SelectionPolicy] = {}
ACQUISITION: dict[str, AcquisitionRule] = {}


def selection_policy(name: str, uses_uncertainty: bool) -> Callable[[SelectionRule], SelectionRule]:
    """Register a selection rule: of the candidates, at most ``n``, without repeats."""

    def register(rule: SelectionRule) -> SelectionRule:
        SELECTION[name] = SelectionPolicy(rule, uses_uncertainty)
        return rule

    return register


def acquisition_policy(name: str) -> Callable[[AcquisitionRule], AcquisitionRule]:
    """Register an acquisition rule: of the unread rows (ascending), at most ``n``, without repeats."""

    def register(rule: AcquisitionRule) -> AcquisitionRule:
        ACQUISITION[name] = rule
        return rule

    return register


@acquisition_policy("sequential")
def acquire_sequential(unread_N: Ints, n: int, rng: np.random.Generator) -> Ints:
    """In corpus order."""
    return unread_N[:n]


@acquisition_policy("random")
def acquire_random(unread_N: Ints, n: int, rng: np.random.Generator) -> Ints:
    """Uniformly at random, returned in corpus order because neighbours are cheap to read together."""
    return np.sort(rng.choice(unread_N, size=min(n, unread_N.size), replace=False))


@selection_policy("random", uses_uncertainty=False)
def select_random(candidates: Candidates, n: int, rng: np.random.Generator) -> Selection:
    """Uniformly at random, all weighing the same: the baseline of every comparison."""
    row_N = np.sort(candidates.row_N)
    row_M = rng.choice(row_N, size=min(n, row_N.size), replace=False)
    return Selection(row_M, np.ones(row_M.size))


@selection_policy("llkd", uses_uncertainty=True)
def select_llkd(candidates: Candidates, n: int, rng: np.random.Generator) -> Selection:
    """LLKD (arXiv 2411.08028) as we read it: the teacher is sure, and the student is not.

    A text passes where the teacher's confidence and the student's uncertainty both reach the moving
    threshold of its pseudo-class (``signals.class_thresholds``). Those that pass are taken in order of
    confidence × uncertainty, which also is their weight in the loss. The order is ours: the paper takes
    all that pass in a step, a round has a budget. Fewer than ``n`` may pass; the rest of the budget
    then waits for a later round.

    Before its first round the student has no opinion. Then the texts over the confidence threshold are
    taken at random, because the most confident ones are mostly of one over-predicted class.
    """
    candidates = candidates.by_row()
    label_N, confidence_N = candidates.label_N, candidates.confidence_N
    sure_N = confidence_N >= class_thresholds(confidence_N, label_N, candidates.n_classes)[label_N]
    scored_N = ~np.isnan(candidates.uncertainty_N)
    if not scored_N.any():
        row_M = rng.permutation(candidates.row_N[sure_N])[:n]
        return Selection(row_M, np.ones(row_M.size))
    # A text that was labelled after the last refresh is as unknown to the student as can be.
    uncertainty_N = np.where(scored_N, candidates.uncertainty_N, 1.0)
    unsure_N = uncertainty_N >= class_thresholds(uncertainty_N, label_N, candidates.n_classes)[label_N]
    passing = np.flatnonzero(sure_N & unsure_N)
    value = confidence_N[passing] * uncertainty_N[passing]
    best = np.argsort(-value, kind="stable")[:n]
    return Selection(candidates.row_N[passing[best]], _mean_one(value[best]))


def _mean_one(value_M: Floats) -> Floats:
    """Values as weights with mean one; all alike where they carry nothing."""
    mean = float(np.mean(value_M)) if value_M.size else 0.0
    return value_M / mean if mean > 0 else np.ones(value_M.size)
