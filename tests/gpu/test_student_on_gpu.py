"""The student on a GPU answers and learns as it does on the CPU. Needs a GPU, and neither Ray nor vLLM."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import NAMES, toy_texts

from llkd_ray.config.schema import LabelsConfig, StudentConfig
from llkd_ray.student.inference import predict
from llkd_ray.student.model import Student, build_student
from llkd_ray.student.train import Batch, train_round

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LABELS = LabelsConfig(names=NAMES[:3])


def make_config(model: str, **fields) -> StudentConfig:
    given = {"model": model, "batch_size": 16, "max_tokens": 32, "learning_rate": 1e-2, "min_steps": 1}
    return StudentConfig.model_validate(given | {"precision": "float32"} | fields)


def on(device: str, config: StudentConfig) -> Student:
    return build_student(config, LABELS, 0, torch.device(device))


def toy_batch(n: int, seed: int = 0) -> Batch:
    texts, gold_N = toy_texts(n, 3, seed)
    return Batch(texts, gold_N, np.ones(n), np.eye(3)[gold_N])


@pytest.mark.parametrize(("precision", "within"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_answers_are_the_cpus(tiny_encoder, monkeypatch, precision, within):
    """Several chunks, batches with and without padding, texts that are cut and one without words."""
    monkeypatch.setattr("llkd_ray.student.inference.CHUNK", 100)
    texts, _ = toy_texts(500, 3, seed=2)
    texts[4], texts[9] = "sea " * 100, ""
    expected = predict(on("cpu", make_config(tiny_encoder)), texts, make_config(tiny_encoder))
    config = make_config(tiny_encoder, precision=precision, score_batch_size=7)
    p_NC = predict(on("cuda", config), texts, config)
    assert np.abs(p_NC - expected).max() < within
    assert np.ptp(expected[:, 0]) > 0.001, "the texts get different answers"


def test_a_round_is_the_cpus(tiny_encoder):
    """Without dropout, whose random numbers differ. Answers are compared: AdamW makes full steps out of the
    rounding noise that is the gradient of weights which do not matter."""
    config = make_config(tiny_encoder, epochs=1, batch_size=8, learning_rate=1e-3)
    batch, unseen = toy_batch(64), toy_batch(50, seed=1).texts
    before = predict(on("cpu", config), unseen, config)
    facts, answers = [], []
    for device in ("cpu", "cuda"):
        learner = on(device, config)
        for part in learner.model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        facts.append(train_round(learner, batch, config))
        answers.append(predict(learner, unseen, config))
    assert facts[0]["loss"] == pytest.approx(facts[1]["loss"], rel=1e-4)
    assert np.abs(answers[0] - before).max() > 0.05
    assert answers[1] == pytest.approx(answers[0], abs=0.005)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_learns(tiny_encoder, precision):
    config = make_config(tiny_encoder, epochs=8, precision=precision)
    learner, unseen = on("cuda", config), toy_batch(150, seed=1)
    train_round(learner, toy_batch(240), config)
    assert (predict(learner, unseen.texts, config).argmax(axis=1) == unseen.label_N).mean() > 0.85
