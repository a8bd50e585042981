"""What people were asked about a run's texts, and what they said; and what that changes in a round.

    audit/asked.parquet       the rows that were written out, with teacher's and student's answers of then
    audit/answers.parquet     what people said of them
    audit/estimate.json       what the random sample says of the pseudo-labels
    rounds/k/audited.parquet  the answers that round k was scored and selected by

A person's label takes the place of the teacher's, with confidence 1, from the next start of the run on. It
is kept with each round that knows it, so that a round that is trained again is trained on the same labels.
Shapes in names: M rows, C labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from llkd_ray import schemas
from llkd_ray.signals import Ints
from llkd_ray.store import RunStore, list_column, matrix_of, round_file

ASKED = "audit/asked.parquet"
ANSWERS = "audit/answers.parquet"
ESTIMATE = "audit/estimate.json"
AUDITED = "audited.parquet"
"""In a round's folder."""


@dataclass(frozen=True)
class AuditAnswers:
    """Labels that people gave, by row, ascending."""

    row_M: Ints
    label_M: Ints

    @classmethod
    def of(cls, by_row: dict[int, int]) -> AuditAnswers:
        """From the label of each row."""
        rows = sorted(by_row)
        return cls(np.array(rows, dtype=np.int64), np.array([by_row[row] for row in rows], dtype=np.int16))

    @classmethod
    def read(cls, store: RunStore, file: str = ANSWERS) -> AuditAnswers:
        """Those of a file; none where there is no file."""
        if not store.exists(file):
            return cls.of({})
        table = store.read_table(file)
        return cls(table["row"].to_numpy(), table["label"].to_numpy())

    @classmethod
    def of_round(cls, store: RunStore, round_number: int) -> AuditAnswers:
        """Those that a round was scored and selected by."""
        return cls.read(store, round_file(round_number, AUDITED))

    def __len__(self) -> int:
        return int(self.row_M.size)

    def by_row(self) -> dict[int, int]:
        return dict(zip(self.row_M.tolist(), self.label_M.tolist(), strict=True))

    def write(self, store: RunStore, file: str = ANSWERS) -> None:
        columns = [pa.array(self.row_M, pa.int64()), pa.array(self.label_M, pa.int16())]
        store.write_table(file, pa.Table.from_arrays(columns, schema=schemas.AUDIT_ANSWERS))

    def keep_for(self, store: RunStore, round_number: int) -> None:
        """Put them beside a round that is scored or selected by them; nothing where nobody was asked."""
        if len(self):
            self.write(store, round_file(round_number, AUDITED))

    def correct(self, batch: pa.Table, n_classes: int) -> pa.Table:
        """A ROUND with these labels in place of the teacher's, all of their probability on them."""
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
        return pa.table(columns, schema=schemas.ROUND)
