"""A student's temperature: by which gold, measured on what, and where predictions find it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from toys import NAMES, make_config, make_run, put_label_file, toy_probs
from transformers import pipeline

from llkd_ray.config.schedule import Schedule
from llkd_ray.evaluation.student_calibration import audited_sample, describe, fit_student, write_model
from llkd_ray.metrics.calibration import cross_fitted, fit_temperature
from llkd_ray.metrics.uncertainty import confidence, normalise
from llkd_ray.selection.tickets import draw_holdout
from llkd_ray.storage import tables
from llkd_ray.storage.checkpoints import CALIBRATION_KEY, inspect
from llkd_ray.storage.run_dir import (
    ASKED,
    BATCH,
    EXAMPLES_INDEX,
    MODEL_DIR,
    TRAINED,
    predictions_file,
    round_file,
)
from llkd_ray.storage.tables import AuditAnswers, Examples, list_column
from llkd_ray.student.inference import load, score

N_POOL, N_TEST, HOLDOUT = 1000, 300, 100


def student_says(gold_N: np.ndarray, sharpness: float, rng: np.random.Generator) -> np.ndarray:
    """Probabilities that fit gold at temperature 1, sharpened: the student is over-confident."""
    p_NC = normalise(np.exp(rng.normal(0, 1.2, (gold_N.size, 3))))
    # Swap columns so that gold is drawn from the probabilities.
    drawn_N = (p_NC.cumsum(axis=1) < rng.random((gold_N.size, 1))).sum(axis=1)
    for i, (gold, drawn) in enumerate(zip(gold_N, drawn_N, strict=True)):
        p_NC[i, [gold, drawn]] = p_NC[i, [drawn, gold]]
    return normalise(p_NC**sharpness)


@pytest.fixture
def run(tmp_path):
    """A run after one round, with gold everywhere, and a student that is three times too sure."""
    store = make_run(tmp_path / "run", N_POOL, N_TEST)
    config = make_config(evaluation={"holdout": HOLDOUT}, budget={"rounds": 1, "train": 100})
    examples = Examples.open(store)
    schedule = Schedule.plan(config, N_POOL, N_TEST)
    holdout = draw_holdout(config, examples, schedule)
    rng = np.random.default_rng(0)
    row_N = np.concatenate([examples.test_rows, holdout])
    gold_N = examples.read(row_N, ["gold"])["gold"].to_numpy()
    columns = [pa.array(row_N), list_column(student_says(gold_N, 3.0, rng))]
    store.write_json(round_file(0, TRAINED), {"ranks": 1})
    store.write_table(predictions_file(0, 0, 1), pa.Table.from_arrays(columns, schema=tables.PREDICTIONS))
    for ticket, rows in zip(
        schedule.holdout_tickets, np.array_split(holdout, len(schedule.holdout_tickets)), strict=True
    ):
        gold_M = examples.read(rows, ["gold"])["gold"].to_numpy()
        put_label_file(store, ticket, rows, toy_probs(gold_M, 3, 0.8, rng))
    return store, config


def without_gold(store, *parts: str) -> None:
    index = store.read_json(EXAMPLES_INDEX)
    for part in parts:
        for shard in index[part]:
            table = store.read_table(shard["file"])
            gold = pa.array(np.full(len(table), -1, dtype=np.int16))
            store.write_table(shard["file"], table.set_column(2, tables.EXAMPLES.field("gold"), gold), 16)


def test_the_holdouts_gold_decides_and_the_test_set_judges(run):
    found = fit_student(*run, 0)
    assert found["temperature"] == pytest.approx(3.0, rel=0.4)
    assert (found["texts"], found["measured_texts"]) == (HOLDOUT, N_TEST)
    assert found["measured_on"] == "gold of the test set"
    assert found["ece_before"] > 0.15
    assert found["ece_after"] < 0.5 * found["ece_before"]
    assert f"{found['ece_before']:.3f} before, {found['ece_after']:.3f} after" in describe(found)


def test_with_a_test_set_alone_no_text_judges_itself(run):
    store, config = run
    without_gold(store, "pool")
    found = fit_student(store, config, 0)
    assert found["texts"] == found["measured_texts"] == N_TEST
    assert found["fitted_on"] == "gold of the test set"
    assert "in folds of which none was fitted on itself" in found["measured_on"]
    assert found["ece_after"] < found["ece_before"]


def test_without_gold_it_is_agreement_and_says_so(run):
    store, config = run
    without_gold(store, "pool", "test")
    found = fit_student(store, config, 0)
    assert found["texts"] == HOLDOUT
    assert "it is agreement, not accuracy" in found["fitted_on"]


def test_people_count_by_the_random_sample_that_was_not_trained_on(run):
    store, config = run
    without_gold(store, "pool", "test")
    rows = np.arange(60)
    gold_N = np.random.default_rng(5).integers(0, 3, 60)
    asked = {
        "row": rows, "id": [f"toy-{row}" for row in rows], "why": ["random"] * 60, "is_random": rows < 50,
        "teacher": gold_N, "teacher_confidence": np.ones(60), "student": gold_N,
        "student_confidence": np.ones(60),
    }  # fmt: skip
    store.write_table(ASKED, pa.table(asked, schema=tables.AUDIT_ASKED))
    AuditAnswers.of(dict(zip(rows.tolist(), gold_N.tolist(), strict=True))).write(store)
    batch = {
        "row": [0, 1],
        "text": ["", ""],
        "label": [0, 0],
        "probs": [[1.0, 0, 0]] * 2,
        "weight": [1.0, 1.0],
    }
    store.write_table(round_file(0, BATCH), pa.table(batch, schema=tables.ROUND))
    sample = audited_sample(store)
    np.testing.assert_array_equal(sample, np.arange(2, 50))
    p_MC = student_says(gold_N[sample], 2.0, np.random.default_rng(6))
    found = fit_student(store, config, 0, (sample, p_MC))
    assert "labelled by people" in found["fitted_on"]
    assert found["texts"] == sample.size


def test_too_few_texts_and_no_mistakes_leave_confidence_alone(run):
    store, config = run
    found = fit_student(store, make_config(evaluation={"holdout": 0}, budget={"rounds": 1, "train": 100}), 0)
    assert found["temperature"] is not None, "the test set is there"
    row_N = Examples.open(store).test_rows
    gold_N = Examples.open(store).read(row_N, ["gold"])["gold"].to_numpy()
    columns = [pa.array(row_N), list_column(np.eye(3)[gold_N] * 0.9 + 0.1 / 3)]
    store.write_table(predictions_file(0, 0, 1), pa.Table.from_arrays(columns, schema=tables.PREDICTIONS))
    found = fit_student(store, config, 0)
    assert found["temperature"] is None
    assert "are right" in describe(found)
    without_gold(store, "test", "pool")
    assert "fewer than 20 texts" in fit_student(store, config, 0)["reason"]


def test_folds_judge_by_what_the_others_ask_for():
    rng = np.random.default_rng(0)
    gold_N = rng.integers(0, 3, 400)
    p_NC = student_says(gold_N, 3.0, rng)
    warm_NC = cross_fitted(p_NC, gold_N, np.random.default_rng(1))
    np.testing.assert_array_equal(warm_NC.argmax(axis=1), p_NC.argmax(axis=1))
    assert fit_temperature(warm_NC, gold_N) == pytest.approx(1.0, abs=0.15)


@pytest.fixture
def calibrated(tiny_classifier, tmp_path):
    def make(temperature):
        store = make_run(tmp_path / "run", 10)
        shutil.copytree(tiny_classifier, tmp_path / "run/checkpoints/round-0000", dirs_exist_ok=True)
        write_model(store, "checkpoints/round-0000", {"temperature": temperature, "texts": 9})
        return str(tmp_path / "run" / MODEL_DIR)

    return make


TEXTS = [f"{word} at the {name}" for word in "abcdefgh" for name in NAMES]


def answers(folder):
    checkpoint = inspect(folder)
    return score(load(checkpoint, "float32", torch.device("cpu")), TEXTS, checkpoint.max_tokens)


def test_every_program_that_loads_the_weights_has_the_confidence(calibrated, tiny_classifier):
    raw_NC, folder = answers(tiny_classifier), calibrated(2.5)
    warm_NC = answers(folder)
    np.testing.assert_array_equal(raw_NC.argmax(axis=1), warm_NC.argmax(axis=1))
    np.testing.assert_allclose(warm_NC, normalise(raw_NC.astype(float) ** (1 / 2.5)), atol=1e-5)
    assert (confidence(warm_NC) < confidence(raw_NC)).all()
    said = pipeline("text-classification", model=folder, device="cpu")(TEXTS)
    np.testing.assert_allclose([one["score"] for one in said], confidence(warm_NC), atol=1e-5)
    assert inspect(tiny_classifier).fingerprint != inspect(folder).fingerprint


def test_it_is_fitted_again_from_the_weights_as_they_were_trained(calibrated):
    first = answers(calibrated(2.5))
    calibrated(4.0)
    np.testing.assert_allclose(answers(calibrated(2.5)), first, atol=1e-6)


def test_none_is_written_too(calibrated, tiny_classifier):
    folder = calibrated(None)
    np.testing.assert_array_equal(answers(folder), answers(tiny_classifier))
    with open(f"{folder}/config.json") as file:
        assert json.load(file)[CALIBRATION_KEY] == {"temperature": None, "texts": 9}
