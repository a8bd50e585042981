"""A small comparison on a real Ray: what it leaves, that it goes on, and what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from llkd_ray.cli.main import main
from llkd_ray.comparison.settings import labelling_config, load_comparison, run_labelling, teacher_config
from llkd_ray.config.loading import parse_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("local_ray")]

REPORT = (
    "results.csv",
    "summary.csv",
    "per_class.csv",
    "report.md",
    "report.html",
    "learning_curve.png",
    "learning_curve.svg",
    "agreement_curve.png",
    "agreement_curve.svg",
)


@pytest.fixture
def settings_file(tmp_path: Path, toy_settings: dict) -> Path:
    """Two policies (one is *random*, which comes by itself), two seeds, two budgets, one recorded teacher."""
    student = {"epochs": 2, "min_steps": 30, "precision": "float32"}
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump(toy_settings | {"student": toy_settings["student"] | student})
    )
    file = tmp_path / "compare_toys.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "base": "base.yaml",
                "teachers": {"toy": {}},
                "lines": {"sure": {"selection": {"policy": "llkd"}}},
                "sizes": [0.05, 0.1],
                "seeds": [0, 1],
            }
        )
    )
    return file


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_a_comparison_from_settings_to_report_and_again(settings_file, tmp_path, capfd):
    out = tmp_path / "out"
    command = [str(settings_file), "--out", str(out)]

    # First one line only, as if the rest had been interrupted.
    assert main(["compare", *command, "--only", "random", "1"]) == 0
    assert "7 of 8 trials are missing" in (out / "report.html").read_text()
    files = {file: file.stat().st_mtime_ns for file in (out / "trials").glob("*.npz")}
    assert len(files) == 2

    assert main(["compare", *command]) == 0
    assert all(file.stat().st_mtime_ns == time for file, time in files.items()), "nothing is done twice"
    assert all((out / name).stat().st_size for name in REPORT)
    assert "missing" not in (out / "report.html").read_text()
    rows = rows_of(out / "results.csv")
    found = {(row["teacher"], row["line"], int(row["seed"]), int(row["size"])) for row in rows}
    assert found == {
        *((("", "gold", seed, 600)) for seed in (0, 1)),
        *((("toy", "all", seed, 600)) for seed in (0, 1)),
        *((("toy", line, seed, size)) for line in ("random", "sure") for seed in (0, 1) for size in (30, 60)),
    }
    facts = []
    for file in (out / "trials").glob("*.npz"):
        with np.load(file) as saved:
            facts.append(json.loads(str(saved["facts"])))
    assert sorted(float(row["macro_f1"]) for row in rows) == pytest.approx(
        sorted(one["macro_f1"] for one in facts)
    )
    by_seed = [float(row["macro_f1"]) for row in rows if (row["line"], row["size"]) == ("sure", "60")]
    (mean,) = [row for row in rows_of(out / "summary.csv") if (row["line"], row["size"]) == ("sure", "60")]
    assert float(mean["macro_f1"]) == pytest.approx(sum(by_seed) / 2)
    assert [row["line"] for row in rows if not row["agreement"]] == ["gold", "gold"]
    assert "the report" in capfd.readouterr().out, "it is written after the first seed already"

    # Once more: nothing is trained, and the report comes out the same.
    before = {file: file.stat().st_mtime_ns for file in (out / "trials").iterdir()}
    summary = (out / "summary.csv").read_bytes()
    (out / "summary.csv").unlink()
    assert main(["compare", *command]) == 0
    assert {file: file.stat().st_mtime_ns for file in (out / "trials").iterdir()} == before
    assert (out / "summary.csv").read_bytes() == summary
    assert "8 of 8 trials are finished already" in capfd.readouterr().out

    # What was measured elsewhere is not measured again.
    elsewhere = tmp_path / "elsewhere"
    command_there = [str(settings_file), "--out", str(elsewhere), "--add", str(out / "results.csv")]
    assert main(["compare", *command_there]) == 0
    assert "8 of 8 trials are finished already" in capfd.readouterr().out
    assert list((elsewhere / "trials").iterdir()) == []
    assert (elsewhere / "results.csv").read_bytes() == (out / "results.csv").read_bytes()

    # A larger budget goes on behind the smaller ones.
    wider = ["--set", "sizes=[0.05,0.1,0.15]"]
    assert main(["compare", *command, *wider, "--only", "sure", "0"]) == 0
    assert main(["compare", *command, *wider, "--report-only"]) == 0
    sizes = {row["size"] for row in rows_of(out / "results.csv") if row["line"] == "sure"}
    assert sizes == {"30", "60", "90"}


def test_a_failed_trial_stops_no_other(settings_file, tmp_path, capfd):
    tree = yaml.safe_load(settings_file.read_text())
    # With so large a learning rate the student diverges.
    tree["lines"]["broken"] = {"student": {"learning_rate": 1e30}}
    tree |= {"seeds": [0], "sizes": [0.05]}
    settings_file.write_text(yaml.safe_dump(tree))
    out = tmp_path / "out"
    assert main(["compare", str(settings_file), "--out", str(out), "--only", "broken", "random"]) == 1
    said = capfd.readouterr().out
    assert "failed: toy broken seed 0: FloatingPointError: the student" in said
    assert [row["line"] for row in rows_of(out / "results.csv")] == ["random"]


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--only", "nobody"], "--only: there is no 'nobody'"),
        (["--report-only"], "--report-only"),
        (["--set", "sizes=[0.5,0.1]"], "comparison: sizes"),
        (["--set", "sizes=[0.0001]"], "sizes"),
        (["--set", "lines.sure.selection.policy=luck"], "lines.sure: selection.policy: 'luck'"),
        (["--set", "lines.sure.student.start=warm"], "lines.sure: student.start"),
        (["--set", "teachers.toy.recorded.probs=nothing"], "teachers.toy: teacher.recorded.probs"),
        (["--out", "s3://bucket/x"], "--out"),
        (["--add", "nowhere.csv"], "--add: 'nowhere.csv' cannot be read: No such file"),
    ],
)
def test_a_mistake_takes_one_line(settings_file, tmp_path, capfd, extra, named):
    tree = yaml.safe_load(settings_file.read_text())
    tree["lines"]["sure"]["student"] = {}
    settings_file.write_text(yaml.safe_dump(tree))
    assert main(["compare", str(settings_file), "--out", str(tmp_path / "out"), *extra]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"error: {named}")
    assert said.count("\n") == 1


def test_a_folder_of_other_texts_is_refused(settings_file, tmp_path, toy_settings, capfd):
    out = tmp_path / "out"
    command = [str(settings_file), "--out", str(out)]
    assert main(["compare", *command, "--only", "random", "0", "--set", "sizes=[0.05]"]) == 0
    other = toy_settings | {"corpus": toy_settings["corpus"] | {"limit": 300}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(other))
    assert main(["compare", *command]) == 2
    assert "another corpus" in capfd.readouterr().err


def test_an_llm_labels_every_text_once(settings_file, tmp_path, toy_settings):
    """The labelling run itself; its answers come from a file here, from an engine in test_vllm.py."""
    from llkd_ray.comparison.settings import answers_of
    from llkd_ray.display import Display
    from llkd_ray.storage.run_dir import RunStore
    from llkd_ray.teacher.recorded import read_recorded

    base = parse_config(toy_settings | {"student": toy_settings["student"] | {"epochs": 1, "min_steps": 1}})
    config = teacher_config(base, load_comparison(settings_file).teachers["toy"])
    settings = labelling_config(config)
    assert settings.evaluation.holdout == 0
    store = RunStore(str(tmp_path / "out"))
    with Display() as display:
        run_labelling("toy", config, store, display)
        labels = Path(store.path("labelling/toy/labels"))
        before = {file: file.stat().st_mtime_ns for file in labels.iterdir()}
        run_labelling("toy", config, store, display)
    assert {file: file.stat().st_mtime_ns for file in labels.iterdir()} == before

    asked = config.model_copy(
        update={"teacher": config.teacher.model_copy(update={"kind": "vllm", "model": "m"})}
    )
    recorded = answers_of("toy", asked, store).teacher.recorded
    assert len(read_recorded(recorded, config.labels.names)) == 720, "600 of the pool, 120 of the test set"
