"""The student learns, alike on any number of ranks; ranks are played one after the other here."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import NAMES, toy_probs, toy_texts
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    MambaConfig,
    pipeline,
)

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import LabelsConfig, StudentConfig
from llkd_ray.metrics.uncertainty import confidence, entropy, normalise
from llkd_ray.student.inference import by_length, made_ahead, predict
from llkd_ray.student.model import bfloat16_pays, build_student, check_student, lengths, resolve_model
from llkd_ray.student.train import LOSSES, Batch, InStep, count_steps, plan_steps, train_round

LABELS = LabelsConfig(names=NAMES[:3])
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """More threads than free cores make the tiny models a hundred times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_config(model: str = "unused", **fields) -> StudentConfig:
    given = {
        "model": model,
        "batch_size": 16,
        "max_tokens": 32,
        "precision": "float32",
        "learning_rate": 1e-2,
        "min_steps": 1,
    }
    return StudentConfig.model_validate(given | fields)


def toy_batch(n: int, seed: int = 0) -> Batch:
    texts, gold_N = toy_texts(n, 3, seed)
    return Batch(texts, gold_N, np.ones(n), toy_teacher(gold_N, seed))


def toy_teacher(label_N: np.ndarray, seed: int = 0) -> np.ndarray:
    """A distribution for each text whose likeliest label is the one given."""
    return normalise(toy_probs(label_N, 3, 1.0, np.random.default_rng(seed)))


def weights(student) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in student.module.state_dict().items()}


