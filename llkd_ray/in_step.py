"""LLKD inside a training step: what its texts count, by the teacher's confidence and the student's doubt.

Between rounds the selection policy chooses with the student's opinion of last round. Here the opinion is
that of the forward pass which the step makes anyway, so it costs nothing and is never old. It is the
training pass, so dropout is in it.

All is decided on the global batch: ranks add up their sums, so any number of ranks decides alike.

Shapes in names: B texts of a step on one rank, C classes, K statistics.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from llkd_ray.signals import Floats, Ints, MovingThreshold

Kind = Literal["none", "mask", "weight"]

MOMENTUM = 0.9
"""Of the moving thresholds, a step. They look back over about ten steps, at 16 texts a step some 160 texts;
FreeMatch's 0.999 looks back over a thousand steps, and most rounds have a few hundred. The uncertainty falls
as the student learns, and a threshold that lags behind a falling signal is strict: with 0.99, MiniLM on
PubMed-RCT would have kept under a third of the texts after the first hundred steps, with 0.9 nine in ten."""
TIE = 1e-6
"""A signal that is less than its threshold by no more than this reaches it. Where all texts have the same
signal, the threshold comes to equal it, and rounding must not decide."""


class InStep:
    """What the texts of each step of one round count; every round starts a new one.

    ``kind``: ``none``: all the same. ``mask``: LLKD's selection (arXiv 2411.08028): a text counts where the
    teacher's confidence and the student's uncertainty both reach the moving threshold of its pseudo-class,
    and those that count do so equally. ``weight``: LLKD's weights alone, confidence × uncertainty.

    Both thresholds start at 1/C, as FreeMatch's do: that is the confidence of a model that knows nothing. As
    an uncertainty it has no such meaning, but it is low, so that all texts of a fresh student pass until
    their uncertainties differ: in the first ten steps MiniLM's lay within 0.01 of each other. Starting at
    the first step's mean, or at 1, let hardly any text pass in the next ten, while uncertainty fell faster
    than the threshold followed. Deviation: where the first step's mean is lower than 1/C, as with a student
    that starts warm, they start there, since no text of it would pass until the threshold had come down.
    """

    def __init__(self, kind: Kind, n_classes: int, world: int = 1) -> None:
        assert kind == "none" or world == 1 or dist.is_initialized(), "ranks add up in a process group"
        self.kind, self.n_classes, self.world = kind, n_classes, world
        self.confidence: MovingThreshold | None = None
        self.uncertainty: MovingThreshold | None = None
        self.seen = self.kept = 0
        """Texts of all steps and ranks, and those of them that counted; for ``mask`` only."""

    def weigh(self, logits_BC: Tensor, label_B: Tensor, confidence_B: Tensor, is_share: bool) -> Tensor:
        """float32[B]: what each text counts; the mean over the global batch is one, or zero if none counts.

        Takes the student's logits, the teacher's labels and confidences. All ranks must call it in every
        step; one whose texts are no share of the batch says so, and they count zero.
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
        """``masked``, the share of texts that did not count, a text counted once an epoch."""
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
    """float64[B]: entropy over log C, without gradient; as ``signals.entropy`` of the probabilities."""
    p_BC = torch.softmax(logits_BC.detach().double(), dim=1)
    return (torch.special.entr(p_BC).sum(dim=1) / math.log(p_BC.shape[1])).clamp(0.0, 1.0)


def start(sum_C: Floats, count_C: Ints) -> MovingThreshold:
    """A threshold before the first step, which has these sums: 1/C, or its mean if that is less."""
    low = min(1 / count_C.size, float(sum_C.sum() / count_C.sum()))
    return MovingThreshold(low, np.full(count_C.size, low), MOMENTUM)
