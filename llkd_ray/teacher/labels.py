"""The files of LABELS: one per ticket, with the ticket's usage in its metadata.

Shapes in names: M texts of a ticket, C labels.

Our own writes are atomic, but files are still checked: disks fill up, machines lose power and people
copy run directories.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import QUARANTINE_DIR, SENT_DIR, RunStore, reason_of, ticket_file, ticket_of
from llkd_ray.storage.tables import list_column, matrix_of
from llkd_ray.teacher.base import Answers, Usage, add_usages

_USAGE, _UNASKED, _IN_FLIGHT = b"usage", b"unasked", b"tickets_in_flight"


@dataclass(frozen=True)
class TicketLabels:
    """The contents of a ticket's file, as passed to the selector."""

    row_M: np.ndarray
    probs_MC: np.ndarray
    """Probability mass on each label, as returned by the teacher."""
    member_M: np.ndarray
    usage: dict[str, Usage]
    """By teacher."""
    unasked: int
    """Texts of the ticket that were not sent, because the cap was reached."""
    attempt: str | None = None
    """The attempt whose answers these are, if it notifies the selector itself."""

    @classmethod
    def empty(cls, n_classes: int) -> TicketLabels:
        """For a ticket without texts."""
        nobody = np.empty(0, dtype=np.int64)
        return cls(nobody, np.empty((0, n_classes)), nobody, {}, 0)


def labels_table(asked: pa.Table, text_hash_M: np.ndarray, answers: Answers, member: int) -> pa.Table:
    """LABELS of the texts that have an answer; ``asked`` has their ``row`` and ``id``."""
    columns = [
        asked["row"].combine_chunks(),
        asked["id"].combine_chunks(),
        pa.array(text_hash_M, pa.uint64()),
        list_column(answers.probs_NC),
        pa.array(answers.off_label_N.astype(np.float32)),
        pa.array(answers.prompt_tokens_N.astype(np.int32)),
        pa.array(answers.cached_tokens_N.astype(np.int32)),
        pa.array(answers.answer_tokens_N.astype(np.int32)),
        pa.array(np.full(len(asked), member, dtype=np.int8)),
        pa.array(np.zeros(len(asked), dtype=bool)),
    ]
    return pa.Table.from_arrays(columns, schema=tables.LABELS).filter(pa.array(answers.answered_N))


def write_ticket(
    store: RunStore,
    folder: str,
    ticket: int,
    labels: pa.Table,
    usage: Mapping[str, Usage],
    unasked: int,
    tickets_in_flight: int,
    names: Sequence[str],
) -> None:
    """Write a ticket's file atomically; the ticket is done once the file exists.

    ``names`` of the labels say in the file what the probabilities are of. A file never changes: if there is
    one, of another attempt at the ticket, this raises FileExistsError.
    """
    metadata = {
        tables.FILE_LABELS: json.dumps(list(names), ensure_ascii=False),
        _USAGE: json.dumps({name: one.as_dict() for name, one in usage.items()}),
        _UNASKED: str(unasked),
        _IN_FLIGHT: str(tickets_in_flight),
    }
    store.write_table(ticket_file(folder, ticket), labels.replace_schema_metadata(metadata), replace=False)


def read_ticket(store: RunStore, folder: str, ticket: int) -> tuple[pa.Table, dict[str, Usage], int]:
    """LABELS of a ticket, its usage by teacher, and the number of its texts that were not sent."""
    table = store.read_table(ticket_file(folder, ticket))
    usage, unasked = _read_metadata(table.schema.metadata or {})
    return table, usage, unasked


def read_all(
    store: RunStore,
    folder: str,
    n_classes: int,
    on_broken: Callable[[int, str], None],
    skip: Container[int] = (),
) -> Iterator[tuple[int, TicketLabels]]:
    """Every ticket that has a file in a folder, in ascending order; see :func:`intact_tickets`."""
    for ticket, table in intact_tickets(store, folder, on_broken, skip):
        yield ticket, ticket_labels(table, *_read_metadata(table.schema.metadata or {}), n_classes)


def ticket_labels(labels: pa.Table, usage: dict[str, Usage], unasked: int, n_classes: int) -> TicketLabels:
    """LABELS in the form that the selector takes."""
    return TicketLabels(
        labels["row"].to_numpy(),
        matrix_of(labels["probs"], n_classes),
        labels["member"].to_numpy(),
        usage,
        unasked,
    )