def same(one, other) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


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

        alone = steps(0, 1)
        ranks = [steps(rank, world) for rank in range(world)]
        assert {len(of_rank) for of_rank in ranks} == {len(alone)} == {-(-n // batch_size)}
        for whole, *shares in zip(alone, *ranks, strict=True):
            counted = [index for share in shares if share.scale > 0 for index in share.index_B]
            assert sorted(counted) == sorted(whole.index_B), "each text counts on exactly one rank"
            for share in shares:
                assert share.index_B.size > 0, "every rank has something to run"
                assert share.scale in (0.0, world / whole.index_B.size)
        assert sorted(index for step in alone for index in step.index_B) == list(range(n))
        assert all(step.scale == 1 / step.index_B.size for step in alone)

    def test_epochs_differ_and_seeds_repeat(self):
        config, length_N = make_config(batch_size=8), np.arange(100)

        def order(rng):
            return [step.index_B.tolist() for step in plan_steps(length_N, config, 0, 1, rng)]

        rng = np.random.default_rng(3)
        first, second = order(rng), order(rng)
        assert first != second
        assert order(np.random.default_rng(3)) == first

    def test_batches_hold_texts_of_like_length(self):
        config = make_config(batch_size=16)
        length_N = np.random.default_rng(0).permutation(256)
        spread = [
            np.ptp(length_N[step.index_B])
            for step in plan_steps(length_N, config, 0, 1, np.random.default_rng(0))
        ]
        assert spread == [15] * 16, "one window of 16 batches, sorted, is cut into neighbours"


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
def test_small_rounds_make_more_epochs(n, epochs, min_steps, expected):
    assert count_steps(n, make_config(epochs=epochs, min_steps=min_steps)) == expected


class TestGradients:
    @pytest.mark.parametrize("world", [2, 3, 4])
    @pytest.mark.parametrize("batch_size", [7, 2])
    def test_mean_over_ranks_is_the_gradient_of_one(self, world, batch_size):
        """As DDP does it; with two texts a batch, some ranks have none of their own."""
        rng = np.random.default_rng(0)
        x_NF = torch.tensor(rng.normal(size=(17, 5)), dtype=torch.float32)
        label_N, weight_N = rng.integers(0, 3, 17), rng.uniform(0, 2, 17)
        config = make_config(batch_size=batch_size)
        torch.manual_seed(0)
        first = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

        def gradients(rank, world):
            """One flat gradient for every step of an epoch."""
            for step in plan_steps(np.ones(17), config, rank, world, np.random.default_rng(1)):
                model = copy.deepcopy(first)
                loss_B = nn.functional.cross_entropy(
                    model(x_NF[step.index_B]), torch.tensor(label_N[step.index_B]), reduction="none"
                )
                ((torch.tensor(weight_N[step.index_B]) * loss_B).sum() * step.scale).backward()
                yield torch.cat([p.grad.ravel() for p in model.parameters()])

        alone = list(gradients(0, 1))
        ranks = [list(gradients(rank, world)) for rank in range(world)]
        for whole, *shares in zip(alone, *ranks, strict=True):
            assert whole.abs().max() > 0
            torch.testing.assert_close(torch.stack(shares).mean(0), whole, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("world", [2, 3])
    def test_train_round_itself_does_so(self, tiny_encoder, monkeypatch, world):
        """Ranks run one after the other, with an optimiser that only notes what it is given."""
        config = make_config(tiny_encoder, epochs=2, batch_size=4)
        batch = replace(toy_batch(21), weight_N=np.random.default_rng(0).uniform(0, 2, 21))
        noted = []

        def note(self, *_):
            parts = [p.grad.ravel() for group in self.param_groups for p in group["params"]]
            noted.append(torch.cat(parts))

        monkeypatch.setattr(torch.optim.AdamW, "step", note)
        # A rank's own gradient must stay as it is: DDP takes the mean before any clipping.
        monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: None)

        def gradients(rank, world):
            noted.clear()
            learner = build_student(config, LABELS, 0, CPU)
            for part in learner.model.modules():
                if isinstance(part, nn.Dropout):
                    part.p = 0.0
            train_round(learner, batch, config, rank=rank, world=world, seed=1)
            return torch.stack(noted)

        alone = gradients(0, 1)
        assert len(alone) == 12
        ranks = [gradients(rank, world) for rank in range(world)]
        torch.testing.assert_close(torch.stack(ranks).mean(0), alone, rtol=1e-4, atol=1e-6)


class TestTrainRound:
    def test_learns(self, tiny_encoder):
        config = make_config(tiny_encoder, epochs=8)
        learner = build_student(config, LABELS, 0, CPU)
        unseen = toy_batch(150, seed=1)
        before = (predict(learner, unseen.texts, config).argmax(axis=1) == unseen.label_N).mean()
        facts = train_round(learner, toy_batch(240), config)
        after = (predict(learner, unseen.texts, config).argmax(axis=1) == unseen.label_N).mean()
        assert before < 0.6
        assert after > 0.85
        assert facts["steps"] == 8 * 15
        assert 0 < facts["loss"] < np.log(3)

    def test_says_how_far_it_is(self, tiny_encoder):
        config, said = make_config(tiny_encoder, epochs=2), []
        learner = build_student(config, LABELS, 0, CPU)
        facts = train_round(learner, toy_batch(40), config, on_step=lambda *step: said.append(step))
        assert said == [(i, 6) for i in range(1, 7)]
        assert facts["steps"] == 6

    def test_makes_the_steps_it_must(self, tiny_encoder):
        config, said = make_config(tiny_encoder, epochs=1, min_steps=7), []
        learner = build_student(config, LABELS, 0, CPU)
        facts = train_round(learner, toy_batch(40), config, on_step=lambda *step: said.append(step))
        assert said == [(i, 9) for i in range(1, 10)], "whole epochs of three steps"
        assert facts["steps"] == 9

    def test_is_the_same_again_by_seed(self, tiny_encoder):
        config = make_config(tiny_encoder, epochs=1)

        def trained(build_seed, seed):
            learner = build_student(config, LABELS, build_seed, CPU)
            train_round(learner, toy_batch(40), config, seed=seed)
            return weights(learner)

        first = trained(0, 0)
        assert same(trained(0, 0), first)
        assert not same(trained(0, 1), first)
        assert not same(trained(1, 0), first)

    def test_text_that_weighs_nothing_teaches_nothing(self, tiny_encoder):
        config = make_config(tiny_encoder, epochs=2)
        batch = toy_batch(32)
        weight_N = np.tile([1.0, 0.0], 16)

        def trained(label_N):
            learner = build_student(config, LABELS, 0, CPU)
            facts = train_round(learner, replace(batch, label_N=label_N, weight_N=weight_N), config)
            return weights(learner), facts

        (first, first_facts), (other, other_facts) = (
            trained(batch.label_N),
            trained(np.where(weight_N > 0, batch.label_N, (batch.label_N + 1) % 3)),
        )
        assert same(first, other)
        assert first_facts == other_facts
        wrong, _ = trained(np.where(weight_N > 0, (batch.label_N + 1) % 3, batch.label_N))
        assert not same(first, wrong)

    def test_heavier_texts_teach_more(self, tiny_encoder):
        """Each text is there with two labels; the student believes the heavier one."""
        config = make_config(tiny_encoder, epochs=6)
        batch = toy_batch(120)
        twice = Batch(
            batch.texts * 2,
            np.concatenate([batch.label_N, (batch.label_N + 1) % 3]),
            np.repeat([0.1, 1.9], 120),
            np.tile(batch.p_NC, (2, 1)),
        )
        learner = build_student(config, LABELS, 0, CPU)
        train_round(learner, twice, config)
        answers = predict(learner, batch.texts, config).argmax(axis=1)
        assert (answers == (batch.label_N + 1) % 3).mean() > 0.8

    def test_rate_warms_up_and_falls_to_zero(self, tiny_encoder, monkeypatch):
        config = make_config(tiny_encoder, epochs=5, warmup=0.2, learning_rate=0.01)
        rates, plain_step = [], torch.optim.AdamW.step

        def noting(self, *arguments):
            rates.append(self.param_groups[0]["lr"])
            return plain_step(self, *arguments)

        monkeypatch.setattr(torch.optim.AdamW, "step", noting)
        train_round(build_student(config, LABELS, 0, CPU), toy_batch(64), config)
        assert len(rates) == 20
        assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
        assert rates[3:] == sorted(rates[3:], reverse=True)
        assert 0 < rates[-1] < 0.001

    def test_weight_decay_is_for_matrices(self, tiny_encoder, monkeypatch):
        groups, plain_init = [], torch.optim.AdamW.__init__

        def noting(self, parameters, **options):
            groups.extend(parameters)
            plain_init(self, parameters, **options)

        monkeypatch.setattr(torch.optim.AdamW, "__init__", noting)
        config = make_config(tiny_encoder, epochs=1, weight_decay=0.3)
        learner = build_student(config, LABELS, 0, CPU)
        train_round(learner, toy_batch(8), config)
        decay = {p.ndim: group["weight_decay"] for group in groups for p in group["params"]}
        assert decay == {1: 0.0, 2: 0.3}
        assert sum(len(group["params"]) for group in groups) == len(list(learner.model.parameters()))


class TestPrior:
    def test_without_one_nothing_is_shifted(self):
        assert toy_batch(4).logit_shift().tolist() == [0, 0, 0]

    def test_decides_what_the_student_expects_and_not_what_it_is_shown(self, tiny_encoder):
        """On texts that tell nothing, the student's answer is the prior."""
        config = make_config(tiny_encoder, epochs=30, weight_decay=0.0)
        label_N = np.repeat([0, 1, 2], [32, 24, 8])
        texts = ["the sea"] * label_N.size
        prior_C = np.array([0.1, 0.2, 0.7])
        for prior, expected in ((None, [0.5, 0.375, 0.125]), (prior_C, prior_C)):
            learner = build_student(config, LABELS, 0, CPU)
            batch = Batch(texts, label_N, np.ones(label_N.size), np.eye(3)[label_N], prior)
            train_round(learner, batch, config)
            assert predict(learner, ["the sea"], config)[0] == pytest.approx(expected, abs=0.05)

    def test_weights_count_as_shares(self, tiny_encoder):
        """A heavy class is one that is shown often, so that the prior takes weights out again, too."""
        config = make_config(tiny_encoder, epochs=30, weight_decay=0.0)
        label_N = np.repeat([0, 1], 32)
        weight_N = np.where(label_N == 0, 1.8, 0.2)
        learner = build_student(config, LABELS, 0, CPU)
        prior_C = np.array([0.5, 0.5, 0.0])
        batch = Batch(["the sea"] * 64, label_N, weight_N, np.eye(3)[label_N], prior_C)
        train_round(learner, batch, config)
        assert predict(learner, ["the sea"], config)[0, :2] == pytest.approx([0.5, 0.5], abs=0.05)


class TestLosses:
    @pytest.mark.parametrize("loss", LOSSES)
    def test_each_learns(self, tiny_encoder, loss):
        config = make_config(tiny_encoder, epochs=8, loss=loss)
        learner, unseen, batch = build_student(config, LABELS, 0, CPU), toy_batch(150, seed=1), toy_batch(240)
        # A teacher that is mostly sure, else all labels are candidates.
        train_round(learner, replace(batch, p_NC=normalise(batch.p_NC**4)), config)
        assert (predict(learner, unseen.texts, config).argmax(axis=1) == unseen.label_N).mean() > 0.8

    def test_soft_learns_from_the_distribution_and_not_the_label(self, tiny_encoder):
        config = make_config(tiny_encoder, epochs=2, loss="soft")
        batch = toy_batch(32)

        def trained(**changes):
            learner = build_student(config, LABELS, 0, CPU)
            train_round(learner, replace(batch, **changes), config)
            return weights(learner)

        first = trained()
        assert same(first, trained(label_N=(batch.label_N + 1) % 3))
        assert not same(first, trained(p_NC=toy_teacher((batch.label_N + 1) % 3)))


class TestInStep:
    @staticmethod
    def one_step(monkeypatch, config, batch):
        """Gradient and facts of a round of one step, without dropout; and the student before it."""
        noted = []

        def note(self, *_):
            noted.extend(p.grad.ravel() for group in self.param_groups for p in group["params"])

        monkeypatch.setattr(torch.optim.AdamW, "step", note)
        monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: None)
        learner = build_student(config, LABELS, 0, CPU)
        for part in learner.model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        facts = train_round(learner, batch, config)
        assert facts["steps"] == 1
        return torch.cat(noted), facts, learner

    def test_mask_is_training_on_what_passes(self, tiny_encoder, monkeypatch):
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
        own, facts, _ = self.one_step(monkeypatch, config, batch)
        assert facts["masked"] == pytest.approx(1 / 3)
        sure = Batch(
            [text for text, unsure in zip(batch.texts, unsure_N, strict=True) if not unsure],
            *(array[~unsure_N] for array in (batch.label_N, batch.weight_N, batch.p_NC)),
        )
        plain, plain_facts, _ = self.one_step(monkeypatch, make_config(tiny_encoder, epochs=1), sure)
        assert "masked" not in plain_facts
        assert plain.abs().max() > 0
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-6)
        assert facts["loss"] == pytest.approx(plain_facts["loss"], rel=1e-5)

    def test_weight_is_training_with_those_weights(self, tiny_encoder, monkeypatch):
        config = make_config(tiny_encoder, epochs=1, step_thresholds="weight")
        batch = replace(toy_batch(15), weight_N=np.random.default_rng(0).uniform(0.5, 2, 15))
        own, facts, learner = self.one_step(monkeypatch, config, batch)
        assert "masked" not in facts
        counts_N = confidence(batch.p_NC) * entropy(predict(learner, batch.texts, config))
        weighted = replace(batch, weight_N=batch.weight_N * counts_N / counts_N.mean())
        plain, plain_facts, _ = self.one_step(monkeypatch, make_config(tiny_encoder, epochs=1), weighted)
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-6)
        assert facts["loss"] == pytest.approx(plain_facts["loss"], rel=1e-5)

    def test_nothing_passes(self, tiny_encoder, monkeypatch):
        """The steps are made all the same, as on other ranks, and leave no trace but the weight decay."""
        config = make_config(tiny_encoder, epochs=1, step_thresholds="mask", batch_size=4, weight_decay=0.0)
        learner = build_student(config, LABELS, 0, CPU)
        before = weights(learner)
        monkeypatch.setattr(InStep, "_passes", lambda self, label_B, *_: torch.zeros_like(label_B))
        facts = train_round(learner, toy_batch(12), config)
        assert facts == {"steps": 3, "loss": 0.0, "masked": 1.0}
        assert same(weights(learner), before)

    @pytest.mark.parametrize("step_thresholds", ["mask", "weight"])
    def test_learns(self, tiny_encoder, in_step):
        config = make_config(tiny_encoder, epochs=20, step_thresholds=in_step)
        learner, unseen = build_student(config, LABELS, 0, CPU), toy_batch(150, seed=1)
        train_round(learner, toy_batch(240), config)
        assert (predict(learner, unseen.texts, config).argmax(axis=1) == unseen.label_N).mean() > 0.6


