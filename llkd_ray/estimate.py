"""What labelling will take, from a sample: pure arithmetic on intervals.

Shapes in names: N texts of the sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llkd_ray.config import CapConfig
from llkd_ray.label_trie import LabelTrie
from llkd_ray.teacher_config import PriceConfig

Z = 1.96
"""Half of a 95 % interval, in standard errors."""


@dataclass(frozen=True)
class Estimate:
    """A number between ``low`` and ``high``; ``middle`` is None where nothing speaks for any in between."""

    low: float
    middle: float | None
    high: float

    @classmethod
    def exactly(cls, value: float) -> Estimate:
        return cls(value, value, value)

    @classmethod
    def between(cls, low: float, high: float) -> Estimate:
        return cls(low, low if low == high else None, high)

    def __add__(self, other: Estimate) -> Estimate:
        """Ends are added, which is never too narrow."""
        both = None if self.middle is None or other.middle is None else self.middle + other.middle
        return Estimate(self.low + other.low, both, self.high + other.high)

    def times(self, low: float, high: float | None = None) -> Estimate:
        """With a factor that is not negative: known, or between two numbers."""
        high = low if high is None else high
        middle = None if self.middle is None or low != high else self.middle * low
        return Estimate(self.low * low, middle, self.high * high)

    def words(self, digits: int = 0) -> str:
        """``1,200``, ``1,200 (1,100 to 1,300)`` or ``1,100 to 1,300``."""
        low, high = f"{self.low:,.{digits}f}", f"{self.high:,.{digits}f}"
        if low == high:
            return high
        return f"{low} to {high}" if self.middle is None else f"{self.middle:,.{digits}f} ({low} to {high})"


NOTHING = Estimate.exactly(0.0)


def mean(value_N: np.ndarray, population: float, taken: float, most: float = math.inf) -> Estimate:
    """The mean of ``taken`` values out of a population that the sample is drawn from, with a 95 % interval.

    W. G. Cochran, Sampling Techniques (1977), sections 2.6 to 2.8: the standard error of a mean, with the
    correction for a finite population; here once for the sample and once for what is taken. A population
    may be infinite. A value is known to be between 0 and ``most``, and so is the mean.
    """
    n = len(value_N)
    middle = float(np.mean(value_N))
    share = max(0.0, 1 / n - 1 / population) + max(0.0, 1 / taken - 1 / population)
    # One value says nothing of how far others are from it.
    spread = float(np.std(value_N, ddof=1)) if n > 1 else math.inf
    half = Z * spread * math.sqrt(share) if share else 0.0
    return Estimate(max(0.0, middle - half), middle, min(max(most, middle), middle + half))


# --- requests


@dataclass(frozen=True)
class Asking:
    """What a teacher is asked for one text, over the prompt's own tokens; from at least to at most."""

    prompts: tuple[int, int]
    """Times that the prompt is sent."""
    behind: tuple[int, int]
    """Tokens behind the prompt, of answers begun, over all requests."""
    answers: tuple[int, int]
    """Answer tokens, over all requests."""

    def __or__(self, other: Asking) -> Asking:
        """Where it is not known which of two ways it will be."""

        def either(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
            return min(a[0], b[0]), max(a[1], b[1])

        return Asking(
            either(self.prompts, other.prompts),
            either(self.behind, other.behind),
            either(self.answers, other.answers),
        )

    @property
    def is_known(self) -> bool:
        return all(least == most for least, most in (self.prompts, self.behind, self.answers))


def by_trie(trie: LabelTrie) -> Asking:
    """Label probabilities by the labels' token sequences: from the first tokens only to every branch."""
    questions = list(trie.questions())
    first, every = questions[0][1], sum(requests for _, requests in questions)
    behind = sum(after * requests for after, requests in questions)
    return Asking((first, every), (0, behind), (first, every))


def by_votes(samples: int, longest_answer: int, prompts: int = 1) -> Asking:
    """Some sampled answers of at most so many tokens; the prompt is sent once, or up to ``prompts`` times."""
    return Asking((1, prompts), (0, 0), (samples, samples * longest_answer))


# --- what it comes to


@dataclass(frozen=True)
class Bill:
    """What one teacher, or several, will be asked."""

    texts: Estimate
    prompt_tokens: Estimate
    answer_tokens: Estimate
    cost: Estimate

    def __add__(self, other: Bill) -> Bill:
        return Bill(
            self.texts + other.texts,
            self.prompt_tokens + other.prompt_tokens,
            self.answer_tokens + other.answer_tokens,
            self.cost + other.cost,
        )

    @property
    def tokens(self) -> Estimate:
        return self.prompt_tokens + self.answer_tokens

    def from_none_up(self) -> Bill:
        """Where any part of the texts may be asked for."""
        parts = self.texts, self.prompt_tokens, self.answer_tokens, self.cost
        return Bill(*(Estimate.between(0.0, part.high) for part in parts))


def bill(texts: Estimate, tokens: Estimate, asking: Asking, price: PriceConfig) -> Bill:
    """For so many texts whose prompts have ``tokens`` in all, each prompt counted once.

    A prompt that is sent again is in the prefix cache, so it costs what cached tokens cost; the first time
    it is taken for new, although what stands before the text is the same in all.
    """
    prompt_tokens = tokens.times(*asking.prompts) + texts.times(*asking.behind)
    answer_tokens = texts.times(*asking.answers)
    again = tokens.times(asking.prompts[0] - 1, asking.prompts[1] - 1) + texts.times(*asking.behind)
    cached = price.input if price.cached is None else price.cached
    cost = (
        tokens.times(price.input / 1e6) + again.times(cached / 1e6) + answer_tokens.times(price.output / 1e6)
    )
    return Bill(texts, prompt_tokens, answer_tokens, cost)


def hours(tokens: Estimate, slowest: float, fastest: float) -> Estimate:
    """For so many prompt tokens at a speed (tokens a second, all actors) between two."""
    if slowest == fastest:
        return tokens.times(1 / (3600 * fastest))
    return Estimate(tokens.low / (3600 * fastest), None, tokens.high / (3600 * slowest))


def what_caps_do(cap: CapConfig, whole: Bill, currency: str) -> list[str]:
    """For each cap that is set, whether it ends the run before all labels are had; one line each."""
    caps = (
        ("texts", cap.texts, whole.texts, "texts"),
        ("tokens", cap.tokens, whole.tokens, "tokens"),
        ("cost", cap.cost, whole.cost, currency),
    )
    return [
        f"budget.cap.{name} of {limit:,} {unit} {_verdict(limit, need)}"
        for name, limit, need, unit in caps
        if limit is not None
    ]


def _verdict(limit: float, need: Estimate) -> str:
    if limit >= need.high:
        return "is enough for all labels"
    least = limit / need.high
    if limit >= need.low:
        return f"may end the run before all labels are had, after {least:.0%} of them at the earliest"
    most = limit / need.low
    share = f"{most:.1%}" if f"{least:.1%}" == f"{most:.1%}" else f"{least:.1%} to {most:.1%}"
    return f"will end the run before all labels are had: after about {share} of them"
