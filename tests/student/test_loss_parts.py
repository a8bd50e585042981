"""Pure parts of the student's loss: the shift by class shares, and FreeMatch's moving threshold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from llkd_ray.selection.search import class_thresholds
from llkd_ray.student.train import MovingThreshold, prior_shift


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


def sums(signal, label, n_classes=4):
    """What a step tells the moving threshold: sum and count of each class."""
    return np.bincount(label, weights=signal, minlength=n_classes), np.bincount(label, minlength=n_classes)


class TestMovingThreshold:
    def test_starts_at_one_over_the_classes(self):
        start = MovingThreshold.start(4)
        assert start.momentum == 0.999
        # The largest class average is divided out, so at first all classes have the global value.
        np.testing.assert_allclose(start.of_class(), np.full(4, 0.25))

    def test_moves_by_a_step_in_freematchs_form(self):
        after = MovingThreshold.start(2, momentum=0.9).after(*sums([0.8, 0.6, 1.0], [0, 0, 1], 2))
        overall = 0.9 * 0.5 + 0.1 * 0.8
        of_class = np.array([0.9 * 0.5 + 0.1 * 0.7, 0.9 * 0.5 + 0.1 * 1.0])
        assert after.overall == pytest.approx(overall)
        np.testing.assert_allclose(after.class_C, of_class)
        np.testing.assert_allclose(after.of_class(), overall * of_class / of_class[1])

    def test_a_class_without_texts_stays(self):
        after = MovingThreshold.start(3, momentum=0.5).after(*sums([0.9], [1], 3))
        np.testing.assert_allclose(after.class_C, [1 / 3, (1 / 3 + 0.9) / 2, 1 / 3])

    def test_a_step_without_texts_changes_nothing(self):
        start = MovingThreshold.start(3)
        assert start.after(np.zeros(3), np.zeros(3, dtype=int)) is start

    def test_comes_to_the_means_of_a_signal_that_stays(self):
        threshold = MovingThreshold.start(2, momentum=0.9)
        signal, label = np.array([0.9, 0.9, 0.3, 0.3]), np.array([0, 0, 1, 1])
        for _ in range(300):
            threshold = threshold.after(*sums(signal, label, 2))
        np.testing.assert_allclose(threshold.of_class(), class_thresholds(*sums(signal, label, 2)), rtol=1e-6)

    def test_does_not_depend_on_how_a_step_is_shared_out(self):
        rng = np.random.default_rng(0)
        signal, label = rng.uniform(size=32), rng.integers(0, 4, 32)
        whole = MovingThreshold.start(4).after(*sums(signal, label))
        shards = [sums(signal[rank::3], label[rank::3]) for rank in range(3)]
        shared = MovingThreshold.start(4).after(sum(s for s, _ in shards), sum(c for _, c in shards))
        assert shared.overall == pytest.approx(whole.overall)
        np.testing.assert_allclose(shared.of_class(), whole.of_class())

    def test_of_a_signal_that_is_zero_everywhere(self):
        threshold = MovingThreshold(0.0, np.zeros(3)).of_class()
        np.testing.assert_array_equal(threshold, np.zeros(3))
