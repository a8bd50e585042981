"""Training the student: losses, LLKD selection within a step, and the steps of one round.

All losses take the same three arguments and ignore those they do not need; the caller applies weights. The
names in ``LOSSES`` are those of ``student.loss``.

Between rounds, the selection policy uses the student's scores of the previous round. Here, the scores are
from the forward pass that the step computes anyway, so they cost nothing and are never stale. It is the
training pass, so dropout is active.

All decisions are made on the global batch: sums are added over ranks, so they do not depend on the number of
ranks.

Shapes in names: B texts of a step on one rank, C classes, K statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from llkd_ray.config.schema import StudentConfig
from llkd_ray.metrics.uncertainty import Floats, Ints, confidence
from llkd_ray.student.model import Student, Tokens, learning_rate, lengths

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits_BC of the student, label_B of the teacher, p_BC of the teacher, summing to one) → float[B]."""


def cross_entropy(logits_BC: Tensor, label_B: Tensor, p_BC: Tensor) -> Tensor:
    """-log of the student's probability of the teacher's label."""
    return functional.cross_entropy(logits_BC, label_B, reduction="none")


def soft(logits_BC: Tensor, label_B: Tensor, p_BC: Tensor) -> Tensor:
    """KL(teacher || student), at temperature one: the teacher's distribution is used unchanged.

    Hinton, Vinyals & Dean, arXiv 1503.02531, sec. 2. The gradient equals that of their cross-entropy with
    soft targets; the value is lower by the teacher's entropy, so that 0 is full agreement.
    """
    return functional.kl_div(torch.log_softmax(logits_BC, dim=1), p_BC, reduction="none").sum(dim=1)


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "soft": soft}


Kind = Literal["none", "mask", "weight"]
MOMENTUM = 0.9
"""Of the moving thresholds, per step. They average over about ten steps, at 16 texts per step some 160 texts;
FreeMatch's 0.999 averages over a thousand steps, and most rounds have a few hundred. The uncertainty falls
as the student learns, and a threshold that lags behind a falling signal is strict: with 0.99, MiniLM on
PubMed-RCT would have kept under a third of the texts after the first hundred steps, with 0.9 nine in ten.
"""
TIE = 1e-6
"""A signal that is below its threshold by no more than this reaches it. Where all texts have the same signal,
the threshold converges to it, and rounding must not decide.
"""


class StepThresholds:
    """The loss weights of the texts in each step of one round; every round starts a new one.

    ``kind``: ``none``: all equal. ``mask``: LLKD's selection (arXiv 2411.08028): a text counts where the
    teacher's confidence and the student's uncertainty both reach the moving threshold of its pseudo-class,
    and texts that count have equal weights. ``weight``: LLKD's weights alone, confidence × uncertainty.

    Both thresholds start at 1/C, like FreeMatch's, which is the confidence of an untrained model. For an
    uncertainty, 1/C has no such meaning, but it is low, so that all texts of a new student pass until their
    uncertainties differ: in the first ten steps MiniLM's differed by less than 0.01. Starting at the first
    step's mean, or at 1, let hardly any text pass in the next ten steps, as uncertainty fell faster than the
    threshold followed. Deviation: where the first step's mean is lower than 1/C, as with a warm-started
    student, they start at that mean, since otherwise no text would pass until the threshold had fallen.
    """

    def __init__(self, kind: Kind, n_classes: int, world: int = 1) -> None:
        assert kind == "none" or world == 1 or dist.is_initialized(), "ranks add up in a process group"
        self.kind, self.n_classes, self.world = kind, n_classes, world
        self.confidence: MovingThreshold | None = None
        self.uncertainty: MovingThreshold | None = None
        self.seen = self.kept = 0
        """Texts of all steps and ranks, and those of them that counted; for ``mask`` only."""

    def weigh(self, logits_BC: Tensor, label_B: Tensor, confidence_B: Tensor, is_share: bool) -> Tensor:
        """float32[B]: the weight of each text; the mean over the global batch is one, or zero if none counts.

        Takes the student's logits, the teacher's labels and confidences. All ranks must call it in every
        step; ``is_share`` is false where a rank's texts are not part of the batch, and their weight is zero.
        """
        if self.kind == "none":
            return torch.ones_like(confidence_B, dtype=torch.float32)
        confidence_B = confidence_B.double()
        uncertainty_B = uncertainty(logits_BC)
        if self.kind == "mask":
            self._move(label_B, confidence_B, uncertainty_B, is_share)
            value_B = self._passes(label_B, confidence_B, uncertainty_B).double()
        else:
            value_B = confidence_B * uncertainty_B
        value_B = value_B * is_share
        own_count = value_B.new_tensor(value_B.numel() * is_share)
        total, count = self._over_ranks(value_B.sum(), own_count).tolist()
        if self.kind == "mask":
            self.seen, self.kept = self.seen + round(count), self.kept + round(total)
        return (value_B * (count / total if total > 0 else 0.0)).float()

    def facts(self) -> dict[str, float]:
        """``masked``, the share of texts that did not count; each text counts once per epoch."""
        return {"masked": 1 - self.kept / max(1, self.seen)} if self.kind == "mask" else {}

    def _move(self, label_B: Tensor, confidence_B: Tensor, uncertainty_B: Tensor, is_share: bool) -> None:
        """Move both thresholds by the global batch's sums for each pseudo-class."""
        stacked_BK = torch.stack([confidence_B, uncertainty_B, torch.ones_like(confidence_B)], dim=1)
        sum_CK = stacked_BK.new_zeros(self.n_classes, 3).index_add(0, label_B, stacked_BK * is_share)
        (sums,) = self._over_ranks(sum_CK)
        confidence_C, uncertainty_C, count_C = sums.cpu().numpy().T
        count_C = np.rint(count_C).astype(np.int64)
        self.confidence = (self.confidence or start(confidence_C, count_C)).after(confidence_C, count_C)
        self.uncertainty = (self.uncertainty or start(uncertainty_C, count_C)).after(uncertainty_C, count_C)

    def _passes(self, label_B: Tensor, confidence_B: Tensor, uncertainty_B: Tensor) -> Tensor:
        """bool[B]: whether both signals reach the threshold of the text's pseudo-class."""
        assert self.confidence is not None
        assert self.uncertainty is not None
        needed_C, doubted_C = (
            torch.as_tensor(threshold.of_class() - TIE, device=label_B.device)
            for threshold in (self.confidence, self.uncertainty)
        )
        return (confidence_B >= needed_C[label_B]) & (uncertainty_B >= doubted_C[label_B])

    def _over_ranks(self, *parts: Tensor) -> Tensor:
        """The parts, stacked, each summed over all ranks."""
        stacked = torch.stack(parts)
        if self.world > 1:
            dist.all_reduce(stacked)
        return stacked


