"""Selection: which labelled texts the student trains on next.

A policy gives every candidate a value, with numpy on columns. The candidates with the largest values are
selected, within class quotas where these are set. A policy sees a chunk of the candidates and statistics of
all of them, so the choice does not depend on how they are divided (``search.py``). Policies are registered by
name and may have options.

Quotas show the student more texts of the rare pseudo-classes than the pool has, so that it learns them; on
its own, that would also make it predict them too often. So the class prior that its predictions assume
(:func:`target_prior`) is set separately from the class shares it is trained on.

Shapes in names: N candidates of a chunk, M chosen, C classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import SelectionConfig
from llkd_ray.metrics.uncertainty import Floats, Ints, RowRandom
from llkd_ray.selection.search import NEVER, Pool, PoolStats, TopK, known
from llkd_ray.selection.table import Candidates, Chunked, slices


@dataclass(frozen=True)
class Judgement:
    """A policy's values and loss weights of the candidates."""

    value_N: Floats
    """The largest are selected first; ``NEVER`` excludes a text from this round."""
    weight_N: Floats | None = None
    """Weight of each text in the loss, on any scale; None: all equal."""


@dataclass(frozen=True)
class Selection:
    """The chosen rows, largest value first, and the weight of each in the loss (mean 1)."""

    row_M: Ints
    weight_M: Floats
    candidates: int
    """Number of candidates they were chosen from."""
    thresholds: Mapping[str, Floats] | None = None
    """float64[C] of each signal: the threshold of each class; None where the policy has none."""

    def __len__(self) -> int:
        return int(self.row_M.size)


SelectionRule = Callable[..., Judgement]
ThresholdsOf = Callable[[Pool, Mapping[str, Any]], dict[str, Floats]]
"""From a pool and a policy's options; see ``Selection.thresholds``."""
_TIE = 1e-9
"""Where all texts have the same signal, its mean is equal to it, and rounding must not decide."""
_KINDS = {bool: "truth value", float: "number", str: "word"}
_NO_ROWS, _NO_SIGNAL = np.empty(0, dtype=np.int64), np.empty(0)
_NO_CANDIDATES = Candidates(_NO_ROWS, _NO_ROWS, _NO_SIGNAL, _NO_SIGNAL, _NO_SIGNAL, _NO_SIGNAL, n_classes=2)


