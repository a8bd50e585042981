"""What texts count inside a step: the thresholds, the weights, and that all ranks decide as one does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranks import Job, train_on_ranks
from toys import NAMES, toy_probs, toy_texts

from llkd_ray.config.schema import LabelsConfig, StudentConfig
from llkd_ray.metrics.uncertainty import entropy, normalise
from llkd_ray.student.model import build_student
from llkd_ray.student.train import MOMENTUM, Batch, MovingThreshold, StepThresholds, train_round, uncertainty


def step_of(seed: int, n: int = 40, n_classes: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels and confidences of a step; the last class has no text."""
    rng = np.random.default_rng(seed)
    logits_BC = torch.tensor(rng.normal(0, rng.uniform(0.2, 4, (n, 1)), (n, n_classes)), requires_grad=True)
    label_B = torch.tensor(rng.integers(0, n_classes - 1, n))
    return logits_BC, label_B, torch.tensor(rng.uniform(0.3, 1.0, n))


def doubt(*uncertainties: float) -> torch.Tensor:
    """Logits for two classes whose normalised entropy is as asked for."""
    p_X = np.linspace(0.5, 1 - 1e-12, 200_001)
    entropy_X = entropy(np.stack([p_X, 1 - p_X], axis=1))
    p_B = np.array([p_X[np.abs(entropy_X - wanted).argmin()] for wanted in uncertainties])
    return torch.tensor(np.log(np.stack([p_B, 1 - p_B], axis=1)))


def test_uncertainty_is_that_of_signals():
    logits_BC, _, _ = step_of(0)
    own_B = uncertainty(logits_BC)
    assert not own_B.requires_grad
    assert own_B.numpy() == pytest.approx(entropy(torch.softmax(logits_BC, 1).detach().numpy()))
    certain_B = uncertainty(torch.tensor([[900.0, 0.0], [0.0, 0.0]]))
    assert certain_B.tolist() == pytest.approx([0.0, 1.0])


class TestNone:
    def test_all_count_one(self):
        step_thresholds = StepThresholds("none", 4)
        assert step_thresholds.weigh(*step_of(0), is_share=True).tolist() == [1.0] * 40
        assert step_thresholds.facts() == {}


class TestWeight:
    def test_confidence_times_uncertainty_with_a_mean_of_one(self):
        logits_BC, label_B, confidence_B = step_of(0)
        step_thresholds = StepThresholds("weight", 4)
        counts_B = step_thresholds.weigh(logits_BC, label_B, confidence_B, is_share=True)
        assert counts_B.dtype == torch.float32
        assert not counts_B.requires_grad
        expected_B = confidence_B.numpy() * uncertainty(logits_BC).numpy()
        assert counts_B.numpy() == pytest.approx(expected_B / expected_B.mean())
        assert step_thresholds.facts() == {}

    def test_certain_student_has_nothing_to_learn(self):
        counts_B = StepThresholds("weight", 2).weigh(
            doubt(0.0, 0.0) * 1e6, torch.zeros(2, dtype=torch.long), torch.ones(2), True
        )
        assert counts_B.tolist() == [0.0, 0.0]


