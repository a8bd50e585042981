"""Class shares, and that a shift in training makes the student reckon with others than it is shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from llkd_ray.selection.policies import effective, target_prior, tempered
from llkd_ray.student.train import prior_shift


@pytest.mark.parametrize(
    ("setting", "own", "holds"),
    [(None, 0.25, 0.25), (None, None, None), ("off", 0.25, None), (0.0, 0.25, 0.0), (1.0, None, 1.0)],
)
def test_a_setting_goes_before_the_policy(setting, own, holds):
    assert effective(setting, own) == holds


class TestTempered:
    @pytest.mark.parametrize(
        ("exponent", "shares"),
        [(1.0, [0.1, 0.36, 0.54, 0]), (0.0, [1 / 3, 1 / 3, 1 / 3, 0]), (0.5, [0.1915, 0.3634, 0.4451, 0])],
    )
    def test_between_as_it_is_and_all_alike(self, exponent, shares):
        assert tempered(np.array([100, 360, 540, 0]), exponent) == pytest.approx(shares, abs=1e-4)

    @given(st.lists(st.integers(0, 10**9), min_size=2, max_size=30), st.floats(0, 1))
    def test_sums_to_one_and_keeps_the_order(self, counts, exponent):
        count_C = np.array(counts)
        share_C = tempered(count_C, exponent)
        assert share_C.sum() == pytest.approx(1.0 if count_C.any() else 0.0)
        assert ((share_C > 0) == (count_C > 0)).all()
        assert (np.diff(share_C[np.argsort(count_C, kind="stable")]) >= -1e-12).all()


class TestTargetPrior:
    COUNTS = np.array([90, 10])

    def test_by_the_counts(self):
        assert target_prior(self.COUNTS, None, 0.5, ()) == pytest.approx([0.75, 0.25])
        assert target_prior(self.COUNTS, 1.0, 0.5, ()) == pytest.approx([0.9, 0.1])
        assert target_prior(self.COUNTS, None, None, ()) is None
        assert target_prior(self.COUNTS, "off", 0.5, ()) is None

    def test_what_is_known_goes_before(self):
        for setting in (None, 0.5):
            assert target_prior(self.COUNTS, setting, None, (0.2, 0.8)) == pytest.approx([0.2, 0.8])
        assert target_prior(self.COUNTS, "off", None, (0.2, 0.8)) is None


class TestShift:
    def test_is_the_log_of_what_is_shown_over_what_is_wanted(self):
        label_N, weight_N = np.array([0, 0, 0, 1]), np.array([1.0, 0.5, 0.5, 2.0])
        shift_C = prior_shift(label_N, weight_N, np.array([0.8, 0.2]))
        assert shift_C == pytest.approx(np.log([0.5 / 0.8, 0.5 / 0.2])), "shares are by weight"

    def test_what_is_wanted_is_shown(self):
        assert prior_shift(np.array([0, 1]), np.ones(2), np.array([0.5, 0.5])) == pytest.approx([0, 0])

    @pytest.mark.parametrize(
        ("label", "prior"), [([0, 0], [0.5, 0.5]), ([0, 1], [1.0, 0.0]), ([], [0.5, 0.5])]
    )
    def test_a_class_that_is_not_there_is_not_shifted(self, label, prior):
        shift_C = prior_shift(np.array(label, dtype=np.int64), np.ones(len(label)), np.array(prior))
        assert np.isfinite(shift_C).all()
        assert shift_C[1] == 0

    def test_the_model_without_it_reckons_with_the_prior(self):
        """Two overlapping classes, shown alike: by Bayes, the answer for a share of 9 in 10 is known."""
        rng = np.random.default_rng(0)
        label_N = np.repeat([0, 1], 20_000)
        x_N = torch.tensor(rng.normal(np.where(label_N == 0, -1.0, 1.0), 1.0), dtype=torch.float64)[:, None]
        prior_C = np.array([0.1, 0.9])
        shift_C = torch.tensor(prior_shift(label_N, np.ones(40_000), prior_C))
        model = nn.Linear(1, 2, dtype=torch.float64)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100)

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x_N) + shift_C, torch.tensor(label_N))
            loss.backward()
            return loss

        optimizer.step(closure)
        x_M = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
        p_M = torch.softmax(model(x_M), dim=1)[:, 1].detach().numpy()
        # Normal densities around -1 and 1: their ratio is exp(2 x).
        odds_M = np.exp(2 * x_M.numpy().ravel()) * 0.9 / 0.1
        assert p_M == pytest.approx(odds_M / (1 + odds_M), abs=0.02)
