"""Losses against their formulae in numpy, and the gradients that they are chosen for."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llkd_ray.config.schema import StudentConfig
from llkd_ray.student import train
from llkd_ray.student.train import CANDIDATE_MASS, GIVING_UP, LOSSES, candidate_set


def softmax(logits_BC: np.ndarray) -> np.ndarray:
    exp_BC = np.exp(logits_BC - logits_BC.max(axis=1, keepdims=True))
    return exp_BC / exp_BC.sum(axis=1, keepdims=True)


def some(seed: int, n: int = 12, n_classes: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels and a teacher's distribution that its labels are the likeliest of."""
    rng = np.random.default_rng(seed)
    p_BC = torch.tensor(rng.dirichlet(np.full(n_classes, 0.4), n))
    return torch.tensor(rng.normal(0, 2, (n, n_classes)), requires_grad=True), p_BC.argmax(dim=1), p_BC


def gradient(loss_B: torch.Tensor, logits_BC: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss_B.sum(), logits_BC)[0]


def test_names_are_those_of_the_config():
    assert set(LOSSES) == set(get_args(StudentConfig.model_fields["loss"].annotation))


@pytest.mark.parametrize("name", LOSSES)
class TestAll:
    def test_one_value_a_text_that_may_be_far_off(self, name):
        """Teachers that are certain and students that are certainly wrong give no infinite gradient."""
        p_BC = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
        logits_BC = torch.tensor([[-80.0, 80, 0], [0, 60, -60], [90, 0, -90]], requires_grad=True)
        loss_B = LOSSES[name](logits_BC, p_BC.argmax(dim=1), p_BC)
        assert loss_B.shape == (3,)
        assert torch.isfinite(loss_B).all()
        assert (loss_B >= -1e-6).all()
        assert torch.isfinite(gradient(loss_B, logits_BC)).all()
        assert loss_B[0] > 1.0
        assert loss_B[1] < 1e-6, "nothing to learn where the student agrees with a certain teacher"

    def test_going_down_it_comes_to_the_teachers_label(self, name):
        _, label_B, _ = some(3)
        p_BC = torch.full((12, 5), 0.02, dtype=torch.float64).scatter(1, label_B[:, None], 0.92)
        logits_BC = torch.zeros(12, 5, dtype=torch.float64, requires_grad=True)
        for _ in range(200):
            step_BC = gradient(LOSSES[name](logits_BC, label_B, p_BC), logits_BC)
            logits_BC = (logits_BC - step_BC).detach().requires_grad_()
        assert torch.softmax(logits_BC, 1)[torch.arange(12), label_B].min() > 0.9

    def test_texts_do_not_meddle_with_each_other(self, name):
        logits_BC, label_B, p_BC = some(1)
        whole_B = LOSSES[name](logits_BC, label_B, p_BC)
        alone_B = torch.cat(
            [LOSSES[name](logits_BC[[i]], label_B[[i]], p_BC[[i]]) for i in range(len(label_B))]
        )
        torch.testing.assert_close(whole_B, alone_B)


class TestFormulae:
    def test_cross_entropy(self):
        logits_BC, label_B, p_BC = some(0)
        q_BC = softmax(logits_BC.detach().numpy())
        expected_B = -np.log(q_BC[np.arange(12), label_B])
        assert train.cross_entropy(logits_BC, label_B, p_BC).detach().numpy() == pytest.approx(expected_B)

    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    def test_soft_is_the_divergence_from_the_teacher(self, monkeypatch, temperature):
        monkeypatch.setattr(train, "TEMPERATURE", temperature)
        logits_BC, label_B, p_BC = some(0)
        q_BC = softmax(logits_BC.detach().numpy() / temperature)
        target_BC = p_BC.numpy() ** (1 / temperature)
        target_BC /= target_BC.sum(axis=1, keepdims=True)
        expected_B = (target_BC * np.log(target_BC / q_BC)).sum(axis=1) * temperature**2
        assert train.soft(logits_BC, label_B, p_BC).detach().numpy() == pytest.approx(expected_B)

    def test_soft_is_least_at_the_teachers_distribution(self):
        _, label_B, p_BC = some(0)
        logits_BC = (p_BC.log() + 3.0).requires_grad_()
        loss_B = train.soft(logits_BC, label_B, p_BC)
        assert loss_B.detach().numpy() == pytest.approx(np.zeros(12), abs=1e-9)
        assert gradient(loss_B, logits_BC).abs().max() < 1e-9

    def test_generalised(self):
        logits_BC, label_B, p_BC = some(0)
        q_B = softmax(logits_BC.detach().numpy())[np.arange(12), label_B]
        loss_B = train.generalised(logits_BC, label_B, p_BC)
        assert loss_B.detach().numpy() == pytest.approx((1 - q_B**GIVING_UP) / GIVING_UP)

    def test_generalised_gives_up_on_what_it_cannot_believe(self):
        """Its gradient is cross-entropy's, times the probability to the power q."""
        logits_BC, label_B, p_BC = some(0)
        q_B = torch.softmax(logits_BC, 1)[torch.arange(12), label_B].detach()
        plain_BC = gradient(train.cross_entropy(logits_BC, label_B, p_BC), logits_BC)
        own_BC = gradient(train.generalised(logits_BC, label_B, p_BC), logits_BC)
        torch.testing.assert_close(own_BC, plain_BC * q_B[:, None] ** GIVING_UP)


