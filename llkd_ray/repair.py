"""Before a run goes on: label files that cannot be read are put aside, so that their tickets are asked again.

Our own writes are whole or not there at all, but disks fill up, machines lose power and people copy run
directories.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from llkd_ray import schemas
from llkd_ray.store import LABELS_DIR, QUARANTINE_DIR, SMALL_DIR, RunStore

BROKEN_DIR = f"{QUARANTINE_DIR}/broken"
READERS = 16
"""Files read at a time: on an object store, most of the time is waiting."""


def put_aside_broken(store: RunStore, say: Callable[[str], None]) -> list[str]:
    """Move label files that are no whole parquet files of LABELS to BROKEN_DIR, and ``say`` why.

    Returns their paths. Reads every label file, which a selector does at its start, too.
    """
    files = [
        f"{folder}/{name}" for folder in (LABELS_DIR, SMALL_DIR) for name in store.names(folder, ".parquet")
    ]
    with ThreadPoolExecutor(READERS) as pool:
        reasons = pool.map(lambda file: _broken(store, file), files)
        broken = {file: reason for file, reason in zip(files, reasons, strict=True) if reason}
    for file, reason in broken.items():
        place = f"{BROKEN_DIR}/{file.replace('/', '-')}"
        store.write_bytes(place, store.read_bytes(file))
        store.write_bytes(f"{place}.reason.txt", f"{reason}\n".encode())
        store.delete(file)
        say(f"{file} cannot be read ({reason}): put into {BROKEN_DIR}, its texts are asked again")
    return list(broken)


def _broken(store: RunStore, file: str) -> str:
    """Why a label file is none, in one line; empty where it is one."""
    content = store.read_bytes(file)  # a store that cannot be reached is no damage, so this may raise
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (OSError, pa.ArrowException) as error:  # damage shows as either
        return " ".join(str(error).split()) or type(error).__name__
    missing = [name for name in schemas.LABELS.names if name not in table.column_names]
    return f"no column {missing[0]}" if missing else ""
