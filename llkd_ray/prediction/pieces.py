"""Cuts a corpus into pieces whose names are derived from row positions, so that none is scored twice. No Ray.

A reading task has several units (see ``sources``); its rows are cut, in order, into pieces of at most a given
number of rows or characters. A piece is done once its file of predictions exists. A task's note records how
many rows it has read and how many pieces they made; it is written after all pieces have been passed on, so a
task is done when its note and all the pieces listed in it exist. Reading is deterministic: a task that is
repeated produces the same pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from llkd_ray.config.schema import SourceConfig
from llkd_ray.corpus.cleaning import as_text
from llkd_ray.corpus.readers import Unit
from llkd_ray.corpus.staging import StagingWriter
from llkd_ray.storage.run_dir import RunStore

CORPUS, GOLD = "corpus", "gold"
FIELDS = {CORPUS: "corpus", GOLD: "test"}
"""The config section named in a part's error messages; in a test set, every row needs a true label."""
FOLDERS = {CORPUS: "predictions", GOLD: "gold"}
TASKS_DIR = "tasks"
PIECE_CHARS = 16 << 20  # characters per piece: at most 64 MiB
# The texts of a piece, as passed to a model. ``gold`` is -1 if unknown.
TEXTS = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("gold", pa.int16(), nullable=False),
    ]
)
KEPT = "kept:"
"""Prefix of the further columns that are passed on, before a column's name."""


@dataclass(frozen=True)
class Task:
    """The units that one reading task reads."""

    part: str
    number: int
    units: tuple[Unit, ...]

    @property
    def stem(self) -> str:
        return f"{self.part}-{self.number:06d}"

    @property
    def note_file(self) -> str:
        return f"{TASKS_DIR}/{self.stem}.json"

    def piece_file(self, piece: int, ending: str = "parquet") -> str:
        return f"{FOLDERS[self.part]}/piece-{self.number:06d}-{piece:05d}.{ending}"


def write_tasks(store: RunStore, part: str, packs: Iterable[Sequence[Unit]]) -> list[Task]:
    """Store how the corpus is cut, so that a restart cuts it the same way without reading it."""
    tasks = [Task(part, number, tuple(units)) for number, units in enumerate(packs)]
    store.write_json(f"{TASKS_DIR}/{part}.json", [[asdict(unit) for unit in task.units] for task in tasks])
    return tasks


def read_tasks(store: RunStore, part: str) -> list[Task] | None:
    """The tasks stored by :func:`write_tasks`; None if nothing has been cut yet."""
    if not store.exists(f"{TASKS_DIR}/{part}.json"):
        return None
    packs = store.read_json(f"{TASKS_DIR}/{part}.json")
    return [Task(part, number, tuple(map(_unit, units))) for number, units in enumerate(packs)]


def _unit(facts: dict[str, Any]) -> Unit:
    span = facts["span"] and tuple(facts["span"])
    return Unit(**{**facts, "part": tuple(facts["part"]), "span": span})


@dataclass(frozen=True)
class Note:
    """Record of what a task has read."""

    rows_in: int
    pieces: tuple[int, ...]
    """Rows of each piece."""
    reasons: dict[str, int]
    """Quarantined rows, by reason."""


@dataclass(frozen=True)
class Progress:
    """The existing notes and prediction files of one part."""

    notes: dict[int, Note]
    """Notes of tasks that have read all their rows."""
    pieces: dict[int, frozenset[int]]
    """Pieces with a file, by task."""

    def is_done(self, task: Task) -> bool:
        note = self.notes.get(task.number)
        return note is not None and len(self.pieces_of(task)) >= len(note.pieces)

    def pieces_of(self, task: Task) -> frozenset[int]:
        return self.pieces.get(task.number, frozenset())


def progress(store: RunStore, part: str) -> Progress:
    """Determine the progress from a listing of two folders, and from the notes."""
    pieces: dict[int, set[int]] = {}
    for name in store.names(FOLDERS[part]):
        _, task, piece = name.partition(".")[0].split("-")
        pieces.setdefault(int(task), set()).add(int(piece))
    notes = {}
    for name in store.names(TASKS_DIR, ".json"):
        if name.startswith(f"{part}-"):
            facts = store.read_json(f"{TASKS_DIR}/{name}")
            number = int(name.removesuffix(".json").rpartition("-")[2])
            notes[number] = Note(facts["rows_in"], tuple(facts["pieces"]), facts["reasons"])
    return Progress(notes, {task: frozenset(found) for task, found in pieces.items()})


def read_pieces(
    task: Task,
    source: SourceConfig,
    labels: Sequence[str],
    store: RunStore,
    piece_rows: int,
    done: frozenset[int] = frozenset(),
) -> Iterator[tuple[int, pa.Table]]:
    """Yields the pieces of a task that are not ``done``, as (number, TEXTS); then writes the note.

    Rejected rows go to quarantine. Raises :class:`ConfigError` if a file cannot be read completely.
    """
    field = FIELDS[task.part]
    writer = StagingWriter(store, task.stem)
    counts: list[int] = []
    waiting: list[tuple[str | int | None, ...]] = []
    chars = 0
    kept_fields = [pa.field(f"{KEPT}{name}", pa.string()) for name in source.kept_columns]
    schema = pa.schema([*TEXTS, *kept_fields])

    def piece() -> Iterator[tuple[int, pa.Table]]:
        nonlocal waiting, chars
        counts.append(len(waiting))
        if len(counts) - 1 not in done:
            columns = zip(*waiting, strict=True)
            arrays = [pa.array(column, f.type) for column, f in zip(columns, schema, strict=True)]
            yield len(counts) - 1, pa.Table.from_arrays(arrays, schema=schema)
        waiting, chars = [], 0

    for name, row, example in writer.clean(task.units, source, field, labels):
        kept = [as_text(value) for value in row.kept]
        waiting.append((name, row.position, example.id, example.text, example.gold, *kept))
        chars += len(example.text) + len(example.id) + sum(len(value or "") for value in kept)
        if len(waiting) >= piece_rows or chars >= PIECE_CHARS:
            yield from piece()
    if waiting:
        yield from piece()
    writer.flush()
    rows_in, reasons = writer.rows_in, writer.reasons
    assert rows_in == sum(counts) + reasons.total(), f"{task.stem}: {rows_in} read, {counts} + {reasons} left"
    store.write_json(task.note_file, {"rows_in": rows_in, "pieces": counts, "reasons": dict(reasons)})
