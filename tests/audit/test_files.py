"""What spreadsheets and Label Studio get, and what is read back from them."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llkd_ray.audit.files import KINDS, Question, kind_of, labelling_config, read, written
from llkd_ray.config.base import ConfigError

ATTACK = '=HYPERLINK("http://evil.example","click")'


def questions() -> list[Question]:
    return [
        Question(7, "@seven", "random", ATTACK, "-1", 0.9, "yes", 0.8),
        Question(9, "nine", "unsure", 'two\nlines, "quoted"; übel', "yes", 0.6, "-1", 0.5),
    ]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=5))
def test_rows_and_ids_come_back_with_their_answers(ids):
    asked = [replace(questions()[0], row=n, id=id_, text=id_ + ATTACK) for n, id_ in enumerate(ids)]
    for kind in KINDS:
        content = written(asked, kind, blind=False)
        assert [(one.row, one.id) for one in read(content, kind, "x")] == [
            (str(n), x) for n, x in enumerate(ids)
        ]


def test_a_spreadsheet_gets_no_formula_and_knows_the_encoding():
    content = written(questions(), ".csv", blind=False)
    assert content.startswith(b"\xef\xbb\xbf")
    rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    assert rows[0] == [
        "row", "id", "why", "text", "teacher", "teacher_confidence", "student", "student_confidence", "label"
    ]  # fmt: skip
    assert rows[1] == ["7", "'@seven", "random", "'" + ATTACK, "'-1", "0.9000", "yes", "0.8000", ""]
    assert rows[2][3] == 'two\nlines, "quoted"; übel'
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row)
    long = replace(questions()[0], text="=" + "x" * 50_000)  # which no cell holds
    (_, row) = csv.reader(io.StringIO(written([long], ".csv", False).decode("utf-8-sig")))
    assert len(row[3]) < 32_767
    assert row[3].startswith("'=")
    assert json.loads(written([long], ".jsonl", False))["text"] == long.text


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".json"])
def test_blind_says_nothing_of_the_models(kind):
    content = written(questions(), kind, blind=True).decode()
    assert not [word for word in ("confidence", "teacher", "unsure") if word in content]
    assert [one.row for one in read(content.encode(), kind, "x")] == ["7", "9"]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_comes_back_from_any_language(separator):
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=separator)
    writer.writerows([["row", "id", "label"], ["7", "'@seven", " yes "], ["9.0", "nine", ""], ["", "", ""]])
    answers = read(out.getvalue().encode("utf-8-sig"), ".csv", "x.csv")
    assert [(one.row, one.id, one.label, one.where) for one in answers] == [
        ("7", "@seven", "yes", "line 2"),
        ("9.0", "nine", "", "line 3"),
    ]


def test_label_studio_tasks_and_its_exports():
    tasks = json.loads(written(questions(), ".json", blind=False))
    assert tasks[0]["data"]["text"] == ATTACK
    result = tasks[0]["predictions"][0]["result"][0]
    assert (result["from_name"], result["to_name"], result["value"]) == ("label", "text", {"choices": ["-1"]})

    def said(label, cancelled=False):
        one = result | {"value": {"choices": [label]}}
        return {"result": [one], "was_cancelled": cancelled}

    export = [
        {"id": 1, "data": tasks[0]["data"], "annotations": [said("yes"), said("-1", cancelled=True)]},
        {"id": 2, "data": tasks[1]["data"], "annotations": []},
    ]
    answers = read(json.dumps(export).encode(), ".json", "x.json")
    assert [(one.row, one.label, one.id) for one in answers] == [("7", "yes", "@seven"), ("9", "", "nine")]
    assert "value='a \"b\" &lt;c&gt;'" in labelling_config(['a "b" <c>'])
    shortened = [{"id": 12, "row": 7, "text": "…", "label": "yes", "annotator": 1}]
    (answer,) = read(json.dumps(shortened).encode(), ".json", "x.json")
    assert (answer.row, answer.label, answer.id) == ("7", "yes", None)


@pytest.mark.parametrize(
    ("content", "kind", "says"),
    [
        (b"row,labels\n1,x\n", ".csv", "has no column 'label'; its columns are row, labels"),
        (b"", ".csv", "has no column 'row'; its columns are none"),
        ("row;label\n1;ü\n".encode("latin-1"), ".csv", "is not UTF-8"),
        (b'{"row": 1', ".jsonl", "cannot be read"),
        (b'{"id": 1}\n', ".jsonl", "cannot be read (KeyError: 'row')"),
        (b'{"a": 1}', ".json", "cannot be read"),
        (b"7", ".json", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read_are_refused_in_one_line(content, kind, says):
    with pytest.raises(ConfigError) as caught:
        read(content, kind, "rows")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert kind_of("a/B.CSV", "--out") == ".csv"
    with pytest.raises(ConfigError, match=r"--out: 'rows\.xlsx' has no known ending: name it \.csv"):
        kind_of("rows.xlsx", "--out")
