"""The student learns by the losses' formulae, and alike on any number of ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Job, train_on_ranks, without_dropout
from small_students import LABELS, make_config, make_student, same, toy_batch, toy_teacher, weights
from torch import nn
from toys import toy_probs, toy_texts

from llkd_ray.config.schema import StudentConfig
from llkd_ray.metrics.uncertainty import confidence, entropy, normalise
from llkd_ray.selection.search import class_thresholds
from llkd_ray.student.inference import predict
from llkd_ray.student.model import lengths
from llkd_ray.student.train import (
    LOSSES,
    Batch,
    MovingThreshold,
    StepThresholds,
    count_steps,
    plan_steps,
    prior_shift,
    train_round,
    uncertainty,
)


def some(seed: int, n: int = 12, n_classes: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels and a teacher's distribution that its labels are the likeliest of."""
    rng = np.random.default_rng(seed)
    p_BC = torch.tensor(rng.dirichlet(np.full(n_classes, 0.4), n))
    return torch.tensor(rng.normal(0, 2, (n, n_classes)), requires_grad=True), p_BC.argmax(dim=1), p_BC


def gradient(loss_B: torch.Tensor, logits_BC: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss_B.sum(), logits_BC)[0]


class TestLosses:
    def test_names_are_those_of_the_config(self):
        assert set(LOSSES) == set(get_args(StudentConfig.model_fields["loss"].annotation))

    @pytest.mark.parametrize("name", LOSSES)
    def test_formula(self, name):
        logits_BC, label_B, p_BC = some(0)
        q_BC = torch.softmax(logits_BC, 1).detach().numpy()
        target_BC = p_BC.numpy() if name == "soft" else np.eye(5)[label_B]
        expected_B = (target_BC * np.log(np.maximum(target_BC, 1e-300) / q_BC)).sum(axis=1)
        loss_B = LOSSES[name](logits_BC, label_B, p_BC)
        assert loss_B.detach().numpy() == pytest.approx(expected_B)
        assert gradient(loss_B, logits_BC).numpy() == pytest.approx(q_BC - target_BC)

    @pytest.mark.parametrize("name", LOSSES)
    def test_certain_teachers_and_students_that_are_far_off_give_finite_gradients(self, name):
        p_BC = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
        logits_BC = torch.tensor([[-80.0, 80, 0], [0, 60, -60], [90, 0, -90]], requires_grad=True)
        loss_B = LOSSES[name](logits_BC, p_BC.argmax(dim=1), p_BC)
        assert torch.isfinite(loss_B).all()
        assert torch.isfinite(gradient(loss_B, logits_BC)).all()
        assert loss_B[0] > 1.0
        assert loss_B[1] < 1e-6, "nothing to learn where the student agrees with a certain teacher"


