"""Calibration of the teacher's probabilities: batch calibration without gold, a temperature with gold.

A calibrator is fitted once, on the texts labelled before the first round: hold-out and first tickets, which
are random draws from the pool. Later texts are acquired with the student's scores, so neither their mean nor
their gold is representative of the pool. In addition, a label must not change after a student has been
trained on it; otherwise a resumed run would continue with different labels.

Shapes in names: N texts, C classes. ``mass_NC`` is the teacher's probability mass, not normalised; a row of
zeros carries no information and becomes uniform with every method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llkd_ray.config.teacher import ConfidenceConfig
from llkd_ray.metrics.uncertainty import Floats, Ints, normalise

MIN_PROBABILITY = 1e-6
"""Lower bound of a label's probability when a temperature is applied.

Servers return only the 20 most likely tokens. The others are recorded as 0, although their probability is
just below the smallest returned one, about 1e-6. With a bound of 1e-12, the few texts whose gold label was
not returned dominate the fit, and the temperature becomes far too high.
"""


def batch_calibrate(p_NC: Floats, mean_C: Floats, strength: float = 1.0) -> Floats:
    """float[N, C]: probabilities divided by the mean answer to the power ``strength``.

    Batch Calibration (arXiv 2309.17249, eq. 3, in log space): the prompt's bias towards each label is
    estimated by the mean over a batch of texts. A ``strength`` of 1 assumes equally frequent classes; 0
    changes nothing.
    """
    return normalise(p_NC / np.maximum(mean_C, 1e-12) ** strength)


TEMPERATURES = (0.05, 20.0)
"""Lowest and highest temperature that is tried."""


def fit_temperature(p_NC: Floats, gold_N: Ints) -> float:
    """The temperature that minimises the log loss on gold, within ``TEMPERATURES``.

    Guo et al. 2017 (arXiv 1706.04599, sec. 4.2). The ranking of a text's labels is unchanged; a temperature
    above 1 means that the probabilities were over-confident. Raises ValueError if there is no gold.

    scikit-learn 1.8 offers the same, but only wrapped around an estimator that computes the probabilities,
    and only for classes that occur in its sample. This function takes existing probabilities, including
    those of labels without gold.
    """
    if not gold_N.size:
        raise ValueError("gold_N is empty: a temperature needs texts with gold")
    # Importing takes a second, and only one process of a run needs it.
    from scipy.optimize import minimize_scalar
    from sklearn.metrics import log_loss

    classes = np.arange(p_NC.shape[1])
    fit = minimize_scalar(
        lambda log_t: log_loss(gold_N, at_temperature(p_NC, np.exp(log_t)), labels=classes),
        bounds=tuple(np.log(TEMPERATURES)),
        method="bounded",
    )
    return float(np.exp(fit.x))


def cross_fitted(p_NC: Floats, gold_N: Ints, rng: np.random.Generator, folds: int = 5) -> Floats:
    """float[N, C]: each text's probabilities at the temperature fitted on the other folds."""
    fold_N = rng.permutation(gold_N.size) % folds
    scaled_NC = np.empty_like(p_NC)
    for fold in np.unique(fold_N):
        is_in = fold_N == fold
        scaled_NC[is_in] = at_temperature(p_NC[is_in], fit_temperature(p_NC[~is_in], gold_N[~is_in]))
    return scaled_NC


def at_temperature(p_NC: Floats, temperature: float) -> Floats:
    """float[N, C]: the probabilities after dividing their logarithms by a temperature."""
    log_NC = np.log(np.maximum(p_NC, MIN_PROBABILITY)) / temperature
    return normalise(np.exp(log_NC - log_NC.max(axis=1, keepdims=True)))


MIN_GOLD = 20
"""Minimum number of texts with gold to fit a temperature."""


@dataclass(frozen=True)
class MeanAnswer:
    """The mean of a teacher's distributions."""

    sum_C: Floats
    texts: int

    @classmethod
    def of(cls, mass_NC: Floats) -> MeanAnswer:
        """The mean over all rows with nonzero mass."""
        mass_NC = np.asarray(mass_NC, dtype=np.float64)
        said_N = mass_NC.sum(axis=1) > 0
        return cls(normalise(mass_NC[said_N]).sum(axis=0), int(np.count_nonzero(said_N)))

    def mean(self) -> Floats:
        """float[C], sums to one: the mean including one additional text with a uniform distribution.

        The additional text is our extension of the paper (arXiv 2309.17249): with hundreds of labels, some
        get almost no mass in a few hundred texts, and dividing by a value near 0 would make such a label win
        wherever it gets a little mass.
        """
        return (self.sum_C + 1 / self.sum_C.size) / (self.texts + 1)


@dataclass(frozen=True)
class Calibrator:
    """Converts a teacher's answers into the probabilities that a run uses, each text independently."""

    method: str = "raw"
    """raw, batch, temperature or votes; see :class:`~llkd_ray.config.teacher.ConfidenceConfig`."""
    prior_C: tuple[float, ...] | None = None
    """For batch: the mean answer to divide by."""
    strength: float = 1.0
    """For batch: the exponent of the mean."""
    temperature: float | None = None
    """For temperature; above 1 if the teacher was over-confident."""
    fitted_on: int = 0
    """Number of texts used for fitting: for temperature, those with gold; 0 if the method needs no fit."""

    @classmethod
    def fit(cls, config: ConfidenceConfig, mass_NC: Floats, gold_N: Ints) -> Calibrator:
        """Fit to the texts labelled before the first round.

        ``gold_N`` is int[N], -1 if unknown; only the temperature method uses it. Raises ValueError if there
        are too few texts for the method.
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
        """Batch calibration with an accumulated mean. Raises ValueError if the mean is of no texts."""
        if not mean.texts:
            raise ValueError(
                "teacher.confidence.method is 'batch', but the teacher has given no answer before the first "
                "round: use 'raw'"
            )
        prior_C = tuple(float(share) for share in mean.mean())
        return cls("batch", prior_C=prior_C, strength=strength, fitted_on=mean.texts)

    def apply(self, mass_NC: Floats) -> Floats:
        """float[N, C]: distributions over the labels. Each row is computed independently of the others."""
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
        """For a JSON file; the inverse of :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibrator:
        prior = values["prior_C"]
        return cls(**{**values, "prior_C": None if prior is None else tuple(prior)})