def uncertainty(logits_BC: Tensor) -> Tensor:
    """float64[B]: entropy over log C, without gradient; as ``metrics.uncertainty.entropy``."""
    p_BC = torch.softmax(logits_BC.detach().double(), dim=1)
    return (torch.special.entr(p_BC).sum(dim=1) / math.log(p_BC.shape[1])).clamp(0.0, 1.0)


def start(sum_C: Floats, count_C: Ints) -> MovingThreshold:
    """A threshold before the first step, which has these sums: 1/C, or its mean if that is lower."""
    low = min(1 / count_C.size, float(sum_C.sum() / count_C.sum()))
    return MovingThreshold(low, np.full(count_C.size, low))


def prior_shift(label_N: Ints, weight_N: Floats, prior_C: Floats) -> Floats:
    """float[C]: added to the student's logits in training, and only there.

    The logit-adjusted loss of Menon et al. (arXiv 2007.07314) with a target that need not be uniform:
    log(share of the class in the training texts, by weight / its target share). Cross-entropy on shifted
    logits is consistent for the target, so without the shift the student's prior is ``prior_C``. A class
    without training texts, or without a target, is not shifted.
    """
    mass_C = np.bincount(label_N, weights=weight_N, minlength=prior_C.size)
    is_known_C = (mass_C > 0) & (prior_C > 0)
    share_C = np.where(is_known_C, mass_C, 1.0) / max(float(mass_C.sum()), 1e-12)
    return np.where(is_known_C, np.log(share_C / np.where(is_known_C, prior_C, 1.0)), 0.0)


@dataclass(frozen=True)
class MovingThreshold:
    """A threshold that follows a signal step by step: a global moving average, and one per class.

    FreeMatch (arXiv 2205.07246, eq. 5 to 8): both start at 1/C, move by ``1 - MOMENTUM`` per step before
    the step is judged, and a class's threshold is the global one times the class's average over the
    largest class's. Deviation: a class's average is of the signal of its texts, as in
    :func:`~llkd_ray.selection.search.class_thresholds`; a class without texts in a step is unchanged.
    """

    overall: float
    class_C: Floats

    def after(self, sum_C: Floats, count_C: Ints) -> MovingThreshold:
        """The threshold moved by a step's sums and counts per class, which are added over ranks."""
        if not count_C.sum():
            return self
        keep, move = MOMENTUM, 1 - MOMENTUM
        mean_C = np.where(count_C > 0, sum_C / np.maximum(count_C, 1), self.class_C)
        return MovingThreshold(
            keep * self.overall + move * float(sum_C.sum() / count_C.sum()),
            keep * self.class_C + move * mean_C,
        )

    def of_class(self) -> Floats:
        """float[C]: the threshold of each class."""
        return self.overall * self.class_C / max(float(self.class_C.max()), 1e-12)


@dataclass(frozen=True)
class Batch:
    """The training data of a round, the same on all ranks."""

    texts: list[str]
    label_N: np.ndarray
    weight_N: np.ndarray
    p_NC: np.ndarray
    """The teacher's distribution; sums to one."""
    prior_C: np.ndarray | None = None
    """The class prior that the student's predictions assume; None: the texts' class shares."""

    def logit_shift(self) -> np.ndarray:
        """float[C]: added to the logits in training."""
        if self.prior_C is None:
            return np.zeros(self.p_NC.shape[1])
        return prior_shift(self.label_N, self.weight_N, self.prior_C)


