"""Selection: which labelled texts the student trains on next.

A policy gives every candidate a value, pure numpy of columns and a random generator; the candidates of
largest value are taken, within class quotas if these are asked for. Policies are registered under their
names and may have options. Shapes in names: N candidates, M chosen, C classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llkd_ray.priors import Exponent, effective, tempered
from llkd_ray.signals import Floats, Ints, class_thresholds, rank_within_class
from llkd_ray.table import Candidates

NEVER = -np.inf
"""The value of a candidate that must not be taken."""


@dataclass(frozen=True)
class Judgement:
    """What a policy thinks of the candidates."""

    value_N: Floats
    """The largest are taken first; ``NEVER`` keeps a text out of this round."""
    weight_N: Floats | None = None
    """What each would count in the loss, on any scale; None: all alike."""


@dataclass(frozen=True)
class Selection:
    """The chosen rows, most wanted first, and what each counts in the loss (mean 1)."""

    row_M: Ints
    weight_M: Floats

    def __len__(self) -> int:
        return int(self.row_M.size)


SelectionRule = Callable[..., Judgement]

_KINDS = {bool: "truth value", float: "number", str: "word"}
_NO_ROWS, _NO_SIGNAL = np.empty(0, dtype=np.int64), np.empty(0)
_NO_CANDIDATES = Candidates(_NO_ROWS, _NO_ROWS, _NO_SIGNAL, _NO_SIGNAL, _NO_SIGNAL, _NO_SIGNAL, n_classes=2)


@dataclass(frozen=True)
class SelectionPolicy:
    """A selection rule and what it needs."""

    rule: SelectionRule
    uses_student: bool
    """Whether the student must score the candidates first."""
    quota: float | None = None
    """The class quota's exponent where the config does not name one; None: no quotas."""
    prior: float | None = None
    """The exponent of what the student is to reckon with where the config does not name one."""

    @property
    def options(self) -> dict[str, Any]:
        """The rule's options with their defaults."""
        keywords = list(inspect.signature(self.rule).parameters.values())[2:]
        return {keyword.name: keyword.default for keyword in keywords}

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError, with what there is, for an option or a value that the rule does not have."""
        if strangers := sorted(set(options) - set(self.options)):
            known = ", ".join(f"{name} ({value})" for name, value in self.options.items())
            raise ValueError(f"{strangers[0]!r} is no option of the policy; it has {known or 'none'}")
        for name, value in options.items():
            kind = type(self.options[name])
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(f"{name} is {value!r}: use a {_KINDS[kind]} like {self.options[name]}")
        # The rule itself knows its values; it refuses them here and not after hours of labelling.
        self.rule(_NO_CANDIDATES, np.random.default_rng(0), **options)

    def choose(
        self,
        candidates: Candidates,
        n: int,
        rng: np.random.Generator,
        *,
        quota: Exponent = None,
        trained_C: Ints | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Selection:
        """At most ``n`` candidates, those of largest value first.

        ``quota`` is the exponent of :func:`class_quotas`, ``off``, or None for the policy's own.
        """
        exponent = effective(quota, self.quota)
        # By row, so that a choice does not depend on how the candidates came.
        candidates = candidates.by_row()
        judgement = self.rule(candidates, rng, **(options or {}))
        index_M = best(judgement.value_N, candidates.label_N, n, exponent, trained_C, candidates.n_classes)
        weight_N = judgement.weight_N
        weight_M = np.ones(index_M.size) if weight_N is None else _mean_one(weight_N[index_M])
        return Selection(candidates.row_N[index_M], weight_M)


SELECTION: dict[str, SelectionPolicy] = {}


def selection_policy(
    name: str, *, uses_student: bool, quota: float | None = None, prior: float | None = None
) -> Callable[[SelectionRule], SelectionRule]:
    """Register a rule ``(candidates, rng, **options) -> Judgement``; candidates come in row order."""

    def register(rule: SelectionRule) -> SelectionRule:
        SELECTION[name] = SelectionPolicy(rule, uses_student, quota, prior)
        return rule

    return register


# --- baselines -----------------------------------------------------------------------------------------


@selection_policy("all", uses_student=False)
def judge_all(candidates: Candidates, rng: np.random.Generator) -> Judgement:
    """Whatever is labelled, in corpus order: with ``budget.train: 1.0``, all pseudo-labels."""
    return Judgement(np.zeros(len(candidates)))


@selection_policy("random", uses_student=False)
def judge_random(candidates: Candidates, rng: np.random.Generator) -> Judgement:
    """Uniformly at random, all weighing the same: the baseline of every comparison."""
    return Judgement(rng.random(len(candidates)))


@selection_policy("confidence", uses_student=False)
def judge_confidence(candidates: Candidates, rng: np.random.Generator) -> Judgement:
    """Where the teacher is surest."""
    return Judgement(candidates.confidence_N)


@selection_policy("entropy", uses_student=True)
def judge_entropy(candidates: Candidates, rng: np.random.Generator) -> Judgement:
    """Where the student's entropy is largest: uncertainty sampling. Without a student, at random."""
    return Judgement(_known(candidates.uncertainty_N, rng))


