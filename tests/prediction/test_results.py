"""The tables of predictions: what is written in any format is read back, whatever the rows hold."""

from __future__ import annotations

import csv
import io
import json
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llkd_ray.prediction.pieces import KEPT, TEXTS
from llkd_ray.prediction.results import Thresholds, count_labels, predictions, read, write
from llkd_ray.storage.run_dir import RunStore

LABELS = ("=SUM(A1)", "-1", "a;=cmd|'/C x'!A0", "2020-01-01")
HOSTILE = (
    '=HYPERLINK("http://e.example")', "+cmd|' /C calc'!A0", "@SUM(1)", "-1+1", "\t=1", "\r=1", "two\n=1",
    "a;=1", " =1", "'=1", 'quote " and, comma', "\x1b[31m", "\u202e", "", "007", "null", "NaN",
)  # fmt: skip
ANY_TEXT = st.sampled_from(HOSTILE) | st.text(st.characters(exclude_categories=["Cs"]), max_size=10)


def written(store: RunStore, ending: str, texts: list[str]) -> pa.Table:
    number = len(texts)
    schema = pa.schema([*TEXTS, pa.field(f"{KEPT}=kept", pa.string())])
    columns = [["=s.csv"] * number, range(number), texts, texts, [-1] * number, texts]
    rows = pa.table([pa.array(x, f.type) for x, f in zip(columns, schema, strict=True)], schema=schema)
    p_NC = np.full((number, len(LABELS)), 0.1)
    p_NC[np.arange(number), np.arange(number) % len(LABELS)] = 0.7
    table = predictions(rows, p_NC, Thresholds.given(LABELS, {}), with_text=True)
    write(store, f"rows.{ending}", table)
    return table


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
class TestAnyRow:
    @given(st.lists(ANY_TEXT, min_size=1, max_size=8))
    def test_a_row_keeps_its_id_label_and_text(self, tmp_path_factory, ending, texts):
        store = RunStore(str(tmp_path_factory.mktemp("out")))
        table = written(store, ending, texts)
        found = read(store, f"rows.{ending}")
        for name in ("id", "source", "position", "label", "text", "=kept"):
            expected = table[name].to_pylist()
            given_back = found[name].to_pylist()
            if pa.types.is_string(found[name].type) or name == "position":  # others are not said to be text
                assert given_back == expected, name
        assert count_labels(read(store, f"rows.{ending}", ["label", "accepted"])) == count_labels(table)

    def test_long_rows_and_line_breaks_are_no_obstacle_to_a_resume(self, tmp_path, ending):
        store = RunStore(str(tmp_path))
        table = written(store, ending, ["one\ntwo " * 200_000, *("a\nb " * 500 for _ in range(2000))])
        found = read(store, f"rows.{ending}", ["label", "accepted"])
        assert count_labels(found) == count_labels(table)


def test_no_cell_of_a_csv_is_a_formula(tmp_path):
    store = RunStore(str(tmp_path))
    written(store, "csv", list(HOSTILE))
    rows = list(csv.reader(io.StringIO(store.read_bytes("rows.csv").decode(), newline="")))
    assert len(rows) == len(HOSTILE) + 1
    for cell in (cell for row in rows for cell in row):
        assert not [part for part in re.split(r"[;\t\r\n]", cell) if part.strip()[:1] in tuple("=+-@")], cell
    written(store, "jsonl", list(HOSTILE))  # for programs: as it is
    lines = store.read_bytes("rows.jsonl").decode().split("\n")[:-1]
    assert [json.loads(line)["text"] for line in lines] == list(HOSTILE)
