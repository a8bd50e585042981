"""What doctor says of corpus, test set, the place for runs and the runs in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toys import make_config, toy_texts, write_corpus

from llkd_ray.doctor.findings import Finding, carry_out
from llkd_ray.doctor.inputs import check_disk, check_runs, check_storage, data_checks, storage_checks
from llkd_ray.storage import lock
from llkd_ray.storage.lock import hold_lock
from llkd_ray.storage.run_dir import CONFIG, REPORT, RunStore

# --- what is read


def look(tmp_path: Path, **sections) -> dict[str, Finding]:
    settings = {
        "corpus": {"uri": str(write_corpus(tmp_path / "pool.parquet", 300, seed=1))},
        "test": {"uri": str(write_corpus(tmp_path / "test.parquet", 60, seed=2))},
    }
    for name, section in sections.items():
        settings[name] = section if section is None else {**settings[name], **section}
    return {one.check: one for one in carry_out(data_checks(make_config(**settings)))}


def write_rows(path: Path, labels: list[str | None]) -> str:
    texts, _ = toy_texts(len(labels), 3, seed=3)
    rows = {"id": [str(i) for i in range(len(labels))], "text": texts, "label": pa.array(labels, pa.string())}
    pq.write_table(pa.table(rows), path)
    return str(path)


def test_sources_that_are_sound(tmp_path):
    found = look(tmp_path)
    assert {name: one.state for name, one in found.items()} == {"corpus": "ok", "test": "ok"}
    assert "300 rows in 1 part(s)" in found["corpus"].found
    assert "gold is known of 200 of 200" in found["corpus"].found


def test_no_test_set_is_no_finding(tmp_path):
    assert list(look(tmp_path, test=None)) == ["corpus"]


def test_a_column_that_is_not_there(tmp_path):
    found = look(tmp_path, corpus={"text": "body"})
    assert found["corpus"].state == "problem"
    assert "corpus.text: there is no column 'body'" in found["corpus"].found
    assert "its columns are id, text, label" in found["corpus"].found
    assert found["test"].state == "ok"


def test_files_that_are_not_there(tmp_path):
    found = look(tmp_path, test={"uri": str(tmp_path / "gold-*.csv")})
    assert found["test"].state == "problem"
    assert "test.uri" in found["test"].found
    assert "matches no file" in found["test"].found


def test_gold_of_other_labels(tmp_path):
    uri = write_rows(tmp_path / "odd.parquet", ["sea", "mountain"] * 50)
    found = look(tmp_path, corpus={"uri": uri})["corpus"]
    assert found.state == "warning"
    assert "50 unknown_gold" in found.found
    assert "labels.names" in found.remedy


def test_gold_of_no_known_label(tmp_path):
    uri = write_rows(tmp_path / "odd.parquet", ["mountain"] * 50)
    assert look(tmp_path, corpus={"uri": uri})["corpus"].state == "problem"


def test_gold_that_is_empty(tmp_path):
    uri = write_rows(tmp_path / "odd.parquet", [None] * 50)
    found = look(tmp_path, corpus={"uri": uri})["corpus"]
    assert found.state == "warning"
    assert "gold is known of 0 of 50" in found.found


# --- what is written


def test_nothing_is_left_behind(tmp_path):
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert check_storage(str(tmp_path / "there")).state == "ok"
    assert check_storage(str(tmp_path / "new/deep/runs")).state == "ok"
    assert sorted(tmp_path.rglob("*")) == before


def test_what_was_there_stays(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/kept").write_text("mine")
    assert check_storage(str(tmp_path / "runs")).state == "ok"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["kept"]


def test_a_file_is_in_the_way(tmp_path):
    """No right to write, as root sees it, too."""
    (tmp_path / "file").write_text("")
    finding = check_storage(str(tmp_path / "file/runs"))
    assert finding.state == "problem"
    assert f"run.dir {str(tmp_path / 'file/runs')!r} cannot be used" in finding.found
    assert "Cannot delete" not in finding.found, "why it was not written is what matters"
    assert finding.remedy


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_right_to_write(tmp_path):
    tmp_path.chmod(0o555)
    try:
        assert check_storage(str(tmp_path / "runs")).state == "problem"
    finally:
        tmp_path.chmod(0o755)


def test_a_filesystem_that_nobody_knows():
    assert check_storage("nofs://bucket/runs").state == "problem"


def test_a_disk_that_is_too_small(tmp_path):
    """For a sparse file: it takes nothing, but a run's copies of it would."""
    pool = tmp_path / "pool.txt"
    with pool.open("wb") as file:
        file.truncate(shutil.disk_usage(tmp_path).free)
    run = {"dir": str(tmp_path / "not/there/yet")}
    large = make_config(corpus={"uri": str(pool), "gold": None, "id": None}, test=None, run=run)
    finding = check_disk(large)
    assert finding.state == "problem"
    assert "the corpus twice" in finding.found
    pool.write_text("small")
    assert check_disk(large).state != "problem"


def test_a_corpus_of_unknown_size_is_said_to_be_so(tmp_path):
    config = make_config(corpus={"uri": "hf://org/data"}, test=None, run={"dir": str(tmp_path)})
    assert "the size of the corpus is unknown" in check_disk(config).found


def test_an_object_store_does_not_tell_its_room():
    assert check_disk(make_config(run={"dir": "s3://bucket/runs"})) is None


# --- runs


def of_run(tmp_path: Path, name: str | None = "run"):
    return make_config(run={"dir": str(tmp_path), "name": name})


def begin(tmp_path: Path, name: str = "run", finished: bool = False) -> RunStore:
    store = RunStore(str(tmp_path / name))
    store.write_bytes(CONFIG, b"{}")
    if finished:
        store.write_bytes(REPORT, b"")
    return store


def test_a_name_that_is_free(tmp_path):
    assert check_runs(of_run(tmp_path)).state == "ok"


def test_a_name_that_is_taken(tmp_path):
    begin(tmp_path, finished=True)
    finding = check_runs(of_run(tmp_path))
    assert (finding.state, finding.remedy) == ("problem", "choose another run.name")


def test_a_run_that_can_be_gone_on_with(tmp_path):
    begin(tmp_path)
    finding = check_runs(of_run(tmp_path))
    assert finding.state == "problem"
    assert f"--resume {tmp_path / 'run'}" in finding.remedy


def test_a_driver_at_work(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(lock, "TAKEOVER_S", 5.0)
    store = begin(tmp_path)
    config = of_run(tmp_path)
    with hold_lock(store):
        (finding,) = [one for one in carry_out(storage_checks(config)) if one.check == "runs"]
    assert finding.state == "problem"
    assert "another driver is at work on this run" in finding.found
    assert "is not finished" in check_runs(config).found, "and once it has gone, only that is left to say"


def test_unfinished_runs_are_named(tmp_path):
    assert check_runs(of_run(tmp_path / "not/there", None)).found == "run.dir holds 0 run(s)"
    begin(tmp_path, "a", finished=True)
    (tmp_path / "teacher-cache").mkdir()
    assert check_runs(of_run(tmp_path, None)).found == "run.dir holds 1 run(s)"
    begin(tmp_path, "b")
    finding = check_runs(of_run(tmp_path, None))
    assert finding.state == "ok"
    assert "not finished: b" in finding.found
    assert f"--resume {tmp_path / 'b'}" in finding.found
