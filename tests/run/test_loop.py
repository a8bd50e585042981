"""Where a run is, and what a finished one may be told when it is to go on."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from toys import make_config

from llkd_ray import resources
from llkd_ray.config.base import ConfigError
from llkd_ray.config.loading import dump_config
from llkd_ray.config.schema import Config
from llkd_ray.display import Display
from llkd_ray.run import loop
from llkd_ray.run.loop import run_config
from llkd_ray.storage.run_dir import (
    CONFIG,
    EPOCHS_DIR,
    EXAMPLES_INDEX,
    LABELS_DIR,
    SENT_DIR,
    SUMMARY,
    RunStore,
    ticket_file,
)


@pytest.fixture
def store(tmp_path, monkeypatch) -> RunStore:
    """A run of three rounds, all done."""
    store = RunStore(str(tmp_path / "run"))
    store.write_bytes(CONFIG, dump_config(make_config(budget={"rounds": 3, "train": 60})).encode())
    for k in range(3):
        store.append_metrics({"round": k})
    store.write_json(SUMMARY, {})
    store.write_bytes(ticket_file(LABELS_DIR, 0), b"")
    monkeypatch.setattr(loop, "distill", lambda config, uri, display: {"uri": uri})
    return store


def resumed(store: RunStore, *overrides: str) -> Config:
    return loop.resume(store.root, Display(), overrides).config


def test_a_finished_run_goes_on_with_more_and_its_rounds_come_first(store, tmp_path):
    config = resumed(store, "budget.rounds=5", "budget.train=100")
    assert (config.budget.rounds, config.budget.train) == (5, 100)
    assert resumed(store).budget.rounds == 3
    store.delete(SUMMARY)
    with pytest.raises(ConfigError, match="3 of 3 rounds are done; resume without it first"):
        resumed(store, "budget.rounds=5")
    with pytest.raises(ConfigError, match=r"RUN: .* has no config\.yaml; give the directory of a run"):
        loop.open_run(str(tmp_path), "RUN")


def test_a_run_whose_teacher_was_never_asked_takes_any_setting_and_its_name_is_free(store):
    store.delete(ticket_file(LABELS_DIR, 0))
    assert resumed(store, "student.epochs=9").student.epochs == 9
    config = run_config(store)
    named = config.model_copy(update={"run": config.run.model_copy(update={"name": "run"})})
    folder = store.root.rpartition("/")[0]
    named = named.model_copy(update={"run": named.run.model_copy(update={"dir": folder})})
    assert loop.start_run(named, Display()).run_dir == store.root
    store.write_bytes(ticket_file(SENT_DIR, 0), b"")
    with pytest.raises(ConfigError, match=r"run\.name: .* holds a run already"):
        loop.start_run(named, Display())


def test_what_an_attempt_with_other_settings_has_left_is_deleted(store):
    """A corpus that was read with other settings would otherwise be taken for this one's."""
    store.delete(ticket_file(LABELS_DIR, 0))
    store.write_bytes(EXAMPLES_INDEX, b"")
    store.write_bytes(f"{EPOCHS_DIR}/000001", b"a b")
    loop._write_config(store, run_config(store))
    assert store.exists(EXAMPLES_INDEX), "the same settings go on from it"
    loop._write_config(store, make_config(corpus={"text": "body"}))
    assert not store.exists(EXAMPLES_INDEX)
    assert store.exists(f"{EPOCHS_DIR}/000001"), "the lock stays"


def test_gpus_are_decided_for_this_start_only(tmp_path, monkeypatch):
    """A resume may be on a cluster with other ones."""
    config, seen, said = make_config(student={"workers": None}), [], []

    def stop(config: Config) -> None:
        seen.append(config.student.workers)
        raise ConfigError("stopped")

    monkeypatch.setattr(resources, "installed_version", {"torch": "2.13.0"}.get)
    monkeypatch.setattr(loop, "check", lambda config, say: {})
    monkeypatch.setattr(loop, "connect", lambda address: nullcontext())
    monkeypatch.setattr(loop, "live_nodes", lambda: [{"CPU": 8.0, "GPU": 3.0}])
    monkeypatch.setattr(loop, "check_fit", lambda config: seen.append(config.student.workers))
    monkeypatch.setattr(loop, "ingest", lambda config, store, say: stop(config))
    monkeypatch.setattr(Display, "say", lambda self, line: said.append(line))
    with pytest.raises(ConfigError, match="stopped"):
        loop.distill(config, str(tmp_path / "run"), Display())
    assert seen == [3, 3]
    assert "GPUs: 3; 1 teacher actor(s) take 0, 3 student rank(s) take 3" in said
    assert run_config(RunStore(str(tmp_path / "run"))) == config


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("student.epochs=9", "only budget.rounds and budget.train may be raised"),
        ("budget.labels=9", "only budget.rounds and budget.train may be raised"),
        ("budget.rounds=3", "budget.rounds: 3 rounds are asked for and 3 are done"),
        ("budget.train=100", "budget.rounds: 3 rounds are asked for and 3 are done"),
        ("budget.rounds=0", "budget.rounds: "),
    ],
)
def test_what_it_may_not_be_told_is_refused(store, override, says):
    with pytest.raises(ConfigError, match=says):
        resumed(store, override)
