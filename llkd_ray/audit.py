"""Which labels a person should look at, and what a random sample of them says of all. Pure.

Three kinds of texts: a *random* sample of all that is labelled; of the others those where teacher and
student *disagree* and both are sure; and of the rest those where the student is *unsure*. Only the random
sample tells how good the labels are: the others were chosen because they are probably wrong, or hard.

Shapes in names: N labelled texts, M chosen ones, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from llkd_ray.chance import hash_uniform
from llkd_ray.signals import Floats, Ints, confidence, margin

RANDOM, DISAGREE, UNSURE = "random", "disagree", "unsure"
INTERVAL = 0.95
"""Level of the intervals; Clopper and Pearson's, which never claim too much."""
_KEY = 0x41554449
"""Keeps the sample's chance apart from other chance of the same seed."""


@dataclass(frozen=True)
class Wanted:
    """How many texts of each kind. Of ``random``, those that are answered already count."""

    random: int = 100
    disagree: int = 50
    unsure: int = 50


def random_order(row_N: Ints, seed: int) -> Ints:
    """int64[N]: places of the rows in the order in which the random sample takes them.

    A row's place among others depends on itself and the seed, so a larger sample holds the smaller one.
    """
    return np.argsort(hash_uniform(seed ^ _KEY, row_N), kind="stable")


def choose(
    row_N: Ints, p_teacher_NC: Floats, p_student_NC: Floats, answered_N: np.ndarray, wanted: Wanted, seed: int
) -> tuple[Ints, list[str], np.ndarray]:
    """Places of the texts that a person is to be asked about, why each, and bool[N]: the random sample.

    The sample is the first ``wanted.random`` of its order, those among them that are answered included, which
    are not asked about again; the other kinds are the best of what is neither answered nor in the sample.
    The order of the answer is chance, for what stands together is answered alike.
    """
    order_N = random_order(row_N, seed)
    is_random_N = np.zeros(len(row_N), dtype=bool)
    is_random_N[order_N[: wanted.random]] = True
    why = dict.fromkeys(np.flatnonzero(is_random_N & ~answered_N).tolist(), RANDOM)

    label_N = p_teacher_NC.argmax(axis=1)
    both_sure_N = confidence(p_teacher_NC) * confidence(p_student_NC)
    for kind, number, open_N, value_N in (
        (DISAGREE, wanted.disagree, p_student_NC.argmax(axis=1) != label_N, both_sure_N),
        (UNSURE, wanted.unsure, np.ones(len(row_N), dtype=bool), -margin(p_student_NC)),
    ):
        there_N = open_N & ~answered_N & ~is_random_N
        there_N[list(why)] = False
        place_M = np.flatnonzero(there_N)
        best_M = place_M[np.argsort(-value_N[place_M], kind="stable")][:number]
        why |= dict.fromkeys(best_M.tolist(), kind)
    chosen = [place for place in order_N.tolist() if place in why]
    return np.array(chosen, dtype=np.int64), [why[place] for place in chosen], is_random_N


def share(right: int, asked: int) -> dict[str, Any]:
    """A share of texts with its interval of ``INTERVAL``; None stands for what nobody was asked about."""
    low = high = None
    if asked:
        interval = binomtest(right, asked).proportion_ci(INTERVAL, method="exact")
        low, high = float(interval.low), float(interval.high)
    return {
        "texts": asked,
        "right": right,
        "share": right / asked if asked else None,
        "interval": [low, high],
    }


def estimate(
    answers: Mapping[int, int],
    row_M: Ints,
    is_random_M: np.ndarray,
    teacher_M: Ints,
    student_M: Ints,
    why_M: list[str],
    trained_M: np.ndarray,
    labelled: int,
) -> dict[str, Any]:
    """What the answers say of the texts that were asked about, for audit/estimate.json.

    ``pseudo_labels``: of the random sample, and so of all ``labelled`` texts, without bias where all of it is
    answered; ``trained_on``: of those in it that the student was trained on, a random sample of such;
    ``student``: its answers on those that it was not trained on; ``asked_for``: how many of the texts of each
    kind the teacher has right, which says nothing of others.
    """
    said_M = np.array([answers.get(row, -1) for row in row_M.tolist()])
    known_M, right_M = said_M >= 0, teacher_M == said_M
    sample_M = is_random_M & known_M
    by_kind = {}
    for kind in (RANDOM, DISAGREE, UNSURE):
        of_kind_M = known_M & np.array([why == kind for why in why_M], dtype=bool)
        by_kind[kind] = {"texts": int(of_kind_M.sum()), "right": int((right_M & of_kind_M).sum())}
    unseen_M = sample_M & ~trained_M
    return {
        "labelled": labelled,
        "answered": int(known_M.sum()),
        "sample": int(is_random_M.sum()),
        "unanswered_in_sample": int((is_random_M & ~known_M).sum()),
        "pseudo_labels": share(int((right_M & sample_M).sum()), int(sample_M.sum())),
        "trained_on": share(int((right_M & sample_M & trained_M).sum()), int((sample_M & trained_M).sum())),
        "student": share(int(((student_M == said_M) & unseen_M).sum()), int(unseen_M.sum())),
        "asked_for": by_kind,
    }


def in_words(found: Mapping[str, Any]) -> list[str]:
    """Lines for people."""
    lines = [
        f"pseudo-labels: {_share_in_words(found['pseudo_labels'])}, by the random sample alone, which stands "
        f"for all {found['labelled']:,} labelled texts without bias; the other texts were chosen for being "
        "doubtful and count nothing here"
    ]
    if found["unanswered_in_sample"]:
        lines.append(
            f"{found['unanswered_in_sample']} of the random sample's {found['sample']} texts have no answer: "
            "if those are the hard ones, the labels are worse than this"
        )
    if found["trained_on"]["texts"]:
        lines.append(f"pseudo-labels that the student was trained on: {_share_in_words(found['trained_on'])}")
    if found["student"]["texts"]:
        lines.append(f"student, on texts it was not trained on: {_share_in_words(found['student'])}")
    return lines


def _share_in_words(one: Mapping[str, Any]) -> str:
    if not one["texts"]:
        return "unknown, for none is answered"
    low, high = one["interval"]
    return f"{one['right']} of {one['texts']} right, {one['share']:.3f} [{low:.3f}, {high:.3f}]"