class TestPlanSteps:
    @settings(max_examples=150, deadline=None)
    @given(
        n=st.integers(1, 400),
        batch_size=st.integers(1, 40),
        world=st.integers(1, 4),
        seed=st.integers(0, 2**31),
    )
    def test_ranks_together_make_the_batches_of_one(self, n, batch_size, world, seed):
        config = make_config(batch_size=batch_size)
        length_N = np.random.default_rng(seed + 1).integers(1, 500, n)

        def steps(rank, world):
            return list(plan_steps(length_N, config, rank, world, np.random.default_rng(seed)))

        of_one = steps(0, 1)
        ranks = [steps(rank, world) for rank in range(world)]
        assert {len(of_rank) for of_rank in ranks} == {len(of_one)} == {-(-n // batch_size)}
        for whole, *shares in zip(of_one, *ranks, strict=True):
            counted = [index for share in shares if share.scale > 0 for index in share.index_B]
            assert sorted(counted) == sorted(whole.index_B), "each text counts on exactly one rank"
            for share in shares:
                assert share.index_B.size > 0, "every rank has something to run"
                assert share.scale in (0.0, world / whole.index_B.size)
        assert sorted(index for step in of_one for index in step.index_B) == list(range(n))
        assert all(step.scale == 1 / step.index_B.size for step in of_one)

    def test_epochs_differ_seeds_repeat_and_batches_hold_texts_of_similar_length(self):
        config, length_N = make_config(batch_size=16), np.random.default_rng(0).permutation(256)

        def order(rng):
            return [step.index_B.tolist() for step in plan_steps(length_N, config, 0, 1, rng)]

        rng = np.random.default_rng(3)
        first, second = order(rng), order(rng)
        assert first != second
        assert order(np.random.default_rng(3)) == first
        assert [np.ptp(length_N[index_B]) for index_B in first] == [15] * 16, (
            "one sorted window of 16 batches"
        )

    @pytest.mark.parametrize(
        ("n", "epochs", "min_steps", "expected"),
        [
            (160, 3, 1, (3, 30)),
            (160, 3, 30, (3, 30)),
            (160, 3, 31, (4, 40)),
            (161, 3, 31, (3, 33)),
            (5, 2, 7, (7, 7)),
            (1, 1, 1, (1, 1)),
        ],
    )
    def test_small_rounds_make_more_epochs(self, n, epochs, min_steps, expected):
        assert count_steps(n, make_config(epochs=epochs, min_steps=min_steps)) == expected


@pytest.fixture
def train_noting_gradients(monkeypatch):
    """Trains without dropout and without steps; returns a flat gradient for each step, facts and student."""
    noted = []

    def note(self, *_):
        noted.append(torch.cat([p.grad.ravel() for group in self.param_groups for p in group["params"]]))

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    # A rank's own gradient must stay as it is: DDP takes the mean before any clipping.
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: None)

    def train(config, batch, **rank):
        noted.clear()
        student = make_student(config.model)
        without_dropout(student.model)
        facts = train_round(student, batch, config, **rank)
        return torch.stack(noted), facts, student

    return train


class TestTrainRound:
    def test_learns(self, tiny_encoder):
        config = make_config(tiny_encoder, epochs=8)
        student, unseen = make_student(tiny_encoder), toy_batch(150, seed=1)
        before = (predict(student, unseen.texts, config).argmax(axis=1) == unseen.label_N).mean()
        facts = train_round(student, toy_batch(240), config)
        after = (predict(student, unseen.texts, config).argmax(axis=1) == unseen.label_N).mean()
        assert before < 0.6
        assert after > 0.85
        assert facts["steps"] == 8 * 15
        assert 0 < facts["loss"] < np.log(3)

    def test_a_student_that_diverges_is_an_error(self, tiny_encoder):
        """Once its predictions, which are no numbers, counted as texts that it had never scored."""
        student, config = make_student(tiny_encoder), make_config(tiny_encoder, learning_rate=1e30)
        with pytest.raises(FloatingPointError, match="the student's loss is"):
            train_round(student, toy_batch(40), config)
        with pytest.raises(FloatingPointError, match="probabilities"):
            predict(student, ["any text"], config)

    @pytest.mark.parametrize(("epochs", "min_steps", "steps"), [(2, 1, 6), (1, 7, 9)])
    def test_reports_its_progress_and_makes_whole_epochs(self, tiny_encoder, epochs, min_steps, steps):
        config, said = make_config(tiny_encoder, epochs=epochs, min_steps=min_steps), []
        facts = train_round(
            make_student(tiny_encoder), toy_batch(40), config, on_step=lambda *step: said.append(step)
        )
        assert said == [(i, steps) for i in range(1, steps + 1)]
        assert facts["steps"] == steps

    def test_the_same_seed_gives_the_same_weights(self, tiny_encoder):
        def trained(build_seed, seed):
            student = make_student(tiny_encoder, build_seed)
            train_round(student, toy_batch(40), make_config(tiny_encoder, epochs=1), seed=seed)
            return weights(student)

        first = trained(0, 0)
        assert same(trained(0, 0), first)
        assert not same(trained(0, 1), first)
        assert not same(trained(1, 0), first)

    def test_text_that_weighs_nothing_teaches_nothing(self, tiny_encoder):
        config, batch = make_config(tiny_encoder, epochs=2), toy_batch(32)
        weight_N, wrong_N = np.tile([1.0, 0.0], 16), (batch.label_N + 1) % 3

        def trained(label_N):
            student = make_student(tiny_encoder)
            facts = train_round(student, replace(batch, label_N=label_N, weight_N=weight_N), config)
            return weights(student), facts

        first, first_facts = trained(batch.label_N)
        other, other_facts = trained(np.where(weight_N > 0, batch.label_N, wrong_N))
        assert same(first, other)
        assert first_facts == other_facts
        assert not same(first, trained(np.where(weight_N > 0, wrong_N, batch.label_N))[0])

    def test_soft_learns_from_the_distribution_and_not_the_label(self, tiny_encoder):
        config, batch = make_config(tiny_encoder, epochs=2, loss="soft"), toy_batch(32)

        def trained(**changes):
            student = make_student(tiny_encoder)
            train_round(student, replace(batch, **changes), config)
            return weights(student)

        first = trained()
        assert same(first, trained(label_N=(batch.label_N + 1) % 3))
        assert not same(first, trained(p_NC=toy_teacher((batch.label_N + 1) % 3)))

    @pytest.mark.parametrize("world", [2, 3])
    def test_the_mean_gradient_over_ranks_is_that_of_one(self, tiny_encoder, train_noting_gradients, world):
        """Ranks run one after the other; the last batch of an epoch has one text."""
        config = make_config(tiny_encoder, epochs=2, batch_size=4)
        batch = replace(toy_batch(21), weight_N=np.random.default_rng(0).uniform(0, 2, 21))
        of_one, *_ = train_noting_gradients(config, batch, seed=1)
        assert len(of_one) == 12
        ranks = [
            train_noting_gradients(config, batch, rank=rank, world=world, seed=1)[0] for rank in range(world)
        ]
        torch.testing.assert_close(torch.stack(ranks).mean(0), of_one, rtol=1e-4, atol=1e-6)

    def test_rate_warms_up_and_falls_to_zero_and_only_matrices_decay(self, tiny_encoder, monkeypatch):
        config = make_config(tiny_encoder, epochs=5, warmup=0.2, learning_rate=0.01, weight_decay=0.3)
        rates, groups, plain_step = [], [], torch.optim.AdamW.step

        def noting(self, *arguments):
            rates.append(self.param_groups[0]["lr"])
            groups[:] = self.param_groups
            return plain_step(self, *arguments)

        monkeypatch.setattr(torch.optim.AdamW, "step", noting)
        student = make_student(tiny_encoder)
        train_round(student, toy_batch(64), config)
        assert len(rates) == 20
        assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
        assert rates[3:] == sorted(rates[3:], reverse=True)
        assert 0 < rates[-1] < 0.001
        assert {p.ndim: group["weight_decay"] for group in groups for p in group["params"]} == {1: 0, 2: 0.3}
        assert sum(len(group["params"]) for group in groups) == len(list(student.model.parameters()))

    def test_batches_go_by_tokens_and_not_by_characters(self, tiny_encoder, monkeypatch):
        """Texts of few tokens and many characters, and the other way round, in steps of their own."""
        config = make_config(tiny_encoder, batch_size=8, epochs=1)
        student, shapes = make_student(tiny_encoder), []
        texts = ["the" * 40] * 8 + ["a b c d e f g h i j k"] * 8
        length_N = lengths(student.encode(texts, config.max_tokens))
        plain = type(student).pad

        def noting(self, tokens_B):
            shapes.append((lengths(tokens_B).min(), lengths(tokens_B).max()))
            return plain(self, tokens_B)

        monkeypatch.setattr(type(student), "pad", noting)
        zeros_N = np.zeros(16, dtype=np.int64)
        train_round(student, Batch(texts, zeros_N, np.ones(16), np.eye(3)[zeros_N]), config)
        assert length_N.min() < length_N.max()
        assert len(shapes) == 2
        assert all(low == high for low, high in shapes), "no token of padding"

    @pytest.mark.parametrize(
        ("share_C", "weight_C", "prior_C", "expected_C"),
        [
            ([32, 24, 8], [1, 1, 1], None, [0.5, 0.375, 0.125]),
            ([32, 24, 8], [1, 1, 1], [0.1, 0.2, 0.7], [0.1, 0.2, 0.7]),
            ([32, 32, 0], [1.8, 0.2, 1], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0]),  # weights count as shares
        ],
    )
    def test_on_texts_that_tell_nothing_the_answer_is_the_prior(
        self, tiny_encoder, share_C, weight_C, prior_C, expected_C
    ):
        config = make_config(tiny_encoder, epochs=30, weight_decay=0.0)
        label_N = np.repeat([0, 1, 2], share_C)
        prior_C = None if prior_C is None else np.array(prior_C)
        batch = Batch(["the sea"] * 64, label_N, np.array(weight_C)[label_N], np.eye(3)[label_N], prior_C)
        student = make_student(tiny_encoder)
        train_round(student, batch, config)
        assert predict(student, ["the sea"], config)[0] == pytest.approx(expected_C, abs=0.05)
        assert (batch.logit_shift() == 0).all() == (prior_C is None)