@dataclass(frozen=True)
class SelectionPolicy:
    """A selection rule and its requirements."""

    rule: SelectionRule
    uses_student: bool
    """Whether the student must score the candidates first."""
    quota: float | None = None
    """The class quota's exponent where the config does not set one; None: no quotas."""
    prior: float | None = None
    """The exponent of the target prior where the config does not set one."""
    ranks: bool = False
    """Whether the rule uses :meth:`Pool.rank`, which requires counts of confidences by grade."""
    thresholds: ThresholdsOf | None = None
    """The thresholds, for the report."""

    @property
    def options(self) -> dict[str, Any]:
        """The rule's options with their defaults."""
        keywords = list(inspect.signature(self.rule).parameters.values())[2:]
        return {keyword.name: keyword.default for keyword in keywords}

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError, with the known options, for an unknown option or value."""
        if unknown := sorted(set(options) - set(self.options)):
            known = ", ".join(f"{name} ({value})" for name, value in self.options.items())
            raise ValueError(f"{unknown[0]!r} is no option of the policy; it has {known or 'none'}")
        for name, value in options.items():
            kind = type(self.options[name])
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(f"{name} is {value!r}: use a {_KINDS[kind]} like {self.options[name]}")
        # The rule checks its options' values: run it now, so that it does not fail after hours of labelling.
        self.rule(_NO_CANDIDATES, Pool(PoolStats.empty(2, self.ranks), RowRandom(0)), **options)

    def choose(
        self,
        candidates: Candidates | Chunked[Candidates],
        n: int,
        rng: np.random.Generator,
        *,
        quota: Exponent = None,
        trained_C: Ints | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Selection:
        """At most ``n`` candidates, those with the largest values first.

        ``quota`` is the exponent of :func:`class_quotas`, ``off``, or None for the policy's own.
        """
        chunks = in_order(candidates)
        stats = PoolStats.of(chunks, self.ranks)
        exponent = effective(quota, self.quota)
        share_C = None if exponent is None else class_quotas(stats.count_C, n, exponent, trained_C)
        pool = Pool(stats, RowRandom.from_rng(rng))
        options, top = options or {}, TopK(n, share_C)
        for chunk in chunks:
            judgement = self.rule(chunk, pool, **options)
            top.add(chunk.row_N, judgement.value_N, chunk.label_N, judgement.weight_N)
        chosen = top.best()
        thresholds = self.thresholds and self.thresholds(pool, options)
        return Selection(chosen.row_M, _mean_one(chosen.weight_M), int(stats.count_C.sum()), thresholds)


def in_order(candidates: Candidates | Chunked[Candidates]) -> Iterable[Candidates]:
    """Chunks by ascending row, so that a choice does not depend on the order of the input."""
    if not isinstance(candidates, Candidates):
        return candidates
    by_row = candidates.by_row()
    return [by_row.take(part) for part in slices(len(by_row))]


SELECTION: dict[str, SelectionPolicy] = {}


def find_selection(settings: SelectionConfig) -> SelectionPolicy:
    """The registered policy; raises ConfigError where its name or one of its options is unknown."""
    if settings.policy not in SELECTION:
        known = ", ".join(sorted(SELECTION))
        raise ConfigError(f"selection.policy: {settings.policy!r} is unknown; there are {known}")
    policy = SELECTION[settings.policy]
    try:
        policy.check_options(settings.options)
    except ValueError as error:
        raise ConfigError(f"selection.options: {error}") from None
    return policy


def selection_policy(
    name: str,
    *,
    uses_student: bool,
    quota: float | None = None,
    prior: float | None = None,
    ranks: bool = False,
    thresholds: ThresholdsOf | None = None,
) -> Callable[[SelectionRule], SelectionRule]:
    """Register a rule ``(candidates, pool, **options) -> Judgement``.

    It judges each candidate by its columns and by ``pool``, which has the statistics of all candidates and
    the random numbers; never by other candidates of the chunk.
    """

    def register(rule: SelectionRule) -> SelectionRule:
        SELECTION[name] = SelectionPolicy(rule, uses_student, quota, prior, ranks, thresholds)
        return rule

    return register


# --- baselines -----------------------------------------------------------------------------------------


@selection_policy("all", uses_student=False)
def judge_all(candidates: Candidates, pool: Pool) -> Judgement:
    """In corpus order: with ``budget.train: 1.0``, all pseudo-labels."""
    return Judgement(np.zeros(len(candidates)))


@selection_policy("random", uses_student=False)
def judge_random(candidates: Candidates, pool: Pool) -> Judgement:
    """Uniformly at random, with equal weights: the baseline of every comparison."""
    return Judgement(pool.random(candidates))


@selection_policy("confidence", uses_student=False)
def judge_confidence(candidates: Candidates, pool: Pool) -> Judgement:
    """By the teacher's confidence, largest first."""
    return Judgement(candidates.confidence_N)


@selection_policy("entropy", uses_student=True)
def judge_entropy(candidates: Candidates, pool: Pool) -> Judgement:
    """By the student's entropy, largest first: uncertainty sampling. Without a student, at random."""
    return Judgement(_student(candidates.uncertainty_N, candidates, pool))


@selection_policy("margin", uses_student=True)
def judge_margin(candidates: Candidates, pool: Pool) -> Judgement:
    """By the student's margin between its two best labels, smallest first. Without a student, at random."""
    return Judgement(_student(1.0 - candidates.margin_N.astype(np.float64), candidates, pool))


@selection_policy("product", uses_student=True)
def judge_product(candidates: Candidates, pool: Pool) -> Judgement:
    """Confidence × uncertainty, largest first; also the weight in the loss."""
    value_N = candidates.confidence_N * known(candidates.uncertainty_N)
    return Judgement(value_N, value_N)


