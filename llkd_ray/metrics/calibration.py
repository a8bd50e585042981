"""Making probabilities comparable: batch calibration without gold, a temperature with gold.

A calibrator is fitted once, on what the teacher reads before the first round: hold-out and first tickets,
which are random draws from the pool. Later texts are chosen by the student, so neither their mean nor their
gold represents the pool. And a label must not change once a student has been trained on it, or a resumed run
would go on from other labels than it stopped at.

Shapes in names: N texts, C classes. ``mass_NC`` is probability mass as the teacher gave it, not normalised;
a row of zeros says nothing and stays uniform whatever the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llkd_ray.config.teacher import ConfidenceConfig
from llkd_ray.metrics.uncertainty import Floats, Ints, normalise

MIN_PROBABILITY = 1e-6
"""Lower bound of a label's probability under a temperature.

Servers return their 20 likeliest tokens only. The others are recorded as 0, although they are just below the
smallest returned one, about 1e-6. With 1e-12 as the bound, the few texts whose gold was not returned decide
the temperature, and make it far too high.
"""


def batch_calibrate(p_NC: Floats, mean_C: Floats, strength: float = 1.0) -> Floats:
    """float[N, C]: probabilities divided by a mean answer, to the power ``strength``.

    Batch Calibration (arXiv 2309.17249, eq. 3, in log space): what a prompt makes a label likely by,
    whatever the text, is estimated by the mean over a batch of texts. It takes the classes for equally
    frequent where ``strength`` is 1; 0 changes nothing.
    """
    return normalise(p_NC / np.maximum(mean_C, 1e-12) ** strength)


def fit_temperature(p_NC: Floats, gold_N: Ints) -> float:
    """The temperature at which the probabilities fit gold best, by log loss; between 0.05 and 20.

    Guo et al. 2017 (arXiv 1706.04599, sec. 4.2). The order of a text's labels stays; above 1 they
    were over-confident. Raises ValueError where there is no gold.

    scikit-learn 1.8 does the same, but only around an estimator that computes the probabilities itself and
    for the classes that its sample has; this takes probabilities that are there, of labels without gold, too.
    """
    if not gold_N.size:
        raise ValueError("gold_N is empty: a temperature needs texts with gold")
    # A second to import, which every process of a run would wait for and one needs.
    from scipy.optimize import minimize_scalar
    from sklearn.metrics import log_loss

    classes = np.arange(p_NC.shape[1])
    fit = minimize_scalar(
        lambda log_t: log_loss(gold_N, at_temperature(p_NC, np.exp(log_t)), labels=classes),
        bounds=(np.log(0.05), np.log(20)),
        method="bounded",
    )
    return float(np.exp(fit.x))


def cross_fitted(p_NC: Floats, gold_N: Ints, rng: np.random.Generator, folds: int = 5) -> Floats:
    """float[N, C]: each text at the temperature fitted on the other folds."""
    fold_N = rng.permutation(gold_N.size) % folds
    scaled_NC = np.empty_like(p_NC)
    for fold in np.unique(fold_N):
        is_in = fold_N == fold
        scaled_NC[is_in] = at_temperature(p_NC[is_in], fit_temperature(p_NC[~is_in], gold_N[~is_in]))
    return scaled_NC


def at_temperature(p_NC: Floats, temperature: float) -> Floats:
    """float[N, C]: the probabilities with their logarithms divided by a temperature."""
    log_NC = np.log(np.maximum(p_NC, MIN_PROBABILITY)) / temperature
    return normalise(np.exp(log_NC - log_NC.max(axis=1, keepdims=True)))


MIN_GOLD = 20
"""Texts with gold that a temperature is fitted on at least."""


@dataclass(frozen=True)
class MeanAnswer:
    """The mean of a teacher's distributions."""

    sum_C: Floats
    texts: int

    @classmethod
    def of(cls, mass_NC: Floats) -> MeanAnswer:
        """Rows without any mass do not count."""
        mass_NC = np.asarray(mass_NC, dtype=np.float64)
        said_N = mass_NC.sum(axis=1) > 0
        return cls(normalise(mass_NC[said_N]).sum(axis=0), int(np.count_nonzero(said_N)))

    def mean(self) -> Floats:
        """float[C], sums to one: the mean with one more text that is wholly undecided.

        That text is ours, not the paper's (arXiv 2309.17249): among hundreds of labels some get next to no
        mass in a few hundred texts, and a quotient by next to nothing would make one of them win wherever
        it gets a little.
        """
        return (self.sum_C + 1 / self.sum_C.size) / (self.texts + 1)


