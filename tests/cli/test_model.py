"""``llkd evaluate``: the figures of a model on labelled texts, and mistakes in them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from llkd_ray.cli.main import main
from llkd_ray.cli.model import evaluation
from llkd_ray.storage.checkpoints import inspect

CSV = "text,label\n"


def write(path, rows):
    path.write_text(CSV + "".join(f"{text},{label}\n" for text, label in rows), encoding="utf-8")
    return str(path)


def test_figures_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    gold_N, p_NC = rng.integers(0, 3, 200), rng.dirichlet([1, 1, 1], 200)
    found = evaluation(gold_N, p_NC)
    predicted_N = p_NC.argmax(axis=1)
    assert found["accuracy"] == pytest.approx(accuracy_score(gold_N, predicted_N))
    assert found["macro_f1"] == pytest.approx(f1_score(gold_N, predicted_N, average="macro"))
    for name in ("accuracy", "macro_f1"):
        low, high = found[f"{name}_interval"]
        assert low < found[name] < high


def test_all_right_has_an_exact_interval():
    gold_N = np.arange(100) % 2
    found = evaluation(gold_N, np.eye(2)[gold_N])
    assert found["accuracy_interval"] == pytest.approx((0.9638, 1.0), abs=1e-4)
    assert found["macro_f1_interval"] == found["accuracy_interval"]


def test_a_model_is_measured_and_labels_are_matched_whatever_their_case(tiny_classifier, tmp_path, capsys):
    first, second, third = inspect(tiny_classifier).labels
    rows = [(f"text {i}", label) for i in range(20) for label in (first, second.upper(), f" {third} ")]
    rows = [(f"{text} {n}", label) for n, (text, label) in enumerate(rows)]
    data, out = write(tmp_path / "gold.csv", [*rows, ("no label", "")]), tmp_path / "figures.json"
    assert main(["evaluate", tiny_classifier, data, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "60 texts with a label; refused: 1 missing_gold" in said
    assert "accuracy:" in said
    figures = json.loads(out.read_text())
    assert [one["gold"] for one in figures["per_class"]] == [20, 20, 20]
    assert figures["refused"] == {"missing_gold": 1}


def test_labels_that_the_model_does_not_have_are_named(tiny_classifier, tmp_path, capsys):
    data = write(tmp_path / "gold.csv", [("one", "Bilingg"), ("two", "Bilingg"), ("three", "x")])
    assert main(["evaluate", tiny_classifier, data]) == 2
    error = capsys.readouterr().err
    assert "3 of 3 values of column 'label' match no label: 'Bilingg' (2), 'x' (1)" in error