class TestCandidates:
    @pytest.mark.parametrize(
        ("p_C", "label", "expected"),
        [
            ([0.95, 0.03, 0.02], 0, {0}),
            ([0.9, 0.06, 0.04], 0, {0}),
            ([0.6, 0.3, 0.1], 0, {0, 1}),
            ([0.3, 0.1, 0.6], 2, {0, 2}),
            ([0.4, 0.35, 0.25], 0, {0, 1, 2}),
            ([0.95, 0.03, 0.02], 2, {0, 2}),
            ([0.0, 1.0, 0.0], 1, {1}),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_fewest_that_reach_the_mass(self, p_C, label, expected, dtype):
        inside_BC = candidate_set(torch.tensor([label]), torch.tensor([p_C], dtype=dtype))
        assert set(inside_BC[0].nonzero().ravel().tolist()) == expected

    @settings(max_examples=60, deadline=None)
    @given(seed=st.integers(0, 2**31), n_classes=st.integers(2, 8))
    def test_the_set_is_enough_and_not_more(self, seed, n_classes):
        _, label_B, p_BC = some(seed, 20, n_classes)
        inside_BC = candidate_set(label_B, p_BC)
        assert inside_BC[torch.arange(20), label_B].all()
        mass_B = (p_BC * inside_BC).sum(dim=1)
        assert (mass_B >= CANDIDATE_MASS - 1e-5).all()
        least_B = torch.where(inside_BC, p_BC, 2.0).amin(dim=1)
        assert (mass_B - least_B < CANDIDATE_MASS).all(), "without its least likely label it is too little"
        assert (torch.where(inside_BC, 0.0, p_BC).amax(dim=1) <= least_B).all()

    def test_one_candidate_is_cross_entropy(self):
        logits_BC, label_B, _ = some(0)
        p_BC = torch.full((12, 5), 0.01, dtype=torch.float64).scatter(1, label_B[:, None], 0.96)
        own_B = train.candidates(logits_BC, label_B, p_BC)
        plain_B = train.cross_entropy(logits_BC, label_B, p_BC)
        torch.testing.assert_close(own_B, plain_B)
        torch.testing.assert_close(gradient(own_B, logits_BC), gradient(plain_B, logits_BC))

    def test_learns_as_from_the_students_distribution_among_the_candidates(self):
        """CanDist's eq. 1 and 5: cross-entropy with the renormalised prediction as a fixed target."""
        logits_BC, label_B, p_BC = some(0)
        inside_BC = candidate_set(label_B, p_BC)
        assert inside_BC.sum(dim=1).float().mean() > 1.5
        q_BC = torch.softmax(logits_BC, 1).detach() * inside_BC
        q_BC = q_BC / q_BC.sum(dim=1, keepdim=True)
        refined_B = -(q_BC * torch.log_softmax(logits_BC, 1)).sum(dim=1)
        own_B = train.candidates(logits_BC, label_B, p_BC)
        torch.testing.assert_close(gradient(own_B, logits_BC), gradient(refined_B, logits_BC))
        entropy_B = torch.special.entr(q_BC).sum(dim=1)
        torch.testing.assert_close(own_B, refined_B - entropy_B)

    def test_takes_the_candidate_that_the_student_favours(self):
        """The teacher wavers between 0 and 1 and says 0; the student leans to 1 and may keep to it."""
        p_BC, label_B = torch.tensor([[0.5, 0.45, 0.05]]), torch.tensor([0])
        logits_BC = torch.tensor([[0.0, 1.0, 0.0]], requires_grad=True)
        for _ in range(300):
            step_BC = gradient(train.candidates(logits_BC, label_B, p_BC), logits_BC)
            logits_BC = (logits_BC - step_BC).detach().requires_grad_()
        p_C = torch.softmax(logits_BC, 1)[0]
        assert p_C[1] > p_C[0] > p_C[2]
        assert p_C[1] > 0.7
        assert p_C[2] < 0.01