class TestPredict:
    @pytest.fixture(scope="class")
    @classmethod
    def learner(cls, tiny_encoder):
        return build_student(make_config(tiny_encoder), LABELS, 0, CPU)

    def test_order_is_kept_whatever_the_batches(self, learner):
        texts, _ = toy_texts(30, 3, seed=2)
        texts[4] = "sea " * 100  # longer than max_tokens
        texts[9] = ""
        whole = predict(learner, texts, make_config(score_batch_size=64))
        assert whole.shape == (30, 3)
        assert whole.dtype == np.float64
        assert whole.sum(axis=1) == pytest.approx(np.ones(30))
        alone = np.concatenate([predict(learner, [text], make_config()) for text in texts])
        assert whole == pytest.approx(alone, abs=1e-5)
        assert predict(learner, texts, make_config(score_batch_size=7)) == pytest.approx(whole, abs=1e-5)
        assert predict(learner, texts[::-1], make_config())[::-1] == pytest.approx(whole, abs=1e-5)
        assert np.ptp(whole[:, 0]) > 0.001, "the texts get different answers"

    def test_nothing(self, learner):
        assert predict(learner, [], make_config()).shape == (0, 3)

    def test_without_dropout_and_training_puts_it_back(self, tiny_encoder):
        config = make_config(tiny_encoder, epochs=1)
        learner = build_student(config, LABELS, 0, CPU)
        train_round(learner, toy_batch(16), config)
        one, other = (predict(learner, ["the sea"], config) for _ in range(2))
        assert np.array_equal(one, other)
        modes = []
        train_round(learner, toy_batch(16), config, on_step=lambda *_: modes.append(learner.model.training))
        assert modes == [True]

    def test_wrapped_model_is_asked_without_its_wrapper(self, learner):
        class Wrapper(nn.Module):
            def __init__(self, module):
                super().__init__()
                self.module = module

            def forward(self, **_):
                raise AssertionError("the wrapper would wait for other ranks")

        wrapped = replace(learner, model=Wrapper(learner.model))
        assert np.array_equal(
            predict(wrapped, ["the sea"], make_config()), predict(learner, ["the sea"], make_config())
        )


