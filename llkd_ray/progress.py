"""Where a run stands, in memory and in the files of its rounds, which come first."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from llkd_ray import schemas
from llkd_ray.store import BATCH, ROUNDS_DIR, SCORES, SELECTED, TRAINED, RunStore, round_file
from llkd_ray.table import ScoreTable


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
        columns = [pa.array(column) for column in self.table.scores(k)]
        table = pa.Table.from_arrays(columns, schema=schemas.SCORES)
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
                scores = self.store.read_table(round_file(k, SCORES))
                self.table.restore_scores(k, *(column.to_numpy() for column in scores.columns))
            self.refreshed.add(k)
        if self.store.exists(round_file(k, SELECTED)):
            if not in_table:
                batch = self.store.read_table(round_file(k, BATCH), ["row"])
                self.table.mark_trained(k, batch["row"].to_numpy())
            self.selected[k] = self.store.read_json(round_file(k, SELECTED))
        if self.store.exists(round_file(k, TRAINED)):
            self.trained[k] = self.store.read_json(round_file(k, TRAINED))