@dataclass(frozen=True)
class Calibrator:
    """Makes the probabilities that a run works with out of a teacher's answers, one text at a time."""

    method: str = "raw"
    """raw, batch, temperature or votes, as in :class:`~llkd_ray.config.teacher.ConfidenceConfig`."""
    prior_C: tuple[float, ...] | None = None
    """Of batch: the mean answer that is divided out."""
    strength: float = 1.0
    """Of batch: the power of the mean."""
    temperature: float | None = None
    """Of temperature; above 1 the teacher was over-confident."""
    fitted_on: int = 0
    """Texts that it was fitted on: of temperature, those with gold; 0 where there is nothing to fit."""

    @classmethod
    def fit(cls, config: ConfidenceConfig, mass_NC: Floats, gold_N: Ints) -> Calibrator:
        """Fit to what was read before the first round.

        ``gold_N`` is int[N], -1 where unknown; only temperature looks at it. Raises ValueError where the
        texts are too few for the method.
        """
        mass_NC, gold_N = np.asarray(mass_NC, dtype=np.float64), np.asarray(gold_N)
        if mass_NC.ndim != 2 or len(mass_NC) != len(gold_N):
            raise ValueError(
                f"mass_NC has shape {mass_NC.shape}: expected a row for each of {gold_N.size} texts"
            )
        if not (np.isfinite(mass_NC) & (mass_NC >= 0)).all():
            raise ValueError("mass_NC holds numbers that are no probabilities")
        if config.method == "batch":
            return cls.of_mean(MeanAnswer.of(mass_NC), config.strength)
        if config.method == "temperature":
            known_N = (gold_N >= 0) & (mass_NC.sum(axis=1) > 0)
            known = int(np.count_nonzero(known_N))
            if known < MIN_GOLD:
                raise ValueError(
                    f"teacher.confidence.method is 'temperature', but gold is known of {known} of the texts "
                    f"read before the first round: {MIN_GOLD} are needed; use 'batch' or 'raw', enlarge the "
                    "hold-out, or name the pool's column of gold"
                )
            fitted = fit_temperature(normalise(mass_NC[known_N]), gold_N[known_N])
            return cls("temperature", temperature=fitted, fitted_on=known)
        return cls(config.method)

    @classmethod
    def of_mean(cls, mean: MeanAnswer, strength: float) -> Calibrator:
        """Batch calibration by a mean that was gathered before. Raises ValueError where it is of no text."""
        if not mean.texts:
            raise ValueError(
                "teacher.confidence.method is 'batch', but the teacher has given no answer before the first "
                "round: use 'raw'"
            )
        prior_C = tuple(float(share) for share in mean.mean())
        return cls("batch", prior_C=prior_C, strength=strength, fitted_on=mean.texts)

    def apply(self, mass_NC: Floats) -> Floats:
        """float[N, C]: distributions over the labels. Each row depends on itself alone."""
        p_NC = normalise(mass_NC)
        if self.prior_C is not None:
            if len(self.prior_C) != p_NC.shape[1]:
                raise ValueError(
                    f"mass_NC has {p_NC.shape[1]} columns, but the calibrator was fitted to "
                    f"{len(self.prior_C)} labels"
                )
            said_N1 = np.asarray(mass_NC).sum(axis=1, keepdims=True) > 0
            return np.where(said_N1, batch_calibrate(p_NC, np.array(self.prior_C), self.strength), p_NC)
        if self.temperature is not None:
            return at_temperature(p_NC, self.temperature)
        return p_NC

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file; :meth:`from_dict` reads it back unchanged."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibrator:
        prior = values["prior_C"]
        return cls(**{**values, "prior_C": None if prior is None else tuple(prior)})