def _read_metadata(metadata: Mapping[bytes, bytes]) -> tuple[dict[str, Usage], int]:
    usage = {name: Usage(**one) for name, one in json.loads(metadata.get(_USAGE, b"{}")).items()}
    return usage, int(metadata.get(_UNASKED, b"0"))


def in_row_order(pieces: Sequence[pa.Table], row_M: np.ndarray) -> pa.Table:
    """LABELS of several sources in the order of ``row_M``; rows without labels are left out."""
    table = pa.concat_tables([tables.LABELS.empty_table(), *pieces])
    place = {row: i for i, row in enumerate(row_M.tolist())}
    order = np.argsort([place[row] for row in table["row"].to_pylist()], kind="stable")
    return table.take(pa.array(order.astype(np.int64)))


def mark_file(mark: str) -> str:
    return f"{SENT_DIR}/{mark}"


def write_mark(store: RunStore, mark: str, texts: int, usage: Mapping[str, Usage]) -> None:
    """Record what an attempt at a ticket has sent, and the maximum usage of each teacher.

    The mark is deleted when the ticket's labels are written. Marks that remain after a kill show what was
    sent without a stored answer.
    """
    content = {"texts": texts, "usage": {name: one.as_dict() for name, one in usage.items()}}
    store.write_json(mark_file(mark), content)


def read_lost_usage(store: RunStore) -> dict[str, Usage]:
    """What attempts without a stored answer may have used, by teacher."""
    lost: dict[str, Usage] = {}
    for mark in _read_marks(store):
        lost = add_usages(lost, {teacher: Usage(**one) for teacher, one in mark["usage"].items()})
    return lost


def count_unanswered(store: RunStore) -> int:
    """Texts sent in attempts without a stored answer, once per attempt."""
    return sum(mark["texts"] for mark in _read_marks(store))


def _read_marks(store: RunStore) -> Iterator[dict[str, Any]]:
    """The contents of all marks; a mark whose ticket finishes in the meantime is skipped."""
    for name in store.names(SENT_DIR):
        try:
            yield store.read_json(mark_file(name))
        except FileNotFoundError:
            continue


BROKEN_DIR = f"{QUARANTINE_DIR}/broken"
READERS = 16
"""Files read concurrently: on an object store, most of the time is latency."""
_AT_A_TIME = 16 * READERS
"""Maximum number of files in memory."""


def intact_tickets(
    store: RunStore, folder: str, on_broken: Callable[[int, str], None], skip: Container[int] = ()
) -> Iterator[tuple[int, pa.Table]]:
    """LABELS of every ticket with an intact file in a folder, except those in ``skip``, in ascending order.

    A file that is not a complete parquet file of LABELS is moved to BROKEN_DIR, with the reason beside it,
    and ``on_broken`` gets its ticket and a line about it.
    """
    names = [name for name in store.names(folder, ".parquet") if ticket_of(name) not in skip]
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(names), _AT_A_TIME):
            some = names[start : start + _AT_A_TIME]
            files = [f"{folder}/{name}" for name in some]
            for name, file, found in zip(some, files, pool.map(partial(_read, store), files), strict=True):
                if isinstance(found, pa.Table):
                    yield ticket_of(name), found
                    continue
                _quarantine_broken(store, file, found)
                line = f"{file} cannot be read ({found}): moved to {BROKEN_DIR}; its texts are asked again"
                on_broken(ticket_of(name), line)


def _read(store: RunStore, file: str) -> pa.Table | str:
    """A label file's table, or a line that says why it is invalid."""
    content = store.read_bytes(file)  # may raise: an unreachable store is not a damaged file
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (OSError, pa.ArrowException) as error:  # damaged files raise either
        return reason_of(error)
    missing = [name for name in tables.LABELS.names if name not in table.column_names]
    return f"no column {missing[0]}" if missing else table


def _quarantine_broken(store: RunStore, file: str, reason: str) -> None:
    place = f"{BROKEN_DIR}/{file.replace('/', '-')}"
    store.write_bytes(place, store.read_bytes(file))
    store.write_bytes(f"{place}.reason.txt", f"{reason}\n".encode())
    store.delete(file)