@selection_policy("margin", uses_student=True)
def judge_margin(candidates: Candidates, rng: np.random.Generator) -> Judgement:
    """Where the student's two best labels are closest. Without a student, at random."""
    return Judgement(_known(1.0 - candidates.margin_N.astype(np.float64), rng))


@selection_policy("product", uses_student=True)
def judge_product(candidates: Candidates, rng: np.random.Generator) -> Judgement:
    """Confidence × uncertainty, largest first, which is the weight in the loss, too."""
    value_N = candidates.confidence_N * _uncertainty(candidates)
    return Judgement(value_N, value_N)


@selection_policy("freematch", uses_student=False)
def judge_freematch(candidates: Candidates, rng: np.random.Generator) -> Judgement:
    """At random where the teacher's confidence reaches the self-adaptive threshold of its pseudo-class.

    FreeMatch's threshold (arXiv 2205.07246, eq. 8; see ``signals.class_thresholds``) on the teacher
    instead of the model in training; the student is not looked at.
    """
    return Judgement(np.where(_sure(candidates), rng.random(len(candidates)), NEVER))


# --- LLKD and what came of it --------------------------------------------------------------------------


@selection_policy("llkd", uses_student=True)
def judge_llkd(
    candidates: Candidates,
    rng: np.random.Generator,
    *,
    thresholds: str = "class",
    order: str = "random",
    weights: bool = True,
) -> Judgement:
    """LLKD (arXiv 2411.08028) as we read it: the teacher is sure, and the student is not.

    A text passes where the teacher's confidence and the student's uncertainty both reach their threshold:
    that of its pseudo-class in FreeMatch's form (``thresholds: class``), or the mean over all texts
    (``global``). The paper takes all that pass in a step; a round has a budget, so those that pass are
    taken at random (``order: random``) or by confidence × uncertainty (``product``). Fewer than the
    budget may pass; the rest of the budget then waits for a later round. A text's weight in the loss is
    confidence × uncertainty (``weights``). Before its first round the student has no opinion; then
    confidence alone decides.

    Raises ValueError for an option's value that is unknown.
    """
    _one_of("thresholds", thresholds, ("class", "global"))
    _one_of("order", order, ("random", "product"))
    uncertainty_N = _uncertainty(candidates)
    passing_N = np.ones(len(candidates), dtype=bool)
    for signal_N in (candidates.confidence_N, uncertainty_N):
        if thresholds == "class":
            passing_N &= _over_class_threshold(signal_N, candidates)
        elif len(candidates):
            passing_N &= signal_N >= np.mean(signal_N)
    product_N = candidates.confidence_N * uncertainty_N
    has_student = not np.isnan(candidates.uncertainty_N).all()
    value_N = product_N if order == "product" and has_student else rng.random(len(candidates))
    return Judgement(np.where(passing_N, value_N, NEVER), product_N if weights and has_student else None)


@selection_policy("llkd_rank", uses_student=True, quota=0.25, prior=0.5)
def judge_llkd_rank(candidates: Candidates, rng: np.random.Generator) -> Judgement:
    """Rank of the confidence within its pseudo-class × the student's uncertainty, largest first.

    Ours. Raw confidence cannot be compared between classes (``signals.rank_within_class``). Without a
    student, the rank times a random number, so that the first round is not only the easiest texts.
    """
    rank_N = rank_within_class(candidates.confidence_N, candidates.label_N)
    return Judgement(rank_N * _known(candidates.uncertainty_N, rng))


@selection_policy("llkd_sample", uses_student=True, quota=0.25, prior=0.5)
def judge_llkd_sample(
    candidates: Candidates,
    rng: np.random.Generator,
    *,
    trust: float = 4.0,
    need: float = 0.5,
    support: float = 0.5,
) -> Judgement:
    """A weighted random sample: the surer the teacher and the less sure the student, the likelier.

    Ours. A text's weight in the draw is ``rank ** trust × uncertainty ** need × support ** support``:
    the rank of the teacher's confidence within its pseudo-class, the student's entropy, and the
    probability that the student gives to the pseudo-label. The last keeps out what the student is unsure
    of because the label is wrong. Drawing instead of taking the largest keeps a round from filling with
    one kind of text. The draw is without replacement (Efraimidis & Spirakis 2006: the largest of
    u ** (1 / weight), here in logarithms).

    Raises ValueError for a negative exponent, which would turn its factor round.
    """
    for option, exponent in (("trust", trust), ("need", need), ("support", support)):
        if exponent < 0:
            raise ValueError(f"{option} is {exponent}: use 0, which leaves it out, or more")
    rank_N = rank_within_class(candidates.confidence_N, candidates.label_N)
    student_N = _uncertainty(candidates) ** need
    student_N = student_N * np.nan_to_num(candidates.support_N.astype(np.float64), nan=1.0) ** support
    weight_N = np.maximum(rank_N**trust * student_N, 1e-9)
    # 1 - random() lies in (0, 1], so the logarithm is finite.
    return Judgement(np.log(1.0 - rng.random(len(candidates))) / weight_N)


