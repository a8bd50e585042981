"""The tables of a run: explicit Arrow schemas, so that empty and all-null columns keep their type.

Files of an audit:

    audit/asked.parquet       rows exported for people, with the teacher's and student's answers at that time
    audit/answers.parquet     the labels that people gave
    audit/estimate.json       quality of the pseudo-labels, estimated from the random sample
    rounds/k/audited.parquet  the answers that round k was scored and selected with

A person's label replaces the teacher's, with confidence 1, from the next start of the run on. It is stored
with each round that uses it, so that a round that is trained again uses the same labels.

Shapes in names: M rows, N texts, C labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llkd_ray.config.schema import Config
from llkd_ray.metrics.calibration import Calibrator
from llkd_ray.metrics.uncertainty import Ints
from llkd_ray.storage.run_dir import (
    ANSWERS,
    AUDITED,
    BATCH,
    CALIBRATION,
    EXAMPLES_INDEX,
    LABELS_DIR,
    ROUNDS_DIR,
    TRAINED,
    RunStore,
    predictions_file,
    retried,
    round_file,
    ticket_file,
)

# One row per text. The dense row number is not stored: it is the shard's first row (from the index) plus the
# position in the shard. ``gold`` is the index into labels.names, -1 if unknown. ``text_hash`` identifies
# equal texts, in this run and in others (``corpus.cleaning.text_hash``).
EXAMPLES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("gold", pa.int16(), nullable=False),
        pa.field("text_hash", pa.uint64(), nullable=False),
    ]
)
# EXAMPLES as they are read back, with the row number added.
NUMBERED_EXAMPLES = pa.schema([pa.field("row", pa.int64(), nullable=False), *EXAMPLES])
# The rows that the tickets of one round contain.
LEASES = pa.schema(
    [
        pa.field("ticket", pa.int32(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
    ]
)
FILE_LABELS = b"labels"
"""Key of a parquet file's metadata: the label names in the order of its ``probs``, as a JSON list."""
# The teacher's answers. ``probs``: probability mass of each label over the teacher's whole vocabulary, not
# normalised; ``off_label``: the mass on everything else (0 if the source does not report it). Later runs find
# the answer by ``text_hash``; ``member`` is the teacher that gave it (0: the only or the small one, 1: the
# large one of a cascade); ``reused``: the answer comes from an earlier run. Tokens are those of all requests
# for the text; ``prompt_tokens`` include ``cached_tokens``. The file's metadata hold under ``usage`` what the
# ticket used, by teacher (``teacher.base.Usage``), and the label names under ``FILE_LABELS``.
LABELS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("text_hash", pa.uint64(), nullable=False),
        pa.field("probs", pa.list_(pa.float32()), nullable=False),
        pa.field("off_label", pa.float32(), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("cached_tokens", pa.int32(), nullable=False),
        pa.field("answer_tokens", pa.int32(), nullable=False),
        pa.field("member", pa.int8(), nullable=False),
        pa.field("reused", pa.bool_(), nullable=False),
    ]
)
# The student's training batch of one round. ``probs`` sums to one; ``weight`` has mean one.
ROUND = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("label", pa.int16(), nullable=False),
        pa.field("probs", pa.list_(pa.float32()), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
    ]
)
# The student's scores before a selection: predictive entropy divided by log(C), best probability minus the
# second, and the probability of the teacher's label (nan if the teacher has not labelled the text).
SCORES = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("uncertainty", pa.float32(), nullable=False),
        pa.field("margin", pa.float16(), nullable=False),
        pa.field("support", pa.float16(), nullable=False),
    ]
)
# A sample of a round's candidates, for inspection: their state just before the selection, and whether they
# were selected. ``confidence`` is the teacher's; the student's signals are nan for texts it had not scored.
CANDIDATE_SAMPLE = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("label", pa.int16(), nullable=False),
        pa.field("confidence", pa.float32(), nullable=False),
        pa.field("uncertainty", pa.float32(), nullable=False),
        pa.field("support", pa.float16(), nullable=False),
        pa.field("selected", pa.bool_(), nullable=False),
    ]
)
# The student's predictions on the evaluation rows after a round.
PREDICTIONS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("probs", pa.list_(pa.float32()), nullable=False),
    ]
)
# Refused rows: their position, the reason, and the start of the text.
QUARANTINE = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("start_of_text", pa.string(), nullable=False),
    ]
)
# Texts that people were asked to label: ``why`` each was chosen, whether it belongs to the random sample, and
# the answers of teacher and student at that time.
AUDIT_ASKED = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("why", pa.string(), nullable=False),
        pa.field("is_random", pa.bool_(), nullable=False),
        pa.field("teacher", pa.int16(), nullable=False),
        pa.field("teacher_confidence", pa.float32(), nullable=False),
        pa.field("student", pa.int16(), nullable=False),
        pa.field("student_confidence", pa.float32(), nullable=False),
    ]
)
# The labels that people gave.
AUDIT_ANSWERS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("label", pa.int16(), nullable=False),
    ]
)


