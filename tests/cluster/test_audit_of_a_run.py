"""An audit from the run to the file, from the file to the run, and into the rounds that follow."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import llkd_ray
from llkd_ray.cli.main import main
from llkd_ray.config.base import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("local_ray")]


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return list(csv.DictReader(lines))


def fill(file: Path, rows: list[dict[str, str]], labels: list[str]) -> None:
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(row | {"label": label} for row, label in zip(rows, labels, strict=True))


def test_an_audit_reaches_the_card_and_the_next_rounds(toy_settings, tmp_path, capfd):
    run = llkd_ray.distill(toy_settings, {"budget.rounds": 2, "budget.train": 80, "student.epochs": 8})
    file = tmp_path / "rows.csv"
    flags = ["--random", "100", "--disagree", "15", "--unsure", "10"]
    assert main(["audit", "export", run.run_dir, "--out", str(file), *flags]) == 0
    rows = rows_of(file)
    assert sum(row["why"] == "random" for row in rows) == 100
    assert {row["why"] for row in rows} == {"random", "disagree", "unsure"}
    assert all(row["teacher"] != row["student"] for row in rows if row["why"] == "disagree")

    def refused(*arguments: str) -> str:
        assert main(["audit", *arguments]) == 2
        (line,) = [one for one in capfd.readouterr().err.splitlines() if one.startswith("error: ")]
        return line

    assert "exists and may hold answers" in refused("export", run.run_dir, "--out", str(file))
    pool = pq.read_table(tmp_path / "pool.parquet")
    gold = dict(zip(pool["id"].to_pylist(), pool["label"].to_pylist(), strict=True))
    right = [gold[row["id"]] for row in rows]

    fill(file, rows, ["music", *right[1:]])
    assert f"line 2: 'music' is no label: take {', '.join(run.config.labels.names)}" in refused(
        "import", run.run_dir, str(file)
    )
    assert not (Path(run.run_dir) / "audit/answers.parquet").exists(), "all or nothing"
    fill(file, rows, right)
    capfd.readouterr()
    assert main(["audit", "import", run.run_dir, str(file)]) == 0
    said = capfd.readouterr().out
    assert f"{len(rows)} new answers, 0 changed, 0 known" in said
    sample = [row for row in rows if row["why"] == "random"]
    correct = sum(row["teacher"] == gold[row["id"]] for row in sample)
    assert f"pseudo-labels: {correct} of 100 right" in said
    for told in (Path(run.model, "README.md"), Path(run.run_dir, "report.html")):
        assert "Of a random sample of 100, which represents 500" in told.read_text()

    assert main(["audit", "import", run.run_dir, str(file)]) == 0
    assert f"0 new answers, 0 changed, {len(rows)} known" in capfd.readouterr().out
    other = [
        label if i else next(x for x in run.config.labels.names if x != label)
        for i, label in enumerate(right)
    ]
    fill(file, rows, other)
    assert "was " in refused("import", run.run_dir, str(file))

    # The temperature is fitted anew, by people's labels too, and the model and the run agree on it.
    assert main(["export", run.run_dir]) == 0
    assert "the student's confidence: temperature" in capfd.readouterr().out
    found = json.loads(Path(run.model, "config.json").read_text())["llkd_calibration"]
    assert "labelled by people" in found["fitted_on"]
    assert found["measured_texts"] == 120
    assert json.loads(Path(run.run_dir, "summary.json").read_text())["calibration"] == found
    assert found != run.summary["calibration"]
    assert f"{found['texts']} texts (gold of pool texts" in Path(run.model, "README.md").read_text()

    # What is answered is not asked again; a larger sample goes on.
    more = tmp_path / "more.json"
    assert (
        main(["audit", "export", run.run_dir, "--out", str(more), "--random", "110", "--disagree", "0"]) == 0
    )
    tasks = json.loads(more.read_text())
    assert not {task["data"]["row"] for task in tasks} & {int(row["row"]) for row in rows}
    assert (tmp_path / "more.json.xml").read_text().count("<Choice ") == 3

    # A finished run goes on, and people's labels are what is trained on.
    with pytest.raises(ConfigError, match=r"only budget\.rounds and budget\.train"):
        llkd_ray.resume(run.run_dir, {"student.epochs": 2})
    again = llkd_ray.resume(run.run_dir, {"budget.rounds": 3, "budget.train": 160})
    assert [line["round"] for line in again.metrics] == [0, 1, 2]
    folder = Path(run.run_dir)
    assert not (folder / "rounds/0001/audited.parquet").exists()
    answers = pq.read_table(folder / "rounds/0002/audited.parquet")
    assert len(answers) == len(rows)
    label_of = dict(zip(answers["row"].to_pylist(), answers["label"].to_pylist(), strict=True))
    batch = pq.read_table(folder / "rounds/0002/batch.parquet")
    known = [
        (label, label_of[row])
        for row, label in zip(batch["row"].to_pylist(), batch["label"].to_pylist(), strict=True)
        if row in label_of
    ]
    assert known
    assert all(label == said for label, said in known)
