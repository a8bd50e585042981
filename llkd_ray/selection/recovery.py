"""The state from which a restarted selector resumes: files of rounds, and the last score table snapshot.

The run's files are the source of truth, and a new driver reads all of them. But when a selector dies within
a run, all teachers and ranks wait for the next one: with 100 million texts, reading some hundred thousand
label files takes minutes, a snapshot only seconds. A snapshot belongs to one driver's session and replaces
the previous one. A truncated or damaged snapshot is ignored.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llkd_ray.metrics.uncertainty import Ints, StudentScores
from llkd_ray.selection.table import NONE, ScoreTable
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import (
    BATCH,
    ROUNDS_DIR,
    SCORES,
    SELECTED,
    SNAPSHOTS_DIR,
    TRAINED,
    RunStore,
    retried,
    round_file,
)
from llkd_ray.storage.tables import AuditAnswers
from llkd_ray.teacher.base import Usage


class Progress:
    """Which rounds are scored, selected and trained."""

    def __init__(self, store: RunStore, table: ScoreTable) -> None:
        self.store, self.table = store, table
        self.refreshed: set[int] = set()
        self.selected: dict[int, dict[str, Any]] = {}
        """The record of each selection."""
        self.trained: dict[int, dict[str, Any]] = {}
        """The student's record of each round."""
        self.finished = False
        """Whether all rounds are over."""
        self.note = ""
        """What the student is doing, for the progress display."""
        self.student_failure = ""
        """Why no rank can go on."""

    def rounds_on_disk(self) -> int:
        """Number of rounds that may have files."""
        return len(self.store.folders(ROUNDS_DIR))

    def note_refreshed(self, k: int) -> None:
        """Write the scores of a round, which are complete in the table."""
        row_M, scores = self.table.scores(k)
        columns = [row_M, scores.uncertainty_M, scores.margin_M, scores.support_M]
        table = pa.Table.from_arrays([pa.array(column) for column in columns], schema=tables.SCORES)
        self.store.write_table(round_file(k, SCORES), table)
        self.refreshed.add(k)

    def note_selected(self, k: int, batch: pa.Table, record: dict[str, Any]) -> None:
        """Write a round's batch (ROUND) and record."""
        self.store.write_table(round_file(k, BATCH), batch)
        self.store.write_json(round_file(k, SELECTED), record)  # the batch exists once this file does
        self.table.mark_trained(k, batch["row"].to_numpy())
        self.selected[k] = record

    def note_trained(self, k: int, record: dict[str, Any]) -> None:
        """Write the student's record of a finished round, whose files exist."""
        self.store.write_json(round_file(k, TRAINED), record)
        self.trained[k] = record

    def restore(self, k: int, in_table: bool) -> None:
        """Load a round from its files, and into the table unless the table has it."""
        if self.store.exists(round_file(k, SCORES)):
            if not in_table:
                file = self.store.read_table(round_file(k, SCORES))
                row_M, *signals_M = (column.to_numpy() for column in file.columns)
                self.table.refresh(k, row_M, StudentScores(self.table.label[row_M], *signals_M))
            self.refreshed.add(k)
        if self.store.exists(round_file(k, SELECTED)):
            if not in_table:
                batch = self.store.read_table(round_file(k, BATCH), ["row"])
                self.table.mark_trained(k, batch["row"].to_numpy())
            self.selected[k] = self.store.read_json(round_file(k, SELECTED))
        if self.store.exists(round_file(k, TRAINED)):
            self.trained[k] = self.store.read_json(round_file(k, TRAINED))


_TICKETS, _META = "tickets", "meta"


@dataclass(frozen=True)
class Snapshot:
    """The score table's columns, and which tickets and rounds they include."""

    columns: Mapping[str, NDArray[Any]]
    """See :meth:`~llkd_ray.selection.table.ScoreTable.copy_into`."""
    tickets: Ints
    """int64[M]: the tickets whose labels are included."""
    rounds: int
    """Rounds below this number are included."""
    usage: Mapping[str, Usage]
    """Usage of these tickets, by teacher."""
    unasked: int
    """Texts of these tickets that were not sent to any teacher."""

    def write(self, out: IO[bytes]) -> None:
        """Write it as a ``.npz`` file, without a copy in memory."""
        usage = {teacher: one.as_dict() for teacher, one in self.usage.items()}
        meta = json.dumps({"rounds": self.rounds, "usage": usage, "unasked": self.unasked}).encode()
        own = {_TICKETS: self.tickets, _META: np.frombuffer(meta, dtype=np.uint8)}
        np.savez(out, **own, **self.columns)  # type: ignore[arg-type]  # numpy's stubs take names for options

    @classmethod
    def read(cls, source: IO[bytes]) -> Snapshot:
        """Read what :meth:`write` wrote. Raises ValueError for a truncated or damaged file."""
        try:
            with np.load(source) as saved:
                columns = {name: saved[name] for name in saved.files}
                meta = json.loads(columns.pop(_META).tobytes())
                tickets = columns.pop(_TICKETS)
        except (zipfile.BadZipFile, EOFError, KeyError, ValueError) as error:
            raise ValueError(f"not a whole snapshot: {error}") from None
        usage = {teacher: Usage(**one) for teacher, one in meta["usage"].items()}
        return cls(columns, tickets, meta["rounds"], usage, meta["unasked"])


@retried
def save_snapshot(store: RunStore, session: str, snapshot: Snapshot) -> None:
    """Write a session's snapshot, replacing its last one."""
    with store.writing(_file(session)) as out:
        snapshot.write(out)


@retried
def load_snapshot(store: RunStore, session: str) -> Snapshot | None:
    """A session's snapshot; None if it is missing or damaged."""
    try:
        with store.fs.open_input_file(store.path(_file(session))) as source:
            return Snapshot.read(source)
    except (FileNotFoundError, ValueError):
        return None


def delete_snapshots(store: RunStore) -> None:
    """Delete all snapshots, as a driver starts or a run ends. Failing to do so does no harm."""
    with suppress(OSError):
        store.delete_folder(SNAPSHOTS_DIR)


def _file(session: str) -> str:
    return f"{SNAPSHOTS_DIR}/{session}.npz"


def apply_human_labels(answers: AuditAnswers, table: ScoreTable) -> None:
    """Replace labels in the table by human labels; a second call changes nothing.

    They count as labels of a better teacher, so that a cascade does not review them. Replacing a label drops
    its support, so rows that already have their human label are left unchanged.
    """
    label_M, confidence_M = table.label[answers.row_M], table.confidence[answers.row_M]
    new = (label_M != NONE) & ((label_M != answers.label_M) | (confidence_M != -1.0))
    n = int(np.count_nonzero(new))
    table.relabel(answers.row_M[new], answers.label_M[new], np.ones(n), np.ones(n, dtype=int))