@dataclass(frozen=True)
class AuditAnswers:
    """Labels that people gave, in ascending order of rows."""

    row_M: Ints
    label_M: Ints

    @classmethod
    def of(cls, by_row: dict[int, int]) -> AuditAnswers:
        """From a mapping of row to label."""
        rows = sorted(by_row)
        return cls(np.array(rows, dtype=np.int64), np.array([by_row[row] for row in rows], dtype=np.int16))

    @classmethod
    def read(cls, store: RunStore, file: str = ANSWERS) -> AuditAnswers:
        """The answers in a file; none if there is no file."""
        if not store.exists(file):
            return cls.of({})
        table = store.read_table(file)
        return cls(table["row"].to_numpy(), table["label"].to_numpy())

    @classmethod
    def of_round(cls, store: RunStore, round_number: int) -> AuditAnswers:
        """The answers that a round was scored and selected with."""
        return cls.read(store, round_file(round_number, AUDITED))

    def __len__(self) -> int:
        return int(self.row_M.size)

    def by_row(self) -> dict[int, int]:
        return dict(zip(self.row_M.tolist(), self.label_M.tolist(), strict=True))

    def write(self, store: RunStore, file: str = ANSWERS) -> None:
        columns = [pa.array(self.row_M, pa.int64()), pa.array(self.label_M, pa.int16())]
        store.write_table(file, pa.Table.from_arrays(columns, schema=AUDIT_ANSWERS))

    def keep_for(self, store: RunStore, round_number: int) -> None:
        """Store the answers with a round that is scored or selected with them; no file if there are none."""
        if len(self):
            self.write(store, round_file(round_number, AUDITED))

    def correct(self, batch: pa.Table, n_classes: int) -> pa.Table:
        """A ROUND table with these labels instead of the teacher's, each with probability 1."""
        row_N = batch["row"].to_numpy()
        place_N = np.searchsorted(self.row_M, row_N)
        known_N = place_N < len(self)
        known_N[known_N] = self.row_M[place_N[known_N]] == row_N[known_N]
        if not known_N.any():
            return batch
        label_N, p_NC = batch["label"].to_numpy().copy(), matrix_of(batch["probs"], n_classes).copy()
        label_N[known_N] = self.label_M[place_N[known_N]]
        p_NC[known_N] = np.eye(n_classes)[label_N[known_N]]
        columns = [batch["row"], batch["text"], pa.array(label_N), list_column(p_NC), batch["weight"]]
        return pa.table(columns, schema=ROUND)


def read_calibrator(store: RunStore, config: Config) -> Calibrator | None:
    """A run's calibrator; None if it has not been fitted yet."""
    if store.exists(CALIBRATION):
        return Calibrator.from_dict(store.read_json(CALIBRATION))
    if config.teacher.confidence.method in ("batch", "temperature"):
        return None
    return Calibrator(config.teacher.confidence.method)


def read_labels(store: RunStore, tickets: Iterable[int]) -> pa.Table:
    """LABELS of the given tickets; tickets without a file are skipped."""
    parts = [LABELS.empty_table()]
    for ticket in tickets:
        with suppress(FileNotFoundError):
            parts.append(store.read_table(ticket_file(LABELS_DIR, ticket)))
    return pa.concat_tables(parts)