# --- taking the best, within quotas --------------------------------------------------------------------


def best(
    value_N: Floats,
    label_N: Ints,
    n: int,
    quota: float | None = None,
    trained_C: Ints | None = None,
    n_classes: int | None = None,
) -> Ints:
    """int[M]: the places of the at most ``n`` largest values, largest first, within class quotas.

    With a quota, each class first fills its share; what is left over then goes to the largest values of
    any class. Ties go to the lower place.
    """
    allowed_N = np.flatnonzero(value_N > NEVER)
    if quota is None:
        return allowed_N[_largest(value_N[allowed_N], n)]
    n_classes = n_classes or int(label_N.max(initial=0)) + 1
    share_C = class_quotas(np.bincount(label_N, minlength=n_classes), n, quota, trained_C)
    taken_N = np.zeros(value_N.size, dtype=bool)
    for c in range(n_classes):
        of_class = allowed_N[label_N[allowed_N] == c]
        taken_N[of_class[_largest(value_N[of_class], int(share_C[c]))]] = True
    rest = allowed_N[~taken_N[allowed_N]]
    taken_N[rest[_largest(value_N[rest], n - int(taken_N.sum()))]] = True
    chosen = np.flatnonzero(taken_N)
    return chosen[np.argsort(-value_N[chosen], kind="stable")]


def class_quotas(count_C: Ints, n: int, quota: float, trained_C: Ints | None = None) -> Ints:
    """int[C], summing to at most ``n``: how many texts each pseudo-class should bring to a round.

    All that is trained on by the end of the round, earlier rounds included, is to be shared out between
    the classes as ``priors.tempered`` says. A class that already has its share gets nothing. Remainders of
    a text go to the largest fractions, the rarer class first.
    """
    trained_C = np.zeros_like(count_C) if trained_C is None else trained_C
    # Classes are known by what is left and what was taken of them.
    seen_C = count_C + trained_C
    due_C = np.maximum(tempered(seen_C, quota) * (n + trained_C.sum()) - trained_C, 0.0)
    if not due_C.sum():
        return np.zeros_like(count_C)
    due_C *= n / due_C.sum()
    share_C = np.floor(due_C).astype(np.int64)
    by_fraction = np.lexsort((seen_C, -(due_C - share_C)))
    share_C[by_fraction[: n - int(share_C.sum())]] += 1
    return share_C


def _largest(value_N: Floats, n: int) -> Ints:
    """Places of the ``n`` largest, largest first, ties by place."""
    if n <= 0:
        return np.empty(0, dtype=np.int64)
    if n < value_N.size:
        # All that might be among them, ties with the last included, and only those are sorted.
        worst = np.partition(value_N, value_N.size - n)[value_N.size - n]
        near = np.flatnonzero(value_N >= worst)
        return near[np.argsort(-value_N[near], kind="stable")[:n]]
    return np.argsort(-value_N, kind="stable")


def _uncertainty(candidates: Candidates) -> Floats:
    """The student's uncertainty; a text that it never scored is as unknown to it as can be."""
    return np.nan_to_num(candidates.uncertainty_N.astype(np.float64), nan=1.0)


def _known(signal_N: Floats, rng: np.random.Generator) -> Floats:
    """The student's signal, 1 where it is missing, and random numbers where it is missing everywhere."""
    if np.isnan(signal_N).all():
        return rng.random(signal_N.size)
    return np.nan_to_num(signal_N.astype(np.float64), nan=1.0)


def _sure(candidates: Candidates) -> np.ndarray:
    return _over_class_threshold(candidates.confidence_N, candidates)


def _over_class_threshold(signal_N: Floats, candidates: Candidates) -> np.ndarray:
    needed_C = class_thresholds(signal_N, candidates.label_N, candidates.n_classes)
    # Where all texts have the same signal, its mean is equal to it, and rounding must not decide.
    return signal_N >= needed_C[candidates.label_N] - 1e-9


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{option} is {value!r}: use {' or '.join(known)}")


def _mean_one(value_M: Floats) -> Floats:
    """Values as weights with mean one; all alike where they carry nothing."""
    mean = float(np.mean(value_M)) if value_M.size else 0.0
    return value_M / mean if mean > 0 else np.ones(value_M.size)
