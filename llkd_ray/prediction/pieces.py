"""A corpus in pieces whose names are fixed by where their rows stand, so that none is scored twice. No Ray.

A reading task has some units (see ``sources``); its rows, as they come, are cut into pieces of so many rows
or characters. A piece is done once its file of predictions is in place. A task's note says how many rows it
has read and how many pieces that made; it is written when all of them are handed on, so a task is done when
its note and all the pieces in it are there. What is read again is read alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from llkd_ray.config.schema import SourceConfig
from llkd_ray.corpus.readers import Unit
from llkd_ray.corpus.staging import StagingWriter
from llkd_ray.storage.run_dir import RunStore

CORPUS, GOLD = "corpus", "gold"
FIELDS = {CORPUS: "corpus", GOLD: "test"}
"""The section that a part's mistakes are named after; in a test set, every row needs a true label."""
FOLDERS = {CORPUS: "predictions", GOLD: "gold"}
TASKS_DIR = "tasks"
PIECE_CHARS = 16 << 20  # of texts in one piece: 64 MiB at most
# The texts of a piece, on their way to a model. ``gold`` is -1 where it is unknown.
TEXTS = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("gold", pa.int16(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Task:
    """What one reading task reads."""

    part: str
    number: int
    units: tuple[Unit, ...]

    @property
    def stem(self) -> str:
        return f"{self.part}-{self.number:06d}"

    @property
    def note_file(self) -> str:
        return f"{TASKS_DIR}/{self.stem}.json"

    def piece_file(self, piece: int) -> str:
        return f"{FOLDERS[self.part]}/{_piece_name(self.number, piece)}"


def _piece_name(task: int, piece: int) -> str:
    return f"piece-{task:06d}-{piece:05d}.parquet"


def write_tasks(store: RunStore, part: str, packs: Iterable[Sequence[Unit]]) -> list[Task]:
    """Keep how the corpus is cut, so that a later start cuts it alike without looking at it."""
    tasks = [Task(part, number, tuple(units)) for number, units in enumerate(packs)]
    store.write_json(f"{TASKS_DIR}/{part}.json", [[asdict(unit) for unit in task.units] for task in tasks])
    return tasks


def read_tasks(store: RunStore, part: str) -> list[Task] | None:
    """What :func:`write_tasks` kept; None where nothing is cut yet."""
    if not store.exists(f"{TASKS_DIR}/{part}.json"):
        return None
    packs = store.read_json(f"{TASKS_DIR}/{part}.json")
    return [Task(part, number, tuple(map(_unit, units))) for number, units in enumerate(packs)]


def _unit(facts: dict[str, Any]) -> Unit:
    span = facts["span"] and tuple(facts["span"])
    return Unit(**{**facts, "part": tuple(facts["part"]), "span": span})


@dataclass(frozen=True)
class Note:
    """What a task has read."""

    rows_in: int
    pieces: tuple[int, ...]
    """Rows of each piece."""
    reasons: dict[str, int]
    """Rows in quarantine, by reason."""


@dataclass(frozen=True)
class Progress:
    """What is in place of one part."""

    notes: dict[int, Note]
    """Of tasks that have read all their rows."""
    pieces: dict[int, frozenset[int]]
    """Pieces with a file, by task."""

    def is_done(self, task: Task) -> bool:
        note = self.notes.get(task.number)
        return note is not None and len(self.pieces_of(task)) >= len(note.pieces)

    def pieces_of(self, task: Task) -> frozenset[int]:
        return self.pieces.get(task.number, frozenset())


def progress(store: RunStore, part: str) -> Progress:
    """Look what is in place: a listing of two folders, and the notes."""
    pieces: dict[int, set[int]] = {}
    for name in store.names(FOLDERS[part], ".parquet"):
        _, task, piece = name.removesuffix(".parquet").split("-")
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
    """The pieces of a task that are not ``done``, each as its number and its TEXTS; then writes the note.

    Refused rows go to quarantine. Raises :class:`ConfigError` where a file cannot be read to its end.
    """
    field = FIELDS[task.part]
    writer = StagingWriter(store, task.stem)
    counts: list[int] = []
    waiting: list[tuple[str, int, str, str, int]] = []
    chars = 0

    def piece() -> Iterator[tuple[int, pa.Table]]:
        nonlocal waiting, chars
        counts.append(len(waiting))
        if len(counts) - 1 not in done:
            columns = zip(*waiting, strict=True)
            arrays = [pa.array(column, f.type) for column, f in zip(columns, TEXTS, strict=True)]
            yield len(counts) - 1, pa.Table.from_arrays(arrays, schema=TEXTS)
        waiting, chars = [], 0

    for name, position, example in writer.clean(task.units, source, field, labels):
        waiting.append((name, position, example.id, example.text, example.gold))
        chars += len(example.text) + len(example.id)
        if len(waiting) >= piece_rows or chars >= PIECE_CHARS:
            yield from piece()
    if waiting:
        yield from piece()
    writer.flush()
    rows_in, reasons = writer.rows_in, writer.reasons
    assert rows_in == sum(counts) + reasons.total(), f"{task.stem}: {rows_in} read, {counts} + {reasons} left"
    store.write_json(task.note_file, {"rows_in": rows_in, "pieces": counts, "reasons": dict(reasons)})
