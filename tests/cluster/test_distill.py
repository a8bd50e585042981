"""A whole run on a real Ray: recorded answers, a tiny student, two DDP ranks."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from chaos import title_of
from toys import write_answers, write_corpus
from transformers import pipeline

from llkd_ray.config.base import ConfigError
from llkd_ray.config.loading import parse_config
from llkd_ray.config.schedule import Schedule
from llkd_ray.display import Display
from llkd_ray.run.loop import distill
from llkd_ray.storage.run_dir import RunStore
from llkd_ray.storage.tables import Examples, read_labels

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("local_ray")]


def run(settings: dict, folder: Path) -> dict:
    with Display() as display:
        return distill(parse_config(settings), str(folder), display)


@pytest.mark.slow
def test_a_run_from_corpus_to_model(toy_settings, tmp_path):
    settings = toy_settings | {"student": toy_settings["student"] | {"workers": 2, "cpus": 0.4}}
    run_dir = tmp_path / "run"
    summary = run(settings, run_dir)

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert set(lines[0]["seconds"]) == {"teach", "select", "train", "refresh", "evaluate", "idle"}
    assert summary["labelled"] == 500
    assert 0 < summary["trained"] <= 150
    assert summary["student"]["accuracy"] > 0.6, "three balanced classes with words of their own"
    assert summary["teacher"]["accuracy"] == pytest.approx(0.9, abs=0.1)
    assert summary["teacher_tokens"] == sum(
        sum(pq.read_table(file)["prompt_tokens"].to_pylist())
        for file in (run_dir / "labels").glob("*.parquet")
    )
    assert summary["texts_sent_but_not_answered"] == 0

    # Every row is trained on once at most, none of the hold-out, none of the test set.
    store = RunStore(str(run_dir))
    schedule = Schedule.plan(parse_config(settings), 600, 120)
    batches = [pq.read_table(file) for file in sorted(run_dir.glob("rounds/*/batch.parquet"))]
    trained = Counter(row for batch in batches for row in batch["row"].to_pylist())
    holdout = set(read_labels(store, schedule.holdout_tickets)["row"].to_pylist())
    assert len(holdout) == 40
    assert set(trained.values()) == {1}
    assert not holdout & set(trained)
    assert max(trained) < 600

    # What is selected carries its own text and its own pseudo-label.
    examples, labels = Examples.open(store), read_labels(store, range(schedule.n_tickets))
    said = dict(zip(labels["row"].to_pylist(), labels["probs"].to_pylist(), strict=True))
    for batch in batches:
        assert batch["text"].to_pylist() == examples.read(batch["row"].to_numpy())["text"].to_pylist()
        for row, label in zip(batch["row"].to_pylist(), batch["label"].to_pylist(), strict=True):
            assert label == int(np.argmax(said[row]))

    classify = pipeline("text-classification", model=str(run_dir / "model"))
    texts = examples.read(examples.test_rows[:20], ["text", "gold"])
    names = settings["labels"]["names"]
    right = sum(
        classify(text)[0]["label"] == names[gold]
        for text, gold in zip(texts["text"].to_pylist(), texts["gold"].to_pylist(), strict=True)
    )
    assert right >= 10
    # What is there to be looked at agrees with what was done.
    glances = [pq.read_table(file) for file in sorted(run_dir.glob("rounds/*/candidate_sample.parquet"))]
    for batch, candidate_sample in zip(batches, glances, strict=True):
        chosen = candidate_sample["row"].to_numpy()[candidate_sample["selected"].to_numpy()]
        assert set(chosen) == set(batch["row"].to_pylist())
    assert np.isnan(glances[0]["uncertainty"].to_numpy()).all()
    assert not np.isnan(glances[2]["uncertainty"].to_numpy()).any()
    assert [line["pace"][-1][1] for line in lines] == sorted(line["pace"][-1][1] for line in lines)
    assert lines[-1]["pace"][-1][1] <= summary["labelled"]
    insight = json.loads((run_dir / "insight.json").read_text())
    assert sum(n for *_, n in insight["confusion"]) == 120
    assert sum(insight["pool_gold"]) == 600
    page = (run_dir / "report.html").read_text()
    for title in ("What was selected", "The student’s mistakes", "Most useful", "Class balance"):
        assert title in page

    # A finished run that is resumed asks, selects and trains nothing again.
    before = {
        file: file.stat().st_mtime_ns
        for part in ("labels", "rounds")
        for file in (run_dir / part).rglob("*.*")
    }
    again = run(settings, run_dir)
    assert {key: again[key] for key in ("labelled", "trained")} == {
        key: summary[key] for key in ("labelled", "trained")
    }
    assert before == {file: file.stat().st_mtime_ns for file in before}


@pytest.mark.slow
def test_without_gold_only_agreement_is_known(toy_settings, tmp_path):
    settings = toy_settings | {
        "corpus": {"uri": toy_settings["corpus"]["uri"], "id": "id"},
        "test": None,
        "selection": {"policy": "random"},
        "budget": {"rounds": 2, "train": 60, "labels": 200},
    }
    summary = run(settings, tmp_path / "run")
    assert summary["teacher"] is None
    assert summary["student"]["accuracy"] is None
    assert 0 <= summary["student"]["teacher_agreement"] <= 1
    assert summary["trained"] == 60


@pytest.mark.slow
def test_a_run_whose_agreement_has_flattened_ends_early_and_whole(toy_settings, tmp_path):
    settings = toy_settings | {
        "budget": {"rounds": 6, "train": 150, "growth": 1.5, "patience": 1, "min_gain": 1.0}
    }
    run_dir = tmp_path / "run"
    summary = run(settings, run_dir)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1], "no gain is as large as the whole hold-out"
    assert summary["trained"] == lines[1]["trained"] < 150
    assert summary["student"]["accuracy"] == lines[1]["accuracy"]
    assert (run_dir / "model/config.json").exists()
    assert summary["labelled"] < 600, "the rounds that did not come asked for no labels"
    again = run(settings, run_dir)
    assert {key: again[key] for key in ("labelled", "trained")} == {
        key: summary[key] for key in ("labelled", "trained")
    }


@pytest.mark.slow
def test_the_student_decides_what_the_teacher_reads(toy_settings, tmp_path):
    settings = toy_settings | {
        "acquisition": {"policy": "entropy", "explore": 0.25},
        "selection": {"policy": "llkd_sample", "quota": 0.5, "options": {"trust": 2.0}},
        "budget": {"rounds": 3, "train": 90, "labels": 340},
        "evaluation": {"holdout": 34},
    }
    summary = run(settings, tmp_path / "run")
    assert (summary["labelled"], summary["trained"]) == (340, 90)
    leases = [pq.read_table(file) for file in sorted((tmp_path / "run").glob("leases/*.parquet"))]
    assert len(leases) == 3
    # What the last round reads was scored before: unread rows are among the scores of the round before.
    scored = set(pq.read_table(tmp_path / "run/rounds/0001/scores.parquet")["row"].to_pylist())
    assert set(leases[2]["row"].to_pylist()) <= scored


@pytest.mark.slow
def test_same_seed_same_rounds(toy_settings, tmp_path):
    settings = toy_settings | {"selection": {"policy": "random"}, "budget": {"rounds": 2, "train": 60}}
    batches = []
    for name in ("one", "two"):
        run(settings, tmp_path / name)
        batches.append(
            [
                pq.read_table(file)["row"].to_pylist()
                for file in sorted((tmp_path / name).glob("rounds/*/batch.parquet"))
            ]
        )
    assert batches[0] == batches[1]


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_refused_with_the_sum(toy_settings, tmp_path):
    settings = toy_settings | {"student": toy_settings["student"] | {"workers": 500}}
    with pytest.raises(ConfigError, match=r"500 student rank\(s\) need .* but the cluster has"):
        run(settings, tmp_path / "run")


@pytest.mark.slow
def test_an_answer_that_is_not_recorded_is_quarantined_and_counted(toy_settings, tmp_path):
    answers = pq.read_table(toy_settings["teacher"]["recorded"]["uri"])
    some = tmp_path / "some.parquet"
    pq.write_table(answers.filter([i % 10 != 0 for i in range(len(answers))]), some)
    teacher = toy_settings["teacher"] | {"recorded": {"uri": str(some)}}
    settings = toy_settings | {"teacher": teacher, "budget": {"rounds": 1, "train": 50}}
    summary = run(settings, tmp_path / "run")
    missing = [pq.read_table(file) for file in (tmp_path / "run/quarantine").glob("teacher-*.parquet")]
    assert {reason for table in missing for reason in table["reason"].to_pylist()} == {"no_recorded_answer"}
    assert sum(len(table) for table in missing) == 72
    assert summary["labelled"] == 600 - sum(
        row < 600 for table in missing for row in table["position"].to_pylist()
    )


@pytest.mark.slow
def test_answers_to_other_texts_end_the_run_with_the_remedy(toy_settings, tmp_path):
    other = write_corpus(tmp_path / "other.parquet", 50, seed=9)
    answers = write_answers(tmp_path / "other-answers.parquet", [other])
    settings = toy_settings | {"teacher": toy_settings["teacher"] | {"recorded": {"uri": str(answers)}}}
    with pytest.raises(ConfigError, match=r"round 0 has nothing to train on: 0 texts .* corpus\.id"):
        run(settings, tmp_path / "run")


def ranks() -> list[psutil.Process]:
    """Student ranks that this process's Ray runs."""
    return [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in title_of(p)]


@pytest.mark.slow
def test_a_killed_rank_costs_no_round(toy_settings, tmp_path):
    settings = toy_settings | {"student": toy_settings["student"] | {"workers": (1, 2), "cpus": 0.4}}
    run_dir, killed = tmp_path / "run", []

    def kill_a_rank_after_the_first_round() -> None:
        while not (run_dir / "rounds/0000/trained.json").exists():
            time.sleep(0.01)
        rank = ranks()[0]
        rank.kill()
        killed.append(rank.pid)

    while ranks():  # of a run before, which ended with an error
        time.sleep(0.1)
    threading.Thread(target=kill_a_rank_after_the_first_round, daemon=True).start()
    summary = run(settings, run_dir)
    assert len(killed) == 1
    assert 50 < summary["trained"] <= 150
    batches = [
        pq.read_table(file)["row"].to_pylist() for file in sorted(run_dir.glob("rounds/*/batch.parquet"))
    ]
    assert len(batches) == 3
    assert max(Counter(row for batch in batches for row in batch).values()) == 1
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 3
