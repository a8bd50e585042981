"""Teachers that are of no use are noticed from their first labels, and others are not."""

from __future__ import annotations

import numpy as np
import pytest

from llkd_ray.evaluation.teacher_check import warnings_about

NAMES = ("yes", "no", "maybe")
N = 240


def answers(label_N: np.ndarray, mass: float = 0.9) -> np.ndarray:
    p_NC = np.full((N, 3), (1 - mass) / 3)
    p_NC[np.arange(N), label_N] += mass
    return p_NC


@pytest.fixture
def gold_N() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, N)


def found(p_NC: np.ndarray, gold_N: np.ndarray, off_label: float = 0.0) -> list[str]:
    texts = [f"text {i}" for i in range(N)]
    return warnings_about(p_NC, np.full(N, off_label), gold_N, texts, NAMES)


def test_a_good_teacher_is_not_warned_about(gold_N):
    mistaken_N = np.where(np.arange(N) % 5 == 0, (gold_N + 1) % 3, gold_N)
    assert found(answers(mistaken_N), gold_N, off_label=0.1) == []


def test_answers_that_are_no_label(gold_N):
    (line,) = found(answers(gold_N), gold_N, off_label=0.5)
    assert "50.0\u202f%" in line
    assert "teacher.prompt" in line
    assert "'text 0'" in line


def test_texts_without_any_label_count_too(gold_N):
    texts = [f"text {i}" for i in range(N)]
    silent = ["Tell me about it"] * 80
    (line,) = warnings_about(answers(gold_N), np.zeros(N), gold_N, texts, NAMES, silent)
    assert "25.0\u202f% of 320 texts" in line
    assert "'Tell me about it'" in line
    nothing = np.empty(0)
    (line,) = warnings_about(np.empty((0, 3)), nothing, nothing, [], NAMES, silent)
    assert "100.0\u202f% of 80 texts" in line
    assert warnings_about(answers(gold_N), np.zeros(N), gold_N, texts, NAMES, silent[:50]) == []


def test_one_answer_to_everything(gold_N):
    lines = found(answers(np.ones(N, dtype=int)), np.full(N, -1))
    assert len(lines) == 1
    assert "'no' for 100.0\u202f%" in lines[0]


@pytest.mark.parametrize(("known", "warned"), [(N, True), (60, True), (40, False)])
def test_no_better_than_the_most_frequent_class_where_enough_gold_is_known(gold_N, known, warned):
    gold_N = np.where(np.arange(N) < known, gold_N, -1)
    lines = found(answers((gold_N + 1) % 3), gold_N)
    assert bool(lines) == warned
    assert all("the most frequent class" in line for line in lines)