@selection_policy(
    "freematch",
    uses_student=False,
    thresholds=lambda pool, options: {"confidence": pool.confidence_threshold_C},
)
def judge_freematch(candidates: Candidates, pool: Pool) -> Judgement:
    """At random where the teacher's confidence reaches the self-adaptive threshold of its pseudo-class.

    FreeMatch's threshold (arXiv 2205.07246, eq. 8; see ``search.class_thresholds``) on the teacher
    instead of the model in training; the student is not used.
    """
    return Judgement(np.where(_is_sure(candidates, pool), pool.random(candidates), NEVER))


# --- LLKD and its variants -----------------------------------------------------------------------------


def _llkd_thresholds(pool: Pool, options: Mapping[str, Any]) -> dict[str, Floats]:
    """Those of :func:`judge_llkd`; without scores of the student, only that of the confidence."""
    found = {"confidence": pool.confidence_threshold_C, "uncertainty": pool.uncertainty_threshold_C}
    if options.get("thresholds") == "global":
        found = {
            name: np.full(pool.stats.count_C.size, mean) for name, mean in zip(found, pool.means, strict=True)
        }
    return found if pool.is_scored else {"confidence": found["confidence"]}


@selection_policy("llkd", uses_student=True, thresholds=_llkd_thresholds)
def judge_llkd(
    candidates: Candidates,
    pool: Pool,
    *,
    thresholds: str = "class",
    order: str = "random",
    weights: bool = True,
) -> Judgement:
    """LLKD (arXiv 2411.08028) as we read it: the teacher is confident, and the student is not.

    A text passes where the teacher's confidence and the student's uncertainty both reach their threshold:
    that of its pseudo-class in FreeMatch's form (``thresholds: class``), or the mean over all texts
    (``global``). The paper uses all texts that pass in a step; a round has a budget, so passing texts are
    selected at random (``order: random``) or by confidence × uncertainty (``product``). If fewer than the
    budget pass, the rest of the budget is left for a later round. A text's weight in the loss is
    confidence × uncertainty (``weights``). Before the first round there are no student scores; then
    confidence alone decides.

    Raises ValueError for an unknown value of an option.
    """
    _one_of("thresholds", thresholds, ("class", "global"))
    _one_of("order", order, ("random", "product"))
    uncertainty_N = known(candidates.uncertainty_N)
    if thresholds == "class":
        sure_N = _is_sure(candidates, pool)
        unsure_N = uncertainty_N >= pool.uncertainty_threshold_C[candidates.label_N] - _TIE
    else:
        sure_N = candidates.confidence_N >= pool.means[0] - _TIE
        unsure_N = uncertainty_N >= pool.means[1] - _TIE
    product_N = candidates.confidence_N * uncertainty_N
    value_N = product_N if order == "product" and pool.is_scored else pool.random(candidates)
    return Judgement(
        np.where(sure_N & unsure_N, value_N, NEVER), product_N if weights and pool.is_scored else None
    )


@selection_policy("llkd_rank", uses_student=True, quota=0.25, prior=0.5, ranks=True)
def judge_llkd_rank(candidates: Candidates, pool: Pool) -> Judgement:
    """Rank of the confidence within its pseudo-class × the student's uncertainty, largest first.

    Our own policy. Raw confidence is not comparable between classes (``search.mean_ranks``). Without a
    student, the rank times a random number, so that the first round does not consist of the easiest texts.
    """
    rank_N = pool.rank(candidates)
    return Judgement(rank_N * _student(candidates.uncertainty_N, candidates, pool))


@selection_policy("llkd_sample", uses_student=True, quota=0.25, prior=0.5, ranks=True)
def judge_llkd_sample(
    candidates: Candidates,
    pool: Pool,
    *,
    trust: float = 4.0,
    need: float = 0.5,
    support: float = 0.5,
) -> Judgement:
    """A weighted random sample: more likely with a more confident teacher and a less confident student.

    Our own policy. A text's weight in the draw is
    ``rank ** trust × uncertainty ** need × support ** support``: the rank of the teacher's confidence
    within its pseudo-class, the student's entropy, and the student's probability of the pseudo-label. The
    last factor avoids texts on which the student is uncertain because the label is wrong. Drawing instead of
    taking the largest prevents a round with only one kind of text. The draw is without replacement
    (Efraimidis & Spirakis 2006: the largest of u ** (1 / weight), here in logarithms).

    Raises ValueError for a negative exponent, which would invert its factor.
    """
    for option, exponent in (("trust", trust), ("need", need), ("support", support)):
        if exponent < 0:
            raise ValueError(f"{option} is {exponent}: use 0, which switches it off, or more")
    rank_N = pool.rank(candidates)
    student_N = known(candidates.uncertainty_N) ** need
    student_N = student_N * known(candidates.support_N) ** support
    weight_N = np.maximum(rank_N**trust * student_N, 1e-9)
    # 1 - random() lies in (0, 1], so the logarithm is finite.
    return Judgement(np.log(1.0 - pool.random(candidates)) / weight_N)