class TestPriorShift:
    def test_is_the_log_of_what_is_shown_over_what_is_wanted(self):
        label_N, weight_N = np.array([0, 0, 0, 1]), np.array([1.0, 0.5, 0.5, 2.0])
        shift_C = prior_shift(label_N, weight_N, np.array([0.8, 0.2]))
        assert shift_C == pytest.approx(np.log([0.5 / 0.8, 0.5 / 0.2])), "shares are by weight"

    @pytest.mark.parametrize(
        ("label", "prior"), [([0, 0], [0.5, 0.5]), ([0, 1], [1.0, 0.0]), ([], [0.5, 0.5])]
    )
    def test_a_class_that_is_not_there_is_not_shifted(self, label, prior):
        shift_C = prior_shift(np.array(label, dtype=np.int64), np.ones(len(label)), np.array(prior))
        assert np.isfinite(shift_C).all()
        assert shift_C[1] == 0


def sums(signal: list[float], label: list[int], n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """What a step tells the moving threshold: sum and count of each class."""
    return np.bincount(label, weights=signal, minlength=n_classes), np.bincount(label, minlength=n_classes)


def one_over_the_classes(n_classes: int) -> MovingThreshold:
    return MovingThreshold(1 / n_classes, np.full(n_classes, 1 / n_classes))


class TestMovingThreshold:
    def test_moves_from_one_over_the_classes_in_freematchs_form(self):
        start = one_over_the_classes(3)
        np.testing.assert_allclose(start.of_class(), np.full(3, 1 / 3))
        assert start.after(np.zeros(3), np.zeros(3, dtype=int)) is start, "a step without texts"
        after = one_over_the_classes(3).after(*sums([0.8, 0.6, 1.0], [0, 0, 1], 3))
        overall = 0.9 / 3 + 0.1 * 0.8
        of_class = np.array([0.9 / 3 + 0.1 * 0.7, 0.9 / 3 + 0.1 * 1.0, 1 / 3])  # the last has no text
        assert after.overall == pytest.approx(overall)
        np.testing.assert_allclose(after.class_C, of_class)
        np.testing.assert_allclose(after.of_class(), overall * of_class / of_class.max())
        np.testing.assert_array_equal(MovingThreshold(0.0, np.zeros(3)).of_class(), np.zeros(3))

    def test_comes_to_the_means_of_a_signal_that_stays(self):
        step, threshold = sums([0.9, 0.9, 0.3, 0.3], [0, 0, 1, 1], 2), one_over_the_classes(2)
        for _ in range(300):
            threshold = threshold.after(*step)
        np.testing.assert_allclose(threshold.of_class(), class_thresholds(*step), rtol=1e-6)


def step_of(seed: int, n: int = 40, n_classes: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels and confidences of a step; the last class has no text."""
    rng = np.random.default_rng(seed)
    logits_BC = torch.tensor(rng.normal(0, rng.uniform(0.2, 4, (n, 1)), (n, n_classes)), requires_grad=True)
    label_B = torch.tensor(rng.integers(0, n_classes - 1, n))
    return logits_BC, label_B, torch.tensor(rng.uniform(0.3, 1.0, n))


def logits_of(*uncertainties: float) -> torch.Tensor:
    """Logits for two classes whose normalised entropy is as asked for."""
    p_X = np.linspace(0.5, 1 - 1e-12, 200_001)
    entropy_X = entropy(np.stack([p_X, 1 - p_X], axis=1))
    p_B = np.array([p_X[np.abs(entropy_X - wanted).argmin()] for wanted in uncertainties])
    return torch.tensor(np.log(np.stack([p_B, 1 - p_B], axis=1)))


class TestStepThresholds:
    def test_uncertainty_is_the_normalised_entropy(self):
        logits_BC, _, _ = step_of(0)
        own_B = uncertainty(logits_BC)
        assert not own_B.requires_grad
        assert own_B.numpy() == pytest.approx(entropy(torch.softmax(logits_BC, 1).detach().numpy()))
        assert uncertainty(torch.tensor([[900.0, 0.0], [0.0, 0.0]])).tolist() == pytest.approx([0.0, 1.0])

    def test_weight_is_confidence_times_uncertainty_with_a_mean_of_one(self):
        logits_BC, label_B, confidence_B = step_of(0)
        thresholds = StepThresholds("weight", 4)
        counts_B = thresholds.weigh(logits_BC, label_B, confidence_B, is_share=True)
        assert counts_B.dtype == torch.float32
        assert not counts_B.requires_grad
        expected_B = confidence_B.numpy() * uncertainty(logits_BC).numpy()
        assert counts_B.numpy() == pytest.approx(expected_B / expected_B.mean())
        assert thresholds.facts() == {}

    def test_mask_is_freematchs_thresholds_step_after_step(self):
        """The reference: the thresholds in numpy, moved before the step is judged."""
        step_thresholds, seen, kept = StepThresholds("mask", 4), 0, 0
        thresholds = [one_over_the_classes(4)] * 2
        for seed in range(30):
            logits_BC, label_B, confidence_B = step_of(seed)
            both_2N = np.stack([confidence_B.numpy(), uncertainty(logits_BC).numpy()])
            label_N = label_B.numpy()
            count_C = np.bincount(label_N, minlength=4)
            sum_2C = [np.bincount(label_N, signal_N, minlength=4) for signal_N in both_2N]
            thresholds = [t.after(sum_C, count_C) for t, sum_C in zip(thresholds, sum_2C, strict=True)]
            passes_N = np.all(
                [s >= t.of_class()[label_N] for s, t in zip(both_2N, thresholds, strict=True)], axis=0
            )
            counts_B = step_thresholds.weigh(logits_BC, label_B, confidence_B, is_share=True)
            assert passes_N.sum() > 0
            assert counts_B.numpy() == pytest.approx(passes_N * 40 / passes_N.sum())
            seen, kept = seen + 40, kept + passes_N.sum()
        assert 0.2 < kept / seen < 0.8
        assert step_thresholds.facts() == {"masked": pytest.approx(1 - kept / seen)}

    @pytest.mark.parametrize(
        ("kind", "logits_BC", "confidence", "expected"),
        [
            ("none", logits_of(0.5, 0.5), [0.9, 0.1], [1, 1]),
            ("weight", logits_of(0, 0) * 1e6, [1, 1], [0, 0]),  # a certain student has nothing to learn
            ("mask", logits_of(0.9, 0.1, 0.9, 0.1), [0.9, 0.9, 0.5, 0.5], [4, 0, 0, 0]),  # both signals count
            ("mask", logits_of(0.1, 0.9), [0.9, 0.5], [0, 0]),  # nothing passes
        ],
    )
    def test_one_step_of_one_class(self, kind, logits_BC, confidence, expected):
        label_B = torch.zeros(len(confidence), dtype=torch.long)
        thresholds = StepThresholds(kind, 2)
        counts_B = thresholds.weigh(logits_BC, label_B, torch.tensor(confidence, dtype=torch.float64), True)
        assert counts_B.tolist() == expected
        masked = {"masked": 1 - np.count_nonzero(expected) / len(expected)}
        assert thresholds.facts() == (masked if kind == "mask" else {})

    @pytest.mark.parametrize("confidence", [0.7, 0.83, 1.0])
    def test_equal_texts_all_pass_whatever_the_rounding(self, confidence):
        thresholds, logits_BC = StepThresholds("mask", 2), logits_of(*[0.87] * 30)
        for step in range(600):
            n = step % 30 + 1
            counts_B = thresholds.weigh(
                logits_BC[:n], torch.ones(n, dtype=torch.long), torch.full((n,), confidence), True
            )
            assert counts_B.tolist() == [1.0] * n

    def test_all_pass_while_a_fresh_student_knows_nothing(self):
        thresholds, label_B = StepThresholds("mask", 5), torch.arange(20) % 5
        for seed in range(10):
            rng = np.random.default_rng(seed)
            logits_BC, confidence_B = rng.normal(0, 0.1, (20, 5)), torch.tensor(rng.uniform(0.7, 1, 20))
            counts_B = thresholds.weigh(torch.tensor(logits_BC), label_B, confidence_B, True)
            assert counts_B.tolist() == [1.0] * 20

    def test_student_that_starts_nearly_certain_is_not_shut_out(self):
        thresholds, label_B = StepThresholds("mask", 2), torch.tensor([0, 0, 1, 1])
        for _ in range(10):
            logits_BC = logits_of(0.02, 0.06, 0.02, 0.06)
            counts_B = thresholds.weigh(logits_BC, label_B, torch.full((4,), 0.9), True)
            assert counts_B.tolist() == [0.0, 2.0, 0.0, 2.0]

    def test_texts_that_are_no_share_change_nothing(self):
        """A rank without a text of its own runs one of another rank's."""
        thresholds = StepThresholds("mask", 4)
        thresholds.weigh(*step_of(0), is_share=True)
        before = thresholds.confidence, thresholds.uncertainty, thresholds.facts()
        assert thresholds.weigh(*step_of(1, n=3), is_share=False).tolist() == [0.0] * 3
        assert (thresholds.confidence, thresholds.uncertainty, thresholds.facts()) == before


class TestStepThresholdsInARound:
    def test_mask_is_training_on_what_passes(self, tiny_encoder, train_noting_gradients):
        """The teacher is in doubt about every third text; a student that knows nothing, about all."""
        config = make_config(tiny_encoder, epochs=1, step_thresholds="mask")
        batch = toy_batch(15)
        unsure_N = np.arange(15) % 3 == 0
        doubted_NC = normalise(np.full((15, 3), 0.33) + 0.01 * np.eye(3)[batch.label_N])
        batch = replace(
            batch,
            p_NC=np.where(unsure_N[:, None], doubted_NC, batch.p_NC),
            weight_N=np.random.default_rng(0).uniform(0.5, 2, 15),
        )
        own, facts, _ = train_noting_gradients(config, batch)
        assert facts["masked"] == pytest.approx(1 / 3)
        sure = Batch(
            [text for text, unsure in zip(batch.texts, unsure_N, strict=True) if not unsure],
            *(array[~unsure_N] for array in (batch.label_N, batch.weight_N, batch.p_NC)),
        )
        plain, plain_facts, _ = train_noting_gradients(make_config(tiny_encoder, epochs=1), sure)
        assert "masked" not in plain_facts
        assert plain.abs().max() > 0
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-6)
        assert facts["loss"] == pytest.approx(plain_facts["loss"], rel=1e-5)

    def test_weight_is_training_with_those_weights(self, tiny_encoder, train_noting_gradients):
        config = make_config(tiny_encoder, epochs=1, step_thresholds="weight")
        batch = replace(toy_batch(15), weight_N=np.random.default_rng(0).uniform(0.5, 2, 15))
        own, facts, student = train_noting_gradients(config, batch)
        assert "masked" not in facts
        counts_N = confidence(batch.p_NC) * entropy(predict(student, batch.texts, config))
        weighted = replace(batch, weight_N=batch.weight_N * counts_N / counts_N.mean())
        plain, plain_facts, _ = train_noting_gradients(make_config(tiny_encoder, epochs=1), weighted)
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-6)
        assert facts["loss"] == pytest.approx(plain_facts["loss"], rel=1e-5)

    def test_where_nothing_passes_the_steps_are_made_and_change_nothing(self, tiny_encoder, monkeypatch):
        config = make_config(tiny_encoder, epochs=1, step_thresholds="mask", batch_size=4, weight_decay=0.0)
        student = make_student(tiny_encoder)
        before = weights(student)
        monkeypatch.setattr(StepThresholds, "_passes", lambda self, label_B, *_: torch.zeros_like(label_B))
        facts = train_round(student, toy_batch(12), config)
        assert facts == {"steps": 3, "loss": 0.0, "full": 0.0, "masked": 1.0}
        assert same(weights(student), before)