class TestMask:
    def test_as_the_thresholds_of_signals_decide_step_after_step(self):
        """The reference: FreeMatch's thresholds in numpy, moved before the step is judged."""
        step_thresholds, seen, kept = StepThresholds("mask", 4), 0, 0
        thresholds = [MovingThreshold.start(4, MOMENTUM)] * 2
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

    def test_needs_confidence_and_uncertainty(self):
        counts_B = StepThresholds("mask", 2).weigh(
            doubt(0.9, 0.1, 0.9, 0.1),
            torch.zeros(4, dtype=torch.long),
            torch.tensor([0.9, 0.9, 0.5, 0.5]),
            True,
        )
        assert counts_B.tolist() == [4.0, 0.0, 0.0, 0.0]

    def test_nothing_may_pass(self):
        step_thresholds = StepThresholds("mask", 2)
        counts_B = step_thresholds.weigh(
            doubt(0.1, 0.9), torch.zeros(2, dtype=torch.long), torch.tensor([0.9, 0.5]), True
        )
        assert counts_B.tolist() == [0.0, 0.0]
        assert step_thresholds.facts() == {"masked": 1.0}

    @pytest.mark.parametrize("confidence", [0.7, 0.83, 1.0])
    def test_equal_texts_all_pass_whatever_the_rounding(self, confidence):
        step_thresholds, logits_BC = StepThresholds("mask", 2), doubt(*[0.87] * 30)
        for step in range(600):
            n = step % 30 + 1
            counts_B = step_thresholds.weigh(
                logits_BC[:n], torch.ones(n, dtype=torch.long), torch.full((n,), confidence), True
            )
            assert counts_B.tolist() == [1.0] * n

    def test_all_pass_while_a_fresh_student_knows_nothing(self):
        step_thresholds, label_B = StepThresholds("mask", 5), torch.arange(20) % 5
        for seed in range(10):
            rng = np.random.default_rng(seed)
            logits_BC, confidence_B = rng.normal(0, 0.1, (20, 5)), rng.uniform(0.7, 1, 20)
            confidence_B = torch.tensor(confidence_B)
            counts_B = step_thresholds.weigh(torch.tensor(logits_BC), label_B, confidence_B, True)
            assert counts_B.tolist() == [1.0] * 20

    def test_student_that_starts_nearly_certain_is_not_shut_out(self):
        step_thresholds, label_B = StepThresholds("mask", 2), torch.tensor([0, 0, 1, 1])
        for _ in range(10):
            logits_BC = doubt(0.02, 0.06, 0.02, 0.06)
            counts_B = step_thresholds.weigh(logits_BC, label_B, torch.full((4,), 0.9), True)
            assert counts_B.tolist() == [0.0, 2.0, 0.0, 2.0]

    def test_texts_that_are_no_share_change_nothing(self):
        """A rank without a text of its own runs one of another rank's."""
        step_thresholds = StepThresholds("mask", 4)
        step_thresholds.weigh(*step_of(0), is_share=True)
        before = step_thresholds.confidence, step_thresholds.uncertainty, step_thresholds.facts()
        assert step_thresholds.weigh(*step_of(1, n=3), is_share=False).tolist() == [0.0] * 3
        assert (step_thresholds.confidence, step_thresholds.uncertainty, step_thresholds.facts()) == before


@pytest.mark.timeout(600)
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
        fields = {"batch_size": 8, "max_tokens": 32, "precision": "float32", "epochs": 3, "min_steps": 1}
        labels = LabelsConfig(names=NAMES[:3])
        # A student that has learned a little is sure of some texts and not of others.
        begun = StudentConfig.model_validate(fields | {"model": tiny_encoder, "learning_rate": 0.01})
        learner = build_student(begun, labels, 0, torch.device("cpu"))
        earlier, label_N = toy_texts(200, 3, 1)
        train_round(learner, Batch(earlier, label_N, np.ones(200), np.eye(3)[label_N]), begun)
        learner.module.save_pretrained(folder)
        learner.tokenizer.save_pretrained(folder)
        fields |= {"model": str(folder), "learning_rate": 0.03}
        configs = [
            StudentConfig.model_validate(fields | {"step_thresholds": kind}) for kind in ("mask", "weight")
        ]
        return train_on_ranks(Job(tuple(configs), labels, batch, (1, 2, 4)), folder)

    @pytest.mark.parametrize("kind", [0, 1], ids=["mask", "weight"])
    def test_weights_agree(self, results, kind):
        alone = results[kind, 1][0]
        assert alone["steps"] == self.STEPS
        for world in (2, 4):
            for of_rank in results[kind, world]:
                assert of_rank["steps"] == self.STEPS
                torch.testing.assert_close(of_rank["weights"], alone["weights"], rtol=0, atol=2e-5)

    def test_as_many_texts_are_masked(self, results):
        (alone,) = results[0, 1]
        masked = alone["masked"] * 3 * self.N
        assert masked == pytest.approx(round(masked))
        assert 0.1 < alone["masked"] < 0.9
        assert [of_rank["masked"] for world in (2, 4) for of_rank in results[0, world]] == [
            alone["masked"]
        ] * 6

    def test_what_counts_makes_a_difference(self, results):
        """Else the agreement above would be no test."""
        mask, weight = (results[kind, 1][0]["weights"] for kind in range(2))
        assert (mask - weight).abs().max() > 100 * 2e-5
