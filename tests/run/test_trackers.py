"""Trackers get the figures of a run, and none can stop one. All three are the real ones."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock, call

import pytest
from toys import make_config

from llkd_ray.config.base import ConfigError
from llkd_ray.run import trackers as trackers_module
from llkd_ray.run.trackers import IDS, PROJECT, TENSORBOARD_DIR, Trackers, check_trackers, flat, numbers_of
from llkd_ray.storage.run_dir import RunStore

LINE = {
    "round": 1,
    "labelled": 400,
    "accuracy": 0.75,
    "macro_f1": None,
    "seconds": {"train": 12.5, "idle": 0.5},
    "staleness": {"mean_age": None, "never_scored": 3},
    "pace": [[0.0, 300], [2.5, 400]],
}
SUMMARY = {
    "student": {"accuracy": 0.8, "accuracy_interval": [0.7, 0.9], "teacher_agreement": None},
    "teacher": None,
    "seconds": 61.0,
    "usage": {"teacher": {"cost": 0.25}},
}


@pytest.fixture
def run_of(tmp_path: Path):
    def make(*names: str) -> tuple[Trackers, RunStore, list[str]]:
        said: list[str] = []
        store = RunStore(str(tmp_path / "runs" / "my-run"))
        config = make_config(run={"trackers": names, "dir": str(tmp_path / "runs")})
        return Trackers(config, store, said.append), store, said

    return make


def stopped_and_resumed(trackers: Trackers) -> None:
    """Two rounds, of which a driver is stopped after the first, and the end."""
    with suppress(KeyboardInterrupt), trackers:
        trackers.log_round(LINE | {"round": 0, "accuracy": 0.5})
        raise KeyboardInterrupt
    with trackers:
        trackers.log_round(LINE)
        trackers.log_summary(SUMMARY, 1)


def test_figures_are_numbers_and_settings_flat_short_and_safely_named():
    parts = {"seconds/train": 12.5, "seconds/idle": 0.5, "staleness/never_scored": 3.0}
    assert numbers_of(LINE) == {"labelled": 400.0, "accuracy": 0.75} | parts
    tree = {"a": {"b": {"c": 1}, "odd=name:": "x" * 1000}, "none": None, "empty": {}}
    assert dict(flat(tree)) == {"a.b.c": "1", "a.odd_name_": "x" * 250, "empty": "{}"}


def test_without_trackers_nothing_is_done(run_of):
    trackers, store, said = run_of()
    stopped_and_resumed(trackers)
    assert (said, store.exists(IDS)) == ([], False)


def test_what_cannot_be_tracked_is_refused_before_anything_starts(monkeypatch):
    check_trackers(make_config())
    monkeypatch.setitem(trackers_module.PACKAGES, "wandb", "no_such_package_here")
    with pytest.raises(ConfigError, match=r"'wandb' needs the package .*pip install wandb"):
        check_trackers(make_config(run={"trackers": ["wandb"]}))
    with pytest.raises(ConfigError, match=r"must be local for it; run\.dir is 's3://bucket/runs'"):
        check_trackers(make_config(run={"trackers": ["tensorboard"], "dir": "s3://bucket/runs"}))


def test_one_that_breaks_or_does_not_start_is_left_out_and_alone(run_of, monkeypatch):
    broken = Mock()
    broken.log.side_effect = ConnectionError("the server\nis gone")
    monkeypatch.setattr(trackers_module, "Mlflow", lambda *arguments: broken)
    monkeypatch.setattr(trackers_module, "Wandb", Mock(side_effect=RuntimeError))
    trackers, store, said = run_of("mlflow", "wandb")
    with trackers:
        trackers.log_round(LINE)
        trackers.log_round(LINE)
    assert (broken.log.call_count, broken.close.call_count) == (1, 0)
    assert [line.partition(" ")[0] for line in said] == ["wandb", "mlflow"]
    assert said[1].endswith("the server is gone")
    assert not store.exists(IDS)


def test_a_run_that_breaks_is_told_so(run_of, monkeypatch):
    calm = Mock()
    monkeypatch.setattr(trackers_module, "Mlflow", lambda *arguments: calm)
    trackers, *_ = run_of("mlflow")
    stopped_and_resumed(trackers)
    assert calm.close.call_args_list == [call(False), call(True)]


def test_tensorboard_gets_a_file_in_the_run_directory(run_of):
    pytest.importorskip("tensorboardX")
    trackers, store, said = run_of("tensorboard")
    stopped_and_resumed(trackers)
    content = b"".join(store.read_bytes(f"{TENSORBOARD_DIR}/{one}") for one in store.names(TENSORBOARD_DIR))
    assert all(name in content for name in (b"seconds/train", b"final/student/accuracy"))
    assert not said


def test_wandb_keeps_figures_offline_and_goes_on_after_a_resume(run_of, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    trackers, store, said = run_of("wandb")
    stopped_and_resumed(trackers)
    assert not said
    parts = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert {part.stem for part in parts} == {f"run-{store.read_json(IDS)['wandb']}"}, "the same run goes on"
    # Its service may still be writing when it says that a run is finished.
    while b"final/student/accuracy" not in parts[1].read_bytes():  # pytest's limit ends it
        time.sleep(0.05)
    first, second = (part.read_bytes() for part in parts)
    for name in (b"my-run", b"student.model", b"seconds/train"):
        assert name in first
        assert name in second
    assert b"final/student/accuracy" not in first


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", ["sqlite", "file"])
def test_mlflow_keeps_settings_and_figures_and_goes_on_after_a_resume(run_of, tmp_path, monkeypatch, scheme):
    mlflow = pytest.importorskip("mlflow", reason="pip install mlflow-skinny")
    if scheme == "sqlite":
        pytest.importorskip("sqlalchemy", reason="mlflow-skinny has a file store only")
    place = f"{tmp_path}/mlruns" if scheme == "file" else f"{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}:///{place.lstrip('/')}")
    mlflow.set_tracking_uri(None)
    trackers, store, said = run_of("mlflow")
    stopped_and_resumed(trackers)
    assert not said
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(PROJECT)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == store.read_json(IDS)["mlflow"]
    assert (run.info.run_name, run.info.status) == ("my-run", "FINISHED")
    assert run.data.params["student.model"] == "student"
    assert (run.data.metrics["final/student/accuracy"], run.data.metrics["final/cost"]) == (0.8, 0.25)
    steps = sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, "accuracy"))
    assert steps == [(0, 0.5), (1, 0.75)]
