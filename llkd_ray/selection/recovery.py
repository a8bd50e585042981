"""What a new selector starts from: rounds in files and memory, and the last snapshot.

Files are the truth, and a driver that begins reads them all. But where a selector dies in mid-run, every
teacher and every rank waits for the next one: at 100 million texts that would read some hundred thousand
label files, and a snapshot takes seconds. It is of one driver's session, and the last one replaces those
before. One that is cut off or damaged is left out.
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
    round_file,
)
from llkd_ray.storage.tables import AuditAnswers
from llkd_ray.teacher.base import Usage


class Progress:
    """Which rounds are scored, selected and trained; all of it is also in the score table."""

    def __init__(self, store: RunStore, table: ScoreTable) -> None:
        self.store, self.table = store, table
        self.refreshed: set[int] = set()
        self.selected: dict[int, dict[str, Any]] = {}
        """What is to be known of each selection."""
        self.trained: dict[int, dict[str, Any]] = {}
        """What the student reported of each round."""
        self.finished = False
        """No round comes any more."""
        self.note = ""
        """What the student is doing, for people."""

    def rounds_on_disk(self) -> int:
        """Rounds of which there may be files."""
        return len(self.store.folders(ROUNDS_DIR))

    def note_refreshed(self, k: int) -> None:
        """The table has all that the student thinks before a round."""
        row_M, scores = self.table.scores(k)
        columns = [row_M, scores.uncertainty_M, scores.margin_M, scores.support_M]
        table = pa.Table.from_arrays([pa.array(column) for column in columns], schema=tables.SCORES)
        self.store.write_table(round_file(k, SCORES), table)
        self.refreshed.add(k)

    def note_selected(self, k: int, batch: pa.Table, facts: dict[str, Any]) -> None:
        """A round trains on a batch (ROUND)."""
        self.store.write_table(round_file(k, BATCH), batch)
        self.store.write_json(round_file(k, SELECTED), facts)  # the batch exists once this file does
        self.table.mark_trained(k, batch["row"].to_numpy())
        self.selected[k] = facts

    def note_trained(self, k: int, facts: dict[str, Any]) -> None:
        """The student has finished a round and its files are in place."""
        self.store.write_json(round_file(k, TRAINED), facts)
        self.trained[k] = facts

    def restore(self, k: int, in_table: bool) -> None:
        """Bring a round back from its files, and into the table unless that has it."""
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


_TICKETS, _FACTS = "tickets", "facts"


@dataclass(frozen=True)
class Snapshot:
    """The score table's columns, and what they are made of."""

    columns: Mapping[str, NDArray[Any]]
    """See :meth:`~llkd_ray.selection.table.ScoreTable.copy_into`."""
    tickets: Ints
    """int64[M]: the tickets whose labels are among it."""
    rounds: int
    """All that was noted of rounds below this number is among it."""
    usage: Mapping[str, Usage]
    """What these tickets have used, by teacher."""
    unasked: int
    """Texts of these tickets that were not asked for."""

    def write(self, out: IO[bytes]) -> None:
        """As a ``.npz`` file; needs no memory of its own."""
        usage = {teacher: one.as_dict() for teacher, one in self.usage.items()}
        facts = json.dumps({"rounds": self.rounds, "usage": usage, "unasked": self.unasked}).encode()
        own = {_TICKETS: self.tickets, _FACTS: np.frombuffer(facts, dtype=np.uint8)}
        np.savez(out, **own, **self.columns)  # type: ignore[arg-type]  # numpy's stubs take names for options

    @classmethod
    def read(cls, source: IO[bytes]) -> Snapshot:
        """What :meth:`write` wrote. Raises ValueError for a file that is cut off or damaged."""
        try:
            with np.load(source) as saved:
                columns = {name: saved[name] for name in saved.files}
                facts = json.loads(columns.pop(_FACTS).tobytes())
                tickets = columns.pop(_TICKETS)
        except (zipfile.BadZipFile, EOFError, KeyError, ValueError) as error:
            raise ValueError(f"not a whole snapshot: {error}") from None
        usage = {teacher: Usage(**one) for teacher, one in facts["usage"].items()}
        return cls(columns, tickets, facts["rounds"], usage, facts["unasked"])


def keep(store: RunStore, session: str, snapshot: Snapshot) -> None:
    """Put a session's snapshot in the place of its last one."""
    with store.writing(_file(session)) as out:
        snapshot.write(out)


def kept(store: RunStore, session: str) -> Snapshot | None:
    """A session's snapshot; None where there is none, or none that is whole."""
    try:
        with store.fs.open_input_file(store.path(_file(session))) as source:
            return Snapshot.read(source)
    except (FileNotFoundError, ValueError):
        return None


def drop_all(store: RunStore) -> None:
    """Nobody will ask for them any more: a driver begins, or the run is over. Left ones do no harm."""
    with suppress(OSError):
        store.fs.delete_dir(store.path(SNAPSHOTS_DIR))


def _file(session: str) -> str:
    return f"{SNAPSHOTS_DIR}/{session}.npz"


def apply_human_labels(answers: AuditAnswers, table: ScoreTable) -> None:
    """Put people's labels in place of those in the table; a second time changes nothing.

    They count as the answers of a better teacher, so that a cascade does not ask about them once more. What
    the student said of the old label goes, so rows that have theirs already are left alone.
    """
    label_M, confidence_M = table.label[answers.row_M], table.confidence[answers.row_M]
    new = (label_M != NONE) & ((label_M != answers.label_M) | (confidence_M != -1.0))
    n = int(np.count_nonzero(new))
    table.relabel(answers.row_M[new], answers.label_M[new], np.ones(n), np.ones(n, dtype=int))
