"""Files are whole or not there, and an address is found again by another store."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import (
    LABELS_DIR,
    RunStore,
    join_uri,
    open_filesystem,
    predictions_file,
    round_file,
    ticket_file,
    ticket_of,
)

OPTIONS = "?endpoint_override=127.0.0.1:9000&scheme=http&region=us-east-1"


@pytest.fixture
def store(tmp_path):
    return RunStore(str(tmp_path / "run"))


class DyingStream:
    """Takes half of what it is given, then breaks."""

    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def write(self, content):
        self.stream.write(content[: len(content) // 2])
        raise OSError("disk full")


class DyingFileSystem:
    """Breaks as it writes or as it moves what is written."""

    def __init__(self, fs, step):
        self.fs, self.step = fs, step

    def open_output_stream(self, path, **options):
        stream = self.fs.open_output_stream(path, **options)
        return DyingStream(stream) if self.step == "write" else stream

    def move(self, source, target):
        raise OSError("cannot move")

    def __getattr__(self, name):
        return getattr(self.fs, name)


class MovingFileSystem:
    """A filesystem with another ``move``."""

    def __init__(self, fs, move):
        self.fs, self.move = fs, move

    def __getattr__(self, name):
        return getattr(self.fs, name)


class TestWriting:
    def test_what_is_written_is_read(self, store, tmp_path):
        store.write_bytes("a/b/c.bin", b"\x00abc")
        assert store.read_bytes("a/b/c.bin") == b"\x00abc"
        store.write_bytes("a/b/c.bin", b"second")
        assert store.read_bytes("a/b/c.bin") == b"second"
        assert [path.name for path in (tmp_path / "run" / "a/b").iterdir()] == ["c.bin"], (
            "nothing else is left"
        )
        store.write_bytes("x.gz", b"plain")  # the name packs and unpacks nothing
        assert store.read_bytes("x.gz") == b"plain"
        store.write_json("x.json", {"name": "é", "list": [1, None]})
        assert store.read_json("x.json") == {"name": "é", "list": [1, None]}

    @pytest.mark.parametrize("has_links", [True, False])
    def test_without_replacing_the_first_of_two_writers_wins(self, store, monkeypatch, tmp_path, has_links):
        def no_links(*_: object) -> None:
            raise PermissionError("no hard links")

        if not has_links:
            monkeypatch.setattr(os, "link", no_links)
        table = tables.LABELS.empty_table()
        with store.writing("labels/t.parquet", replace=False) as slow:
            store.write_table("labels/u.parquet", table, replace=False)
            slow.write(b"the first")
        with pytest.raises(FileExistsError), store.writing("labels/t.parquet", replace=False) as late:
            late.write(b"the second")
        assert store.read_bytes("labels/t.parquet") == b"the first"
        assert sorted(path.name for path in (tmp_path / "run/labels").iterdir()) == ["t.parquet", "u.parquet"]

    def test_of_two_writers_at_the_same_time_one_wins(self, store, tmp_path):
        slow = store.writing("labels/t.bin", replace=False)
        slow.__enter__().write(b"the second")
        with store.writing("labels/t.bin", replace=False) as fast:
            fast.write(b"the first")
        with pytest.raises(FileExistsError):
            slow.__exit__(None, None, None)
        left = {path.name: path.read_bytes() for path in (tmp_path / "run/labels").iterdir()}
        assert left == {"t.bin": b"the first"}

    def test_a_file_is_on_the_disk_before_it_has_its_name(self, store, monkeypatch):
        """A loss of power once left files with names and without content."""
        done: list[str] = []

        def fsync(descriptor: int) -> None:
            done.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name.partition('.')[0]}")

        monkeypatch.setattr(os, "fsync", fsync)
        move = store.fs.move
        store.fs = MovingFileSystem(store.fs, lambda *names: (done.append("move"), move(*names)))
        store.write_bytes("leases/0000", b"rows")
        assert done == ["fsync 0000", "move", "fsync leases"]

    @pytest.mark.parametrize("there_before", [False, True])
    @pytest.mark.parametrize(("step", "error"), [("write", "disk full"), ("move", "cannot move")])
    def test_failure_in_the_middle_leaves_what_was(self, store, tmp_path, step, error, there_before):
        if there_before:
            store.write_bytes("labels/t.bin", b"the old content")
        store.fs = DyingFileSystem(store.fs, step)
        with pytest.raises(OSError, match=error):
            store.write_bytes("labels/t.bin", b"the new content")
        left = {path.name: path.read_bytes() for path in (tmp_path / "run" / "labels").iterdir()}
        assert left == ({"t.bin": b"the old content"} if there_before else {})

    def test_what_a_killed_writer_left_is_no_file_of_the_run(self, store, tmp_path):
        store.write_bytes("sent/ticket-00000001.abc", b"16")
        (tmp_path / "run" / "sent" / "ticket-00000002.def.0123.tmp").write_bytes(b"")
        assert store.names("sent") == ["ticket-00000001.abc"]

    def test_table_keeps_schema_and_row_groups(self, store):
        table = tables.LABELS.empty_table()
        store.write_table("empty.parquet", table)
        assert store.read_table("empty.parquet").schema == tables.LABELS
        rows = pa.table({"row": np.arange(10)}, schema=pa.schema([tables.LABELS.field("row")]))
        store.write_table("rows.parquet", rows, row_group_size=4)
        assert store.read_table("rows.parquet", ["row"]).equals(rows)
        assert pq.ParquetFile(store.path("rows.parquet")).metadata.num_row_groups == 3


class TestFolders:
    def test_names_are_sorted_and_filtered(self, store):
        for name in ("b.parquet", "a.parquet", "c.json", "inner/d.parquet"):
            store.write_bytes(f"labels/{name}", b"")
        assert store.names("labels") == ["a.parquet", "b.parquet", "c.json"]
        assert store.names("labels", ".parquet") == ["a.parquet", "b.parquet"]
        assert store.folders("labels") == ["inner"]
        assert store.names("nothing") == store.folders("nothing") == []

    def test_delete_and_exists(self, store):
        store.write_bytes("x", b"")
        assert store.exists("x")
        store.delete("x")
        assert not store.exists("x")
        store.delete("x")

    def test_relative_and_home_paths_become_absolute(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert RunStore("runs/a").root == str(tmp_path / "runs" / "a")
        assert RunStore("~/a/").root == str(tmp_path / "a")

    def test_uri(self, tmp_path):
        store = RunStore(f"file://{tmp_path}/run")
        store.write_bytes("x", b"1")
        assert (tmp_path / "run" / "x").read_bytes() == b"1"
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["x"]


class TestMetrics:
    def test_lines_are_in_order_and_a_round_is_there_once(self, store):
        assert store.read_metrics() == []
        for k in (1, 0, 2):
            store.append_metrics({"round": k, "accuracy": k / 10})
        store.append_metrics({"round": 1, "accuracy": None, "note": "again\u2028\n"})
        assert store.read_metrics() == [
            {"round": 0, "accuracy": 0.0},
            {"round": 1, "accuracy": None, "note": "again\u2028\n"},
            {"round": 2, "accuracy": 0.2},
        ]
        lines = store.read_bytes("metrics.jsonl").decode().split("\n")
        assert lines[-1] == ""
        assert [json.loads(line)["round"] for line in lines[:-1]] == [0, 1, 2]

    def test_lines_of_earlier_rounds_are_kept_as_they_are(self, store, monkeypatch):
        """All of them were parsed in every round: seconds a round after a thousand."""
        for k in range(20):
            store.append_metrics({"round": k})
        parsed = []
        loads = json.loads
        monkeypatch.setattr(json, "loads", lambda line: parsed.append(line) or loads(line))
        store.append_metrics({"round": 20})
        assert len(parsed) == 1


@given(st.integers(0, 10**9))
def test_files_of_tickets_and_rounds(ticket):
    assert ticket_of(ticket_file(LABELS_DIR, ticket).rpartition("/")[2]) == ticket
    assert round_file(3, "batch.parquet") == "rounds/0003/batch.parquet"
    assert predictions_file(3, 1, 4) == "rounds/0003/predictions-0001-of-0004.parquet"


# --- addresses


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("runs", "runs/one/labels"),
        ("/data/runs/", "/data/runs/one/labels"),
        ("/data/what?/runs", "/data/what?/runs/one/labels"),  # a mark in a local name begins no options
        ("s3://bucket/runs", "s3://bucket/runs/one/labels"),
        ("s3://bucket/runs/", "s3://bucket/runs/one/labels"),
        (f"s3://bucket/runs{OPTIONS}", f"s3://bucket/runs/one/labels{OPTIONS}"),
        (f"s3://bucket{OPTIONS}", f"s3://bucket/one/labels{OPTIONS}"),
    ],
)
def test_join(folder: str, expected: str) -> None:
    assert join_uri(folder, "one", "labels") == expected
    assert join_uri(join_uri(folder, "one"), "labels") == expected


def test_address_of_a_part_is_found_by_another_store(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "run"))
    store.write_bytes("labels/a", b"1")
    assert RunStore(store.uri("labels")).read_bytes("a") == b"1"


def test_address_of_a_part_on_s3_keeps_scheme_and_options() -> None:
    store = RunStore(f"s3://bucket/runs/one{OPTIONS}")  # nothing is asked of a server yet
    assert (store.root, store.path("labels")) == ("bucket/runs/one", "bucket/runs/one/labels")
    assert store.uri("labels") == f"s3://bucket/runs/one/labels{OPTIONS}"
    other = RunStore(store.uri("labels"))
    assert (other.root, other.fs) == ("bucket/runs/one/labels", store.fs)


def test_an_option_of_ours_does_not_override_the_user_s() -> None:
    fs, path = open_filesystem(f"s3://bucket/runs{OPTIONS}&allow_delayed_open=false")
    assert path == "bucket/runs"
    assert not fs.equals(open_filesystem(f"s3://bucket/runs{OPTIONS}")[0])
