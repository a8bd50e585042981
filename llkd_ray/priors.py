"""Class priors: what share of the texts each class has, where the student learns and where it is used.

Quotas show the student more of the rare pseudo-classes than the pool has, so that it learns them. Left at
that, it would also expect so many of them. Here the two are taken apart: what it is shown is one thing, what
its answers reckon with another. Pure numpy. Shapes in names: N texts, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from llkd_ray.signals import Floats, Ints

Exponent = float | Literal["off"] | None
"""As in the config: a number, ``off``, or None for the policy's own."""


def effective(setting: Exponent, own: float | None) -> float | None:
    """The exponent that holds; None for none at all."""
    if setting is None:
        return own
    return None if setting == "off" else setting


def tempered(count_C: Ints, exponent: float) -> Floats:
    """float[C], summing to one: shares in proportion to ``count ** exponent``; a class without texts gets 0.

    1 is as the texts are, 0 all classes alike. What is between tempers skew without denying it: weakly
    supervised training takes 0.5 (Mahajan et al., arXiv 1805.00932, sec. 2.2), multilingual pre-training 0.3
    (XLM-R, arXiv 1911.02116, sec. 3.1). Zeros everywhere where there are no texts.
    """
    wish_C = np.where(count_C > 0, np.maximum(count_C, 1) ** float(exponent), 0.0)
    return wish_C / max(wish_C.sum(), 1.0)


def target_prior(
    count_C: Ints, setting: Exponent, own: float | None, known: Sequence[float]
) -> Floats | None:
    """float[C], summing to one: what the student's answers are to reckon with; None: with what it is shown.

    Takes the teacher's counts, the config's exponent and the policy's own, and the shares that are known, if
    any. Those go before the counts, which carry the teacher's bias: it over-uses some labels. Hence the
    exponent, with which the counts are trusted by half where it is 0.5.
    """
    exponent = effective(setting, own)
    if known and setting != "off":
        return np.array(known, dtype=np.float64)
    return None if exponent is None else tempered(count_C, exponent)


def prior_shift(label_N: Ints, weight_N: Floats, prior_C: Floats) -> Floats:
    """float[C]: what is added to the student's logits in training, and only there.

    The logit-adjusted loss of Menon et al. (arXiv 2007.07314) with a target that need not be uniform:
    log(share of the class in what is trained on, by weight / its target share). Cross-entropy on shifted
    logits is consistent for the target, so the student without the shift reckons with ``prior_C``. A class
    that is not trained on, or has no target, is not shifted: nothing is known of it.
    """
    mass_C = np.bincount(label_N, weights=weight_N, minlength=prior_C.size)
    is_known_C = (mass_C > 0) & (prior_C > 0)
    share_C = np.where(is_known_C, mass_C, 1.0) / max(float(mass_C.sum()), 1e-12)
    return np.where(is_known_C, np.log(share_C / np.where(is_known_C, prior_C, 1.0)), 0.0)