def read_predictions(store: RunStore, round_number: int, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """int64[N], float64[N, C]: rows of test set and hold-out, and the student's answers after a round."""
    ranks = store.read_json(round_file(round_number, TRAINED))["ranks"]
    files = [predictions_file(round_number, rank, ranks) for rank in range(ranks)]
    table = pa.concat_tables([store.read_table(file) for file in files])
    return table["row"].to_numpy(), matrix_of(table["probs"], n_classes)


def trained_rows(store: RunStore) -> np.ndarray:
    """int64[M]: the rows in the batches of all rounds."""
    files = [round_file(k, BATCH) for k in range(len(store.folders(ROUNDS_DIR)))]
    found = [store.read_table(file, ["row"])["row"].to_numpy() for file in files if store.exists(file)]
    return np.concatenate([np.empty(0, dtype=np.int64), *found])


def list_column(matrix_NC: np.ndarray) -> pa.Array:
    """A float matrix as the ``probs`` column of the schemas."""
    n_rows, n_columns = matrix_NC.shape
    offsets = pa.array(np.arange(n_rows + 1, dtype=np.int32) * n_columns)
    return pa.ListArray.from_arrays(offsets, pa.array(matrix_NC.astype(np.float32).ravel()))


def matrix_of(column: pa.ChunkedArray, n_columns: int) -> np.ndarray:
    """float64[N, C]: a ``probs`` column as a matrix; the inverse of :func:`list_column`."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float64).reshape(-1, n_columns)


STRING_BYTES = 2**31 - 1
"""Bytes that one Arrow array of strings can hold."""


def take_rows(table: pa.Table, index_M: np.ndarray, limit: int = STRING_BYTES) -> pa.Table:
    """The rows at these positions. Table.take fails where a column has more than 2 GiB of text."""
    index = pa.array(index_M)
    if table.nbytes <= limit:
        return table.take(index)
    return pa.Table.from_arrays(
        [_take(column, index, limit) for column in table.columns], schema=table.schema
    )


def _take(column: pa.ChunkedArray, index: pa.Array, limit: int) -> pa.ChunkedArray:
    if not pa.types.is_string(column.type):
        return column.take(index)
    wide = column.cast(pa.large_string()).combine_chunks()
    # In pieces of half the limit, as a text may reach over the end of one. Each is taken by itself: a slice
    # of more than the limit cannot be cast back.
    length_M = pc.binary_length(wide).fill_null(0).take(index).to_numpy()
    starts = np.flatnonzero(np.diff(np.cumsum(length_M) // (limit // 2), prepend=-1)).tolist()
    pieces = [index.slice(start, end - start) for start, end in pairwise([*starts, len(index)])]
    return pa.chunked_array([wide.take(piece).cast(pa.string()) for piece in pieces], pa.string())


@dataclass(frozen=True)
class Shard:
    """One parquet file of EXAMPLES."""

    file: str
    rows: int


class Examples:
    """The texts of a run by row number: first the pool rows, then the rows of the test set."""

    def __init__(self, store: RunStore, pool: Sequence[Shard], test: Sequence[Shard] = ()) -> None:
        self.store = store
        self.shards = [*pool, *test]
        self.n_pool = sum(shard.rows for shard in pool)
        self.n_test = sum(shard.rows for shard in test)
        self._first_row = np.cumsum([0, *(shard.rows for shard in self.shards)])

    @classmethod
    def open(cls, store: RunStore) -> Examples:
        """Open the examples written by ``corpus.ingest``."""
        index = store.read_json(EXAMPLES_INDEX)
        return cls(store, *([Shard(**one) for one in index[part]] for part in ("pool", "test")))

    @property
    def n_rows(self) -> int:
        return self.n_pool + self.n_test

    @property
    def test_rows(self) -> np.ndarray:
        """int64[n_test]: the row numbers of the test set."""
        return np.arange(self.n_pool, self.n_rows)

    def read(self, rows: Iterable[int] | np.ndarray, columns: Sequence[str] = EXAMPLES.names) -> pa.Table:
        """The given rows, in the given order, with the columns ``row`` and ``columns``.

        Opens only the shards, and reads only the row groups, that contain one of them.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.n_rows):
            raise IndexError(f"rows {wanted.min()}..{wanted.max()} of {self.n_rows}")
        order = np.argsort(wanted, kind="stable")
        ascending = wanted[order]
        shard_of = np.searchsorted(self._first_row, ascending, side="right") - 1
        pieces = [
            self._read_shard(int(shard), ascending[shard_of == shard] - self._first_row[shard], columns)
            for shard in np.unique(shard_of)
        ]
        schema = pa.schema([EXAMPLES.field(name) for name in columns])
        table = pa.concat_tables(pieces) if pieces else schema.empty_table()
        table = table.add_column(0, NUMBERED_EXAMPLES.field("row"), [pa.array(ascending)])
        back = np.empty_like(order)
        back[order] = np.arange(order.size)
        return take_rows(table, back)

    @retried
    def _read_shard(self, shard: int, positions: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Rows of one shard at ascending positions (int64[n])."""
        path = self.store.path(self.shards[shard].file)
        with pq.ParquetFile(path, filesystem=self.store.fs) as file:
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
            group_start = np.cumsum([0, *sizes])
            group_of = np.searchsorted(group_start, positions, side="right") - 1
            groups = np.unique(group_of)
            table = file.read_row_groups(groups.tolist(), columns=list(columns))
        # Positions within the row groups that were read, which are now concatenated.
        read_start = np.cumsum([0, *(sizes[g] for g in groups)])[:-1]
        start_of_group = dict(zip(groups.tolist(), read_start - group_start[groups], strict=True))
        shift = np.array([start_of_group[g] for g in group_of.tolist()], dtype=np.int64)
        return take_rows(table, positions + shift)
