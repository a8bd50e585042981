"""Losses for learning from a teacher that is not always right: one value for each text, in torch.

All take the same three things and ignore what they do not need; weights are the caller's business. The
names in ``LOSSES`` are those of ``student.loss``.

Shapes in names: B texts, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits_BC of the student, label_B of the teacher, p_BC of the teacher, summing to one) → float[B]."""

TEMPERATURE = 1.0
"""Of ``soft``. One: the teacher's distribution is taken as it is."""
GIVING_UP = 0.7
"""``q`` of ``generalised``: 0 is cross-entropy, 1 the mean absolute error. 0.7 is the paper's choice."""
CANDIDATE_MASS = 0.9
"""Probability that a text's candidate labels hold together at least."""


def cross_entropy(logits_BC: Tensor, label_B: Tensor, p_BC: Tensor) -> Tensor:
    """-log of the student's probability of the teacher's label."""
    return functional.cross_entropy(logits_BC, label_B, reduction="none")


def soft(logits_BC: Tensor, label_B: Tensor, p_BC: Tensor) -> Tensor:
    """KL(teacher || student), at ``TEMPERATURE``, times its square so that gradients keep their size.

    Hinton, Vinyals & Dean, arXiv 1503.02531, sec. 2. The gradient is that of their cross-entropy with soft
    targets; the value is less by the teacher's entropy, so that 0 is full agreement.
    """
    target_BC = torch.softmax(p_BC.log() / TEMPERATURE, dim=1)
    log_student_BC = torch.log_softmax(logits_BC / TEMPERATURE, dim=1)
    return functional.kl_div(log_student_BC, target_BC, reduction="none").sum(dim=1) * TEMPERATURE**2


def generalised(logits_BC: Tensor, label_B: Tensor, p_BC: Tensor) -> Tensor:
    """(1 - p_y^q) / q with ``q = GIVING_UP``, for the student's probability p_y of the teacher's label.

    Zhang & Sabuncu, arXiv 1805.07836, eq. 6, without their truncation. The gradient is p_y^q times that of
    cross-entropy: a label that the student cannot believe, which is often a wrong one, pulls less.
    """
    return -torch.expm1(-GIVING_UP * cross_entropy(logits_BC, label_B, p_BC)) / GIVING_UP


def candidates(logits_BC: Tensor, label_B: Tensor, p_BC: Tensor) -> Tensor:
    """-log of the student's probability of all candidate labels together; see :func:`candidate_set`.

    CanDist (arXiv 2506.03857) takes as target the student's own distribution, renormalised among the
    candidates (its eq. 1) under cross-entropy (eq. 5). The gradient of that, with a detached target, is the
    gradient of this loss, and only the value differs: it is 0 when all the mass lies on candidates. With one
    candidate it is cross-entropy.

    Deviations: the candidates come from the teacher's distribution, not from a prompt that asks for several
    labels; the target is of the same forward pass, not of the one before; and the paper's filtering of
    texts whose label seems to lie outside the candidates, and its sharpening for the reliable ones
    (eq. 2 to 4), are left out.
    """
    outside_BC = ~candidate_set(label_B, p_BC)
    log_student_BC = torch.log_softmax(logits_BC, dim=1)
    return -torch.logsumexp(log_student_BC.masked_fill(outside_BC, -torch.inf), dim=1)


def candidate_set(label_B: Tensor, p_BC: Tensor) -> Tensor:
    """bool[B, C]: the teacher's likeliest labels, as few as reach ``CANDIDATE_MASS``, and its label."""
    ranked_BC, order_BC = p_BC.sort(dim=1, descending=True, stable=True)
    before_BC = ranked_BC.cumsum(dim=1) - ranked_BC
    # Rounding must not ask for one label more where the first ones reach the mass exactly.
    needed_BC = before_BC < CANDIDATE_MASS - 1e-6
    inside_BC = torch.zeros_like(needed_BC).scatter(1, order_BC, needed_BC)
    return inside_BC.scatter(1, label_B[:, None], True)


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "soft": soft,
    "generalised": generalised,
    "candidates": candidates,
}
