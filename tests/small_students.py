"""Small students and their training data, for the tests in tests/student/."""

from __future__ import annotations

import numpy as np
import torch
from toys import NAMES, toy_probs, toy_texts

from llkd_ray.config.schema import LabelsConfig, StudentConfig
from llkd_ray.metrics.uncertainty import normalise
from llkd_ray.student.model import Student, build_student
from llkd_ray.student.train import Batch

LABELS = LabelsConfig(names=NAMES[:3])
CPU = torch.device("cpu")
UNEVEN = ["the sea", "a much longer text about an oven and a pan"]


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


def make_student(model: str, seed: int = 0, **fields) -> Student:
    return build_student(make_config(model, **fields), LABELS, seed, CPU)


def toy_batch(n: int, seed: int = 0) -> Batch:
    texts, gold_N = toy_texts(n, 3, seed)
    return Batch(texts, gold_N, np.ones(n), toy_teacher(gold_N, seed))


def toy_teacher(label_N: np.ndarray, seed: int = 0) -> np.ndarray:
    """A distribution for each text whose likeliest label is the given one."""
    return normalise(toy_probs(label_N, 3, 1.0, np.random.default_rng(seed)))


def weights(student: Student) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in student.module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)
