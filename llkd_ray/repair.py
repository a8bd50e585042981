"""Label files that cannot be read are put aside, so that their tickets are asked again.

Our own writes are whole or not there at all, but disks fill up, machines lose power and people copy run
directories.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from llkd_ray import schemas
from llkd_ray.store import QUARANTINE_DIR, RunStore, reason_of, ticket_of

BROKEN_DIR = f"{QUARANTINE_DIR}/broken"
READERS = 16
"""Files read at a time: on an object store, most of the time is waiting."""
_AT_A_TIME = 16 * READERS
"""Files held at a time."""


def whole_tickets(
    store: RunStore, folder: str, put_aside: Callable[[int, str], None], skip: Container[int] = ()
) -> Iterator[tuple[int, pa.Table]]:
    """LABELS of every ticket that has a whole file in a folder, and is none of ``skip``, in ascending order.

    A file that is no whole parquet file of LABELS goes to BROKEN_DIR, with the reason beside it, and
    ``put_aside`` is told its ticket and a line about it.
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
                _put_aside(store, file, found)
                line = f"{file} cannot be read ({found}): put into {BROKEN_DIR}, its texts are asked again"
                put_aside(ticket_of(name), line)


def _read(store: RunStore, file: str) -> pa.Table | str:
    """A label file's table, or in one line why it is none."""
    content = store.read_bytes(file)  # a store that cannot be reached is no damage, so this may raise
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (OSError, pa.ArrowException) as error:  # damage shows as either
        return reason_of(error)
    missing = [name for name in schemas.LABELS.names if name not in table.column_names]
    return f"no column {missing[0]}" if missing else table


def _put_aside(store: RunStore, file: str, reason: str) -> None:
    place = f"{BROKEN_DIR}/{file.replace('/', '-')}"
    store.write_bytes(place, store.read_bytes(file))
    store.write_bytes(f"{place}.reason.txt", f"{reason}\n".encode())
    store.delete(file)