class TestBuild:
    def test_labels_are_in_the_model(self, tiny_encoder, tmp_path):
        learner = build_student(make_config(tiny_encoder), LABELS, 0, CPU)
        assert learner.module.config.id2label == {0: "sea", 1: "kitchen", 2: "garden"}
        assert learner.module.config.label2id == {"sea": 0, "kitchen": 1, "garden": 2}
        learner.module.save_pretrained(tmp_path)
        learner.tokenizer.save_pretrained(tmp_path)
        classify = pipeline("text-classification", model=str(tmp_path), device="cpu")
        (answer,) = classify(["the anchor of the boat"])
        p_C = predict(learner, ["the anchor of the boat"], make_config())[0]
        assert answer["label"] == NAMES[p_C.argmax()]
        assert answer["score"] == pytest.approx(p_C.max(), abs=1e-5)

    def test_the_body_is_the_checkpoints_and_the_head_is_fresh(self, tiny_encoder):
        first, again, other = (
            build_student(make_config(tiny_encoder), LABELS, seed, CPU) for seed in (0, 0, 1)
        )
        assert same(weights(first), weights(again))
        embeddings = "bert.embeddings.word_embeddings.weight"
        assert torch.equal(weights(first)[embeddings], weights(other)[embeddings])
        assert not torch.equal(weights(first)["classifier.weight"], weights(other)["classifier.weight"])
        assert weights(first)["classifier.weight"].shape[0] == 3

    def test_classifier_for_other_labels_gets_a_new_head(self, tiny_encoder, tmp_path):
        earlier = build_student(make_config(tiny_encoder), LabelsConfig(names=NAMES[:5]), 0, CPU)
        earlier.module.save_pretrained(tmp_path)
        earlier.tokenizer.save_pretrained(tmp_path)
        learner = build_student(make_config(str(tmp_path)), LABELS, 0, CPU)
        assert predict(learner, ["x"], make_config()).shape == (1, 3)
        assert learner.module.config.id2label == {0: "sea", 1: "kitchen", 2: "garden"}

    def test_decoder_without_a_pad_token(self, tiny_llm, tmp_path):
        model = LlamaForCausalLM.from_pretrained(tiny_llm)
        model.config.pad_token_id = None
        model.generation_config.pad_token_id = None
        model.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
        tokenizer.pad_token = None
        tokenizer.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).pad_token_id is None
        learner = build_student(make_config(str(tmp_path)), LABELS, 0, CPU)
        texts = ["the sea", "a much longer text about an oven and a pan"]
        together = predict(learner, texts, make_config())
        alone = np.concatenate([predict(learner, [text], make_config()) for text in texts])
        assert together == pytest.approx(alone, abs=1e-5), "padding is not taken for text"

    @pytest.mark.parametrize(("precision", "autocast"), [("float32", False), ("bfloat16", True)])
    def test_precision(self, tiny_encoder, precision, autocast):
        config = make_config(tiny_encoder, precision=precision)
        learner = build_student(config, LABELS, 0, CPU)
        assert learner.autocast == autocast
        assert all(p.dtype == torch.float32 for p in learner.model.parameters())
        assert learner.logits(learner.encode(["the sea"], 32)).dtype == torch.float32

    @pytest.mark.parametrize(("there", "pays"), [(True, True), (True, False), (False, True)])
    def test_auto_precision_is_bf16_where_it_is_there_and_pays(self, tiny_encoder, monkeypatch, there, pays):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: there)
        monkeypatch.setattr("llkd_ray.student.model.bfloat16_pays", lambda device: pays)
        learner = build_student(make_config(tiny_encoder, precision="auto"), LABELS, 0, CPU)
        assert learner.autocast == (there and pays)

    @pytest.mark.parametrize("others", [True, False])
    def test_ranks_take_one_precision(self, tiny_encoder, monkeypatch, others):
        """Of ranks that measured differently, each took its own, and steps waited for those in float32."""
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
        monkeypatch.setattr("llkd_ray.student.model.bfloat16_pays", lambda device: True)

        def all_reduce(answer, op):
            assert op == dist.ReduceOp.MIN
            answer.fill_(min(int(answer), others))

        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "all_reduce", all_reduce)
        learner = build_student(make_config(tiny_encoder, precision="auto"), LABELS, 0, CPU)
        assert learner.autocast == others

    @pytest.mark.parametrize("seconds", [{"float32": 2, "bfloat16": 1}, {"float32": 1, "bfloat16": 2}])
    def test_bf16_pays_where_it_is_faster(self, monkeypatch, seconds):
        """One product in seven is quick enough to tell; the others met a busy core."""
        clock, calls = [0.0], []

        def linear(x, w):
            calls.append(x.dtype)
            busy = 0 if len(calls) > 6 else 10 * len(calls)
            clock[0] += seconds[str(x.dtype).removeprefix("torch.")] + busy

        monkeypatch.setattr("llkd_ray.student.model.time.perf_counter", lambda: clock[0])
        monkeypatch.setattr(nn.functional, "linear", linear)
        assert bfloat16_pays.__wrapped__(CPU) == (seconds["bfloat16"] < seconds["float32"])


