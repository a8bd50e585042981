"""File formats in which people are asked for labels and in which their answers are returned.

The file extension decides: ``.csv`` for spreadsheets, ``.jsonl`` for programs, ``.json`` for Label Studio
(tasks on export; its JSON, JSON-MIN or CSV exports on import). Corpus texts are untrusted: in a spreadsheet,
an apostrophe stands before what would be a formula (:func:`~llkd_ray.display.escape_formula`), and is removed
on import.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from xml.sax.saxutils import quoteattr

from llkd_ray.config.base import ConfigError
from llkd_ray.display import escape_formula, unescape_formula

KINDS = (".csv", ".jsonl", ".json")
OWN = ("row", "id", "why", "text", "teacher", "teacher_confidence", "student", "student_confidence", "label")
HINTS = ("why", "teacher", "teacher_confidence", "student", "student_confidence")
"""Fields that may bias the person who answers."""
SCORE_SAMPLE = 20_000
"""Maximum number of labelled texts that the student scores; a random sample if there are more."""
CELL_CHARS = 32_000
"""Maximum length of a text in a spreadsheet, whose cells hold 32,767 characters."""


@dataclass(frozen=True)
class SampleSizes:
    """Number of texts of each kind. For ``random``, texts that are already answered count."""

    random: int = 100
    disagree: int = 50
    unsure: int = 50


@dataclass(frozen=True)
class Question:
    """A text to be labelled."""

    row: int
    id: str
    why: str
    text: str
    teacher: str
    teacher_confidence: float
    student: str
    student_confidence: float


@dataclass(frozen=True)
class Answer:
    """A person's answer for a row; ``label`` is empty if no answer was given."""

    where: str
    """Location in the file, for error messages."""
    row: str
    label: str
    id: str | None = None


def kind_of(name: str, flag: str) -> str:
    """The extension that decides the format; raises ConfigError for any other."""
    for kind in KINDS:
        if name.lower().endswith(kind):
            return kind
    raise ConfigError(f"{flag}: {name!r} has no known ending: name it {', '.join(KINDS)}")


def written(questions: Sequence[Question], kind: str, blind: bool) -> bytes:
    """The file's content; ``blind`` omits why a text was chosen and what the models predicted."""
    rows = [
        {key: value for key, value in asdict(one).items() if not (blind and key in HINTS)}
        for one in questions
    ]
    if kind == ".csv":
        return _csv(rows, [name for name in OWN if not (blind and name in HINTS)])
    if kind == ".jsonl":
        lines = (json.dumps(row | {"label": None}, ensure_ascii=False) for row in rows)
        return "".join(line + "\n" for line in lines).encode()
    return json.dumps([_task(row) for row in rows], indent=1, ensure_ascii=False).encode()


def labelling_config(labels: Sequence[str]) -> str:
    """Label Studio's labelling interface for these labels."""
    choices = "\n".join(f"    <Choice value={quoteattr(label)}/>" for label in labels)
    return (
        '<View>\n  <Text name="text" value="$text"/>\n'
        f'  <Choices name="label" toName="text" choice="single">\n{choices}\n  </Choices>\n</View>\n'
    )


def read(content: bytes, kind: str, name: str) -> list[Answer]:
    """The answers in a file, including empty ones; raises ConfigError if it cannot be read."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"ROWS: {name!r} is not UTF-8 ({error.reason}): save it as CSV UTF-8") from None
    try:
        if kind == ".csv":
            return list(_from_csv(text, name))
        if kind == ".jsonl":
            lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
            return [_plain(json.loads(line), f"line {n}") for n, line in lines]
        tasks = json.loads(text)
        return [answer for n, task in enumerate(tasks, 1) for answer in _from_task(task, f"task {n}")]
    except (json.JSONDecodeError, csv.Error, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"ROWS: {name!r} cannot be read ({type(error).__name__}: {error}): give a file that was "
            "exported, with the column 'label' filled in"
        ) from None


def _csv(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, names, restval="")
    writer.writeheader()
    for row in rows:
        cells = {key: escape_formula(x) if isinstance(x, str) else x for key, x in row.items()}
        for key in set(cells) & {"teacher_confidence", "student_confidence"}:
            cells[key] = f"{row[key]:.4f}"
        if len(row["text"]) > CELL_CHARS:
            cells["text"] = escape_formula(row["text"][:CELL_CHARS] + " …")
        writer.writerow(cells)
    return out.getvalue().encode("utf-8-sig")  # the BOM tells spreadsheets that it is UTF-8


def _from_csv(text: str, name: str) -> Iterator[Answer]:
    # The separator that spreadsheets write depends on their locale.
    header = text.partition("\n")[0]
    separator = max(",;\t", key=header.count)
    # csv's own field size limit is process-wide, so it stays as it is: texts are cut and not needed here.
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    missing = [column for column in ("row", "label") if column not in (reader.fieldnames or ())]
    if missing:
        raise ConfigError(
            f"ROWS: {name!r} has no column {missing[0]!r}; its columns are "
            f"{', '.join(reader.fieldnames or ()) or 'none'}: keep those of the export"
        )
    for record in reader:
        where = f"line {reader.line_num}"
        identity = record.get("id")
        label, row = record["label"] or "", record["row"] or ""
        if any(cell for cell in record.values()):
            id_ = None if identity is None else unescape_formula(identity)
            yield Answer(where, row.strip(), label.strip(), id_)


def _task(row: dict[str, Any]) -> dict[str, Any]:
    """A Label Studio task; the teacher's label is included as a prediction."""
    task: dict[str, Any] = {"data": row}
    if "teacher" in row:
        choice = {
            "from_name": "label",
            "to_name": "text",
            "type": "choices",
            "value": {"choices": [row["teacher"]]},
        }
        task["predictions"] = [
            {"model_version": "teacher", "score": row["teacher_confidence"], "result": [choice]}
        ]
    return task


def _from_task(task: dict[str, Any], where: str) -> Iterator[Answer]:
    """The answers to a task: one per person who answered, or an empty one if nobody did."""
    if "data" not in task:  # JSON-MIN
        yield _plain(task, where)
        return
    said = [
        choice
        for annotation in task.get("annotations") or ()
        if not annotation.get("was_cancelled")
        for result in annotation["result"]
        if result.get("type") == "choices"
        for choice in result["value"]["choices"]
    ]
    for label in said or [""]:
        yield _plain(task["data"] | {"label": label}, where)


def _plain(record: dict[str, Any], where: str) -> Answer:
    label, identity = record.get("label"), record.get("id")
    if isinstance(label, dict):  # several choices by one person
        label = " and ".join(label["choices"])
    # In JSON-MIN, ``id`` may be the task's own number; the corpus's ids are strings.
    known = identity if isinstance(identity, str) else None
    return Answer(where, str(record["row"]), "" if label is None else str(label).strip(), known)