@dataclass(frozen=True)
class Step:
    """A rank's share of one optimiser step; ``scale`` makes the mean over ranks the global mean."""

    index_B: np.ndarray
    scale: float


def plan_steps(
    length_N: np.ndarray, config: StudentConfig, rank: int, world: int, rng: np.random.Generator
) -> Iterator[Step]:
    """The steps of one epoch for one rank; equal in number on all ranks, for any N.

    Texts are shuffled, sorted by ``length_N`` within windows of 16 batches (to reduce padding) and
    cut into global batches, whose order is shuffled again. A rank takes every ``world``-th text of a batch.
    With the same generator state, any number of ranks has the same global batches.
    """
    n = length_N.size
    order = rng.permutation(n)
    window = 16 * config.batch_size
    for start in range(0, n, window):
        part = order[start : start + window]
        order[start : start + window] = part[np.argsort(length_N[part], kind="stable")]
    batches = [order[start : start + config.batch_size] for start in range(0, n, config.batch_size)]
    for i in rng.permutation(len(batches)):
        mine = batches[i][rank::world]
        # A rank without a text still has to take part in the step, with a text of weight zero.
        yield Step(mine if mine.size else batches[i][:1], world / batches[i].size if mine.size else 0.0)


def train_round(
    student: Student,
    batch: Batch,
    config: StudentConfig,
    *,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
) -> dict[str, float]:
    """Train on a round's texts; returns mean loss, steps, ``full`` and, with ``mask``, ``masked``.

    The loss of a step is the mean over its global batch of weight × the text's step weight ×
    ``config.loss``, on logits shifted from ``batch.prior_C`` to the texts' own class shares. AdamW, linear
    warm-up and linear decay to zero over the round. ``full`` is the share of texts with ``max_tokens``
    tokens, of which more may have been cut; ``masked`` is the share of texts that did not count.

    Raises FloatingPointError where the loss is not finite: the student has diverged.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    tokens_N = student.encode(batch.texts, config.max_tokens)
    length_N = lengths(tokens_N)
    epochs, steps = count_steps(length_N.size, config)
    optimizer, schedule = _optimizer_and_schedule(student.model, config, steps)
    step_thresholds = StepThresholds(config.step_thresholds, batch.p_NC.shape[1], world)
    shift_C = student.tensor(batch.logit_shift())
    loss_sum = torch.zeros((), device=student.device)
    student.model.train()
    done = 0
    for _ in range(epochs):
        for step in plan_steps(length_N, config, rank, world, rng):
            loss = _step_loss(student, tokens_N, batch, step, config, step_thresholds, shift_C)
            loss.backward()
            nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            loss_sum += loss.detach()
            done += 1
            on_step(done, steps)
    full = float(np.mean(length_N >= config.max_tokens))
    # Once, at the end: to look at each step's loss would make a GPU wait.
    if not math.isfinite(mean_loss := float(loss_sum) / max(1, done)):
        raise FloatingPointError(f"the student's loss is {mean_loss}")
    return {"steps": done, "loss": mean_loss, "full": full} | step_thresholds.facts()


def count_steps(n: int, config: StudentConfig) -> tuple[int, int]:
    """Epochs over ``n`` texts and optimiser steps of a round; whole epochs, with ``min_steps`` or more."""
    steps_an_epoch = -(-n // config.batch_size)
    epochs = max(config.epochs, -(-config.min_steps // steps_an_epoch))
    return epochs, epochs * steps_an_epoch


def _step_loss(
    student: Student,
    tokens_N: Sequence[Tokens],
    batch: Batch,
    step: Step,
    config: StudentConfig,
    step_thresholds: StepThresholds,
    shift_C: torch.Tensor,
) -> torch.Tensor:
    """A rank's part of a step's loss, scaled so that the mean over ranks is the loss of the global batch."""
    logits_BC = student.logits([tokens_N[i] for i in step.index_B])
    label_B = student.tensor(batch.label_N[step.index_B], torch.long)
    weight_B = student.tensor(batch.weight_N[step.index_B])
    p_BC = batch.p_NC[step.index_B]
    loss_B = LOSSES[config.loss](logits_BC + shift_C, label_B, student.tensor(p_BC))
    confidence_B = student.tensor(confidence(p_BC), torch.float64)
    counts_B = step_thresholds.weigh(logits_BC, label_B, confidence_B, step.scale > 0)
    return (weight_B * counts_B * loss_B).sum() * step.scale


def _optimizer_and_schedule(
    model: nn.Module, config: StudentConfig, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, config.weight_decay),
        lr=learning_rate(config, getattr(model, "module", model).config),
        fused=True,  # takes a seventh of the time of the plain loop, which is a third of a small model's step
    )
    warmup = max(1, round(config.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    return optimizer, schedule


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices only, as is standard for transformers."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
