"""Addresses of the run directory: joined without losing a URI's options, and found again by another store."""

from __future__ import annotations

from pathlib import Path

import pytest

from llkd_ray.storage.run_dir import RunStore, join_uri, open_filesystem

OPTIONS = "?endpoint_override=127.0.0.1:9000&scheme=http&region=us-east-1"


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