# --- quotas -------------------------------------------------------------------------------------------


def class_quotas(count_C: Ints, n: int, quota: float, trained_C: Ints | None = None) -> Ints:
    """int[C], summing to at most ``n``: how many texts each pseudo-class should contribute to a round.

    All texts trained on by the end of the round, earlier rounds included, are divided between the classes
    by :func:`tempered`. A class that already has its share gets nothing. Rounding favours the largest
    fractions, then the rarer class.
    """
    trained_C = np.zeros_like(count_C) if trained_C is None else trained_C
    # The size of a class is its remaining texts plus those already trained on.
    seen_C = count_C + trained_C
    due_C = np.maximum(tempered(seen_C, quota) * (n + trained_C.sum()) - trained_C, 0.0)
    if not due_C.sum():
        return np.zeros_like(count_C)
    due_C *= n / due_C.sum()
    share_C = np.floor(due_C).astype(np.int64)
    by_fraction = np.lexsort((seen_C, -(due_C - share_C)))
    share_C[by_fraction[: n - int(share_C.sum())]] += 1
    return share_C


def _student(signal_N: Floats, candidates: Candidates, pool: Pool) -> Floats:
    """The student's signal; 1 where it is missing, random numbers if it is missing for all texts."""
    return known(signal_N) if pool.is_scored else pool.random(candidates)


def _is_sure(candidates: Candidates, pool: Pool) -> np.ndarray:
    return candidates.confidence_N >= pool.confidence_threshold_C[candidates.label_N] - _TIE


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{option} is {value!r}: use {' or '.join(known)}")


def _mean_one(value_M: Floats) -> Floats:
    """Values as weights with mean one; all equal where the values are zero."""
    mean = float(np.mean(value_M)) if value_M.size else 0.0
    return value_M / mean if mean > 0 else np.ones(value_M.size)


Exponent = float | Literal["off"] | None
"""As in the config: a number, ``off``, or None for the policy's own."""


def effective(setting: Exponent, own: float | None) -> float | None:
    """The exponent in effect; None for none."""
    if setting is None:
        return own
    return None if setting == "off" else setting


def tempered(count_C: Ints, exponent: float) -> Floats:
    """float[C], summing to one: shares in proportion to ``count ** exponent``; a class without texts gets 0.

    1 keeps the proportions, 0 makes all classes equal. Values in between reduce the imbalance: weakly
    supervised training uses 0.5 (Mahajan et al., arXiv 1805.00932, sec. 2.2), multilingual pre-training 0.3
    (XLM-R, arXiv 1911.02116, sec. 3.1). All zeros without texts.
    """
    weight_C = np.where(count_C > 0, np.maximum(count_C, 1) ** float(exponent), 0.0)
    return weight_C / max(weight_C.sum(), 1.0)


def target_prior(
    count_C: Ints, setting: Exponent, own: float | None, known: Sequence[float]
) -> Floats | None:
    """float[C], summing to one: the class prior that the student's predictions assume; None: as in training.

    Takes the teacher's counts, the config's exponent and the policy's own, and the known shares, if any.
    Known shares take precedence over the counts, which contain the teacher's bias: it over-uses some labels.
    For the same reason the counts are tempered by the exponent.
    """
    exponent = effective(setting, own)
    if known and setting != "off":
        return np.array(known, dtype=np.float64)
    return None if exponent is None else tempered(count_C, exponent)
