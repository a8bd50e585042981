"""``llkd init``: what it makes of files as people have them."""

from __future__ import annotations

import csv
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llkd_ray.cli.init import _yaml
from llkd_ray.cli.main import main
from llkd_ray.config.loading import load_config

ROWS = [
    {"nr": str(i), "note": f"Größe {i} passt nicht; bitte, {'um' * (i % 5)}tauschen", "topic": topic}
    for i, topic in enumerate(["Billing", "Delivery", "Praise"] * 20)
]


def write(path, encoding="utf-8", delimiter=","):
    match path.suffix:
        case ".csv" | ".tsv":
            with path.open("w", encoding=encoding, newline="") as file:
                writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
                writer.writeheader()
                writer.writerows(ROWS)
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.csv", {}),
        ("semicolons.csv", {"delimiter": ";"}),
        ("excel.csv", {"delimiter": ";", "encoding": "utf-8-sig"}),
        ("unicode.csv", {"delimiter": "\t", "encoding": "utf-16"}),
        ("old.csv", {"delimiter": ";", "encoding": "latin-1"}),
        ("tabs.tsv", {"delimiter": "\t"}),
        ("a.jsonl", {}),
        ("a.parquet", {}),
    ],
)
def test_columns_and_labels_are_found_in_any_format(name, how, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name, **how)
    assert main(["init", name, "--test", name]) == 0
    config = load_config(tmp_path / "llkd.yaml")
    assert config.corpus.uri == str(tmp_path / name)
    assert (config.corpus.text, config.corpus.gold) == ("note", "topic")
    assert config.test is not None
    assert config.test.gold == "topic"
    assert config.labels.names == ("Billing", "Delivery", "Praise")
    assert "llkd check llkd.yaml" in capsys.readouterr().out


def test_a_plain_text_file_has_no_labels_to_find(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.txt").write_text("one text\nanother text\n")
    assert main(["init", "lines.txt"]) == 0
    assert "labels.names" in capsys.readouterr().out
    assert load_config(tmp_path / "llkd.yaml").labels.names == ("first label", "second label")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["a.csv"], "--out: 'llkd.yaml' exists"),
        (["nowhere.csv", "--force"], "nowhere.csv"),
        (["a.csv", "--force", "--text", "body"], "--text: no column 'body'; the columns are nr, note, topic"),
        (["a.csv", "--force", "--test", "none.csv"], "--test: 'none.csv' has no column of labels"),
    ],
)
def test_a_mistake_takes_one_line_and_overwrites_nothing(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.csv")
    (tmp_path / "none.csv").write_text("note\nsome text\n")
    (tmp_path / "llkd.yaml").write_text("mine")
    assert main(["init", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert (tmp_path / "llkd.yaml").read_text() == "mine"


@pytest.mark.parametrize(("gpus", "told"), [(0, ""), (1, "1, shared by teacher and student"), (2, "2")])
def test_the_gpus_of_the_machine_are_told_and_need_no_setting(gpus, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.csv")
    smi = tmp_path / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\n" + "".join(f"echo 'GPU {n}: NVIDIA'\n" for n in range(gpus)))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(smi.parent), prepend=os.pathsep)
    assert main(["init", "a.csv"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("GPUs:")]
    assert lines == ([f"GPUs:   {told}"] if told else [])
    config = load_config(tmp_path / "llkd.yaml")
    assert (config.teacher.gpus, config.student.gpus, config.student.workers) == (None, None, None)


NAME = st.text(max_size=30) | st.sampled_from(
    ["a\nb", "\x1b[31m", "...", "- x", "# x", "a: b", "\u2028", "null"]
)


@given(NAME | st.lists(NAME) | st.none())
def test_any_name_in_a_file_is_one_line_of_the_config(value):
    line = _yaml(value)
    assert "\n" not in line
    assert yaml.safe_load(f"key: {line}   # a comment\n") == {"key": value}