@pytest.mark.timeout(600)
@pytest.mark.slow
class TestRanks:
    """1, 2 and 4 real processes; the last batch of an epoch has two texts, so two of four ranks have none."""

    N, STEPS = 42, 18

    @pytest.fixture(scope="class")
    @classmethod
    def results(cls, tiny_encoder, tmp_path_factory):
        folder = tmp_path_factory.mktemp("ranks")
        texts, gold_N = toy_texts(cls.N, 3, 0)
        rng = np.random.default_rng(0)
        p_NC = normalise(toy_probs(gold_N, 3, 0.8, rng))
        batch = Batch(texts, p_NC.argmax(axis=1), rng.uniform(0.5, 1.5, cls.N), p_NC)
        # A student that has learned a little is sure of some texts and not of others.
        student = make_student(tiny_encoder)
        earlier, label_N = toy_texts(200, 3, 1)
        config = make_config(batch_size=8, epochs=3)
        train_round(student, Batch(earlier, label_N, np.ones(200), np.eye(3)[label_N]), config)
        student.module.save_pretrained(folder)
        student.tokenizer.save_pretrained(folder)
        configs = [
            make_config(str(folder), batch_size=8, epochs=3, learning_rate=0.03, step_thresholds=kind)
            for kind in ("mask", "weight")
        ]
        return train_on_ranks(Job(tuple(configs), LABELS, batch, (1, 2, 4)), folder)

    @pytest.mark.parametrize("kind", [0, 1], ids=["mask", "weight"])
    def test_weights_and_masked_texts_agree(self, results, kind):
        (of_one,) = results[kind, 1]
        for of_rank in (*results[kind, 1], *results[kind, 2], *results[kind, 4]):
            assert of_rank["steps"] == self.STEPS
            assert of_rank.get("masked") == of_one.get("masked")
            torch.testing.assert_close(of_rank["weights"], of_one["weights"], rtol=0, atol=2e-5)

    def test_what_counts_makes_a_difference(self, results):
        """Else the agreement above would be no test."""
        (mask,), (weight,) = results[0, 1], results[1, 1]
        assert 0.1 < mask["masked"] < 0.9
        assert (mask["weights"] - weight["weights"]).abs().max() > 100 * 2e-5