class TestTokens:
    def test_each_text_is_as_the_tokenizer_alone_reads_it(self, tiny_encoder):
        learner = build_student(make_config(tiny_encoder), LABELS, 0, CPU)
        texts = ["the sea", "a much longer text about an oven and a pan", "the boat"]
        tokens_N = learner.encode(texts, 6)
        assert tokens_N == [dict(learner.tokenizer(text, truncation=True, max_length=6)) for text in texts]
        assert lengths(tokens_N).tolist() == [len(tokens["input_ids"]) for tokens in tokens_N]
        assert lengths(tokens_N).max() == 6
        assert learner.encode([], 6) == []

    def test_batches_go_by_tokens_and_not_by_characters(self, tiny_encoder, monkeypatch):
        """Texts of few tokens and many characters, and the other way round, in steps of their own."""
        config = make_config(tiny_encoder, batch_size=8, epochs=1)
        learner = build_student(config, LABELS, 0, CPU)
        texts = ["the" * 40] * 8 + ["a b c d e f g h i j k"] * 8
        counts_N = lengths(learner.encode(texts, config.max_tokens))
        shapes = []
        plain = type(learner).pad

        def noting(self, tokens_B):
            shapes.append((min(map(len, (t["input_ids"] for t in tokens_B))), max(lengths(tokens_B))))
            return plain(self, tokens_B)

        monkeypatch.setattr(type(learner), "pad", noting)
        train_round(
            learner, Batch(texts, np.zeros(16, dtype=np.int64), np.ones(16), np.eye(3)[[0] * 16]), config
        )
        predict(learner, texts, make_config(tiny_encoder, score_batch_size=8))
        assert counts_N.min() < counts_N.max()
        assert len(shapes) == 4
        assert all(low == high for low, high in shapes), "no token of padding"

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_padding_is_the_tokenizers(self, tiny_encoder, side):
        learner = build_student(make_config(tiny_encoder), LABELS, 0, CPU)
        learner.tokenizer.padding_side = side
        learner.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        learner.tokenizer._pad_token_type_id = 1
        tokens_B = learner.encode(["the sea", "a much longer text about an oven and a pan", ""], 32)
        expected = learner.tokenizer.pad(tokens_B, return_tensors="pt")
        padded = learner.pad(tokens_B)
        assert padded.keys() == expected.keys() == set(learner.tokenizer.model_input_names)
        assert all(torch.equal(padded[name], expected[name]) for name in padded)
        assert (padded["token_type_ids"] == 1).any()
        assert padded["input_ids"].dtype == torch.int64

    def test_decoder_padded_on_the_left_answers_as_on_the_right(self, tiny_llm):
        learner = build_student(make_config(tiny_llm), LABELS, 0, CPU)
        texts = ["the sea", "a much longer text about an oven and a pan"]
        right = predict(learner, texts, make_config())
        learner.tokenizer.padding_side = "left"
        assert predict(learner, texts, make_config()) == pytest.approx(right, abs=1e-5)

    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(st.integers(1, 60), min_size=1, max_size=80),
        st.integers(1, 9),
        st.none() | st.integers(1, 200),
    )
    def test_batches_fill_the_budget_and_hold_each_text_once(self, length_N, size, budget):
        tokens_N = [{"input_ids": [1] * length} for length in length_N]
        batches = list(by_length(tokens_N, size, budget))
        assert sorted(np.concatenate(batches)) == list(range(len(length_N)))
        longest = [max(length_N[i] for i in index_B) for index_B in batches]
        assert longest == sorted(longest, reverse=True)
        for index_B, most in zip(batches[:-1], longest, strict=False):
            assert index_B.size == max(size, (budget or 0) // most)


class TestOnAGpu:
    """What scoring does for a GPU only, on the CPU, which takes it for one."""

    @pytest.fixture
    def learner(self, tiny_encoder, monkeypatch):
        student = build_student(make_config(tiny_encoder), LABELS, 0, CPU)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        plain = torch.Tensor.to

        def stay(self, *where, **options):
            return self if torch.device("cuda") in where else plain(self, *where, **options)

        monkeypatch.setattr(torch.Tensor, "to", stay)
        monkeypatch.setattr("llkd_ray.student.inference.GPU_CHUNK", 8)
        return replace(student, device=torch.device("cuda"))

    def test_answers_are_the_same(self, learner):
        texts, _ = toy_texts(30, 3, seed=2)
        texts[4], texts[9] = "sea " * 100, ""
        config = make_config(score_batch_size=3)
        on_cpu = predict(replace(learner, device=CPU), texts, config)
        assert predict(learner, texts, config) == pytest.approx(on_cpu, abs=1e-5)
        assert predict(learner, [], config).shape == (0, 3)

    def test_short_texts_fill_a_batch_and_a_mask_that_hides_nothing_is_left_out(self, learner, monkeypatch):
        shapes, plain = [], type(learner).forward

        def noting(self, inputs):
            shapes.append((*inputs["input_ids"].shape, "attention_mask" in inputs))
            return plain(self, inputs)

        monkeypatch.setattr(type(learner), "forward", noting)
        texts = ["sea"] * 8 + ["sea"] * 6 + ["the sea", "sea"]
        predict(learner, texts, make_config(score_batch_size=1, max_tokens=16))
        assert shapes == [(5, 3, False), (3, 3, False), (4, 4, True), (4, 3, False)]

    def test_what_fails_while_batches_are_made_is_raised(self, learner, monkeypatch):
        def refuse(self, tokens_B):
            raise RuntimeError("out of pinned memory")

        monkeypatch.setattr(type(learner), "pad", refuse)
        with pytest.raises(RuntimeError, match="out of pinned memory"):
            predict(learner, ["the sea"] * 20, make_config())


class TestMadeAhead:
    def test_order_and_number(self):
        made = []

        def items():
            for i in range(20):
                made.append(i)
                yield i

        used = []
        for item in made_ahead(items(), 3):
            used.append(item)
            assert len(made) <= len(used) + 3
        assert used == list(range(20))

    def test_are_made_while_those_before_are_used(self):
        """Each item waits until the one before is in use."""
        in_use = threading.Event()

        def items():
            yield 0
            assert in_use.wait(60)
            yield 1

        for item in made_ahead(items(), 1):
            if item == 0:
                in_use.set()
        assert item == 1

    def test_a_user_that_stops_ends_the_thread(self):
        before = threading.active_count()
        ahead = made_ahead(iter(range(1000)), 2)
        assert next(ahead) == 0
        ahead.close()
        assert threading.active_count() == before


class TestCheck:
    def test_good_checkpoints_pass(self, tiny_encoder, tiny_llm):
        check_student(make_config(tiny_encoder))
        check_student(make_config(tiny_llm))

    def test_missing_folder(self, tmp_path):
        nowhere = str(tmp_path / "nowhere")
        with pytest.raises(ConfigError) as caught:
            check_student(make_config(nowhere))
        assert str(caught.value).startswith(f"student.model: {nowhere!r} cannot be loaded (")
        assert "give a checkpoint folder with config.json, weights and tokenizer files" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_name_that_is_no_model(self):
        with pytest.raises(ConfigError, match=r"student\.model: 'no-such-model-anywhere' cannot be loaded"):
            check_student(make_config("no-such-model-anywhere"))

    def test_folder_without_a_config(self, tmp_path):
        with pytest.raises(ConfigError, match="cannot be loaded"):
            check_student(make_config(str(tmp_path)))

    def test_folder_without_a_tokenizer(self, tiny_encoder, tmp_path):
        # transformers makes an empty tokenizer for it, without a word.
        AutoConfig.from_pretrained(tiny_encoder).save_pretrained(tmp_path)
        with pytest.raises(
            ConfigError, match=r"has no tokenizer files .* save the tokenizer beside the weights"
        ):
            check_student(make_config(str(tmp_path)))

    def test_type_that_is_no_classifier(self, tiny_encoder, tmp_path):
        MambaConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path)
        with pytest.raises(ConfigError) as caught:
            check_student(make_config(str(tmp_path)))
        assert "is of type 'mamba', which transformers cannot make a sequence classifier of" in str(
            caught.value
        )
        assert "use an encoder such as roberta-base" in str(caught.value)
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tmp_path))

    def test_weights_are_not_loaded(self, tiny_encoder, tmp_path):
        AutoConfig.from_pretrained(tiny_encoder).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path)
        check_student(make_config(str(tmp_path)))

    def test_minilm_without_its_package(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(
            ConfigError, match=r"'minilm' needs the quickstart extra; install llkd-ray\[quickstart\]"
        ):
            resolve_model("minilm")
        assert resolve_model("some/folder") == "some/folder"
