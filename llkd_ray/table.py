"""The score table: what is known of every text, in one dense numpy column each.

Columns are indexed by row number, so an update is one fancy assignment. All updates are idempotent:
a label, once there, stays. 24 bytes a row. No Ray here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llkd_ray.signals import Floats, Ints, entropy, margin, support

NONE = -1

HOLDOUT = 1
"""Flag: the teacher labels it, the student never trains on it."""
TEST = 2
"""Flag: a row of the test set."""


@dataclass(frozen=True)
class Candidates:
    """Labelled texts that the student has not trained on, one entry a text."""

    row_N: Ints
    label_N: Ints
    confidence_N: Floats
    """The teacher's confidence in ``label_N``."""
    uncertainty_N: Floats
    """The student's entropy, in [0, 1]; nan where it has not scored the text."""
    margin_N: Floats
    """The student's best probability less its second, in [0, 1]; nan where it has not scored the text."""
    support_N: Floats
    """The student's probability of ``label_N``; nan where it has not scored the text."""
    n_classes: int

    def __len__(self) -> int:
        return int(self.row_N.size)

    def take(self, index_M: Ints) -> Candidates:
        """The candidates at these places, in this order."""
        return Candidates(
            self.row_N[index_M],
            self.label_N[index_M],
            self.confidence_N[index_M],
            self.uncertainty_N[index_M],
            self.margin_N[index_M],
            self.support_N[index_M],
            self.n_classes,
        )

    def by_row(self) -> Candidates:
        """In ascending row order, so that a choice does not depend on how they came."""
        return self.take(np.argsort(self.row_N, kind="stable"))


@dataclass(frozen=True)
class Unread:
    """Pool texts that no ticket has, one entry a text, by row."""

    row_N: Ints
    uncertainty_N: Floats
    """The student's entropy, in [0, 1]; nan where it has not scored the text."""
    margin_N: Floats
    """The student's best probability less its second, in [0, 1]; nan where it has not scored the text."""

    def __len__(self) -> int:
        return int(self.row_N.size)

    def take(self, index_M: Ints) -> Unread:
        """The texts at these places, in this order."""
        return Unread(self.row_N[index_M], self.uncertainty_N[index_M], self.margin_N[index_M])


class ScoreTable:
    """One entry for each row of the run, pool first and test set behind it."""

    def __init__(self, n_classes: int, n_pool: int, n_test: int = 0) -> None:
        self.n_classes = n_classes
        n_rows = n_pool + n_test
        self.n_pool = n_pool
        self.label = np.full(n_rows, NONE, dtype=np.int16)
        self.confidence = np.full(n_rows, np.nan, dtype=np.float32)
        self.member = np.full(n_rows, NONE, dtype=np.int8)  # which teacher of a cascade gave the label
        self.uncertainty = np.full(n_rows, np.nan, dtype=np.float32)
        self.margin = np.full(n_rows, np.nan, dtype=np.float16)
        self.support = np.full(n_rows, np.nan, dtype=np.float16)
        self.refreshed = np.full(n_rows, NONE, dtype=np.int16)
        self.trained = np.full(n_rows, NONE, dtype=np.int16)
        self.ticket = np.full(n_rows, NONE, dtype=np.int32)
        self.flags = np.zeros(n_rows, dtype=np.uint8)
        self.flags[n_pool:] = TEST

    def __len__(self) -> int:
        return int(self.label.size)

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in vars(self).values() if isinstance(column, np.ndarray))

    def hold_out(self, row_M: Ints) -> None:
        """Keep these rows from training for good."""
        self.flags[row_M] |= HOLDOUT

    def lease(self, ticket: int, row_M: Ints) -> None:
        """Note that a ticket has these rows; they are not unread any more."""
        self.ticket[row_M] = ticket

    def put_labels(self, row_M: Ints, label_M: Ints, confidence_M: Floats, member_M: Ints) -> int:
        """Note what a teacher said and return how many rows are new. The first answer stays."""
        new = self.label[row_M] == NONE
        fresh = row_M[new]
        self.label[fresh] = label_M[new]
        self.confidence[fresh] = confidence_M[new]
        self.member[fresh] = member_M[new]
        return int(fresh.size)

    def relabel(self, row_M: Ints, label_M: Ints, confidence_M: Floats, member_M: Ints) -> int:
        """Note what a better teacher said of rows that have a label; returns 0, for none is new.

        What the student said of the old label goes: it has to look again.
        """
        self.label[row_M] = label_M
        self.confidence[row_M] = confidence_M
        self.member[row_M] = member_M
        self.support[row_M] = np.nan
        return 0

    def contradicted(self, lead: float, limit: int) -> Ints:
        """int64[M], ascending: untrained pool rows whose label by the first teacher a student contradicts.

        Its best answer leads by more than ``lead``, which is 0.5 at least, and is another label: a label with
        less support than the lead cannot be the best. Of more than ``limit``, the largest leads.
        """
        row_N = self.untrained()
        contradicts = (self.member[row_N] == 0) & (self.margin[row_N] > lead) & (self.support[row_N] < lead)
        row_N = row_N[contradicts]
        surest = np.argsort(-self.margin[row_N], kind="stable")[:limit]
        return np.sort(row_N[surest])

    def refresh(self, round_number: int, row_M: Ints, p_MC: Floats) -> None:
        """Note the student's answers before ``round_number``; an older round changes nothing."""
        newer = self.refreshed[row_M] <= round_number
        row_M, p_MC = row_M[newer], p_MC[newer]
        label_M = self.label[row_M]
        self.uncertainty[row_M] = entropy(p_MC)
        self.margin[row_M] = margin(p_MC)
        self.support[row_M] = np.where(label_M == NONE, np.nan, support(p_MC, label_M))
        self.refreshed[row_M] = round_number

    def restore_scores(self, round_number: int, row_M: Ints, *signals_M: Floats) -> None:
        """Note what :meth:`scores` once gave: uncertainty, margin and support of some rows."""
        self.uncertainty[row_M], self.margin[row_M], self.support[row_M] = signals_M
        self.refreshed[row_M] = round_number

    def scores(self, round_number: int) -> tuple[Ints, Floats, Floats, Floats]:
        """Rows that the student scored before a round, with their uncertainty, margin and support."""
        row_M = np.flatnonzero(self.refreshed == round_number)
        return row_M, self.uncertainty[row_M], self.margin[row_M], self.support[row_M]

    def mark_trained(self, round_number: int, row_M: Ints) -> None:
        """Note the first round that trains on these rows."""
        first = self.trained[row_M] == NONE
        self.trained[row_M[first]] = round_number

    def unread(self) -> Unread:
        """Pool texts without a ticket, by row."""
        pool = slice(0, self.n_pool)
        row_N = np.flatnonzero((self.ticket[pool] == NONE) & (self.flags[pool] == 0))
        return Unread(row_N, self.uncertainty[row_N], self.margin[row_N])

    def untrained(self) -> Ints:
        """int64[N]: pool rows, labelled or not, that the student may still come to train on."""
        pool = slice(0, self.n_pool)
        return np.flatnonzero((self.trained[pool] == NONE) & (self.flags[pool] == 0))

    def candidates(self, tickets_below: int) -> Candidates:
        """Labelled, untrained pool rows of the tickets below a number, ascending.

        The bound makes a round depend on the tickets it waited for, and not on what else the teacher
        happened to have finished by then.
        """
        pool = slice(0, self.n_pool)
        labelled = (self.label[pool] != NONE) & (self.ticket[pool] < tickets_below)
        row_N = np.flatnonzero(labelled & (self.trained[pool] == NONE) & (self.flags[pool] == 0))
        return Candidates(
            row_N,
            self.label[row_N],
            self.confidence[row_N],
            self.uncertainty[row_N],
            self.margin[row_N],
            self.support[row_N],
            self.n_classes,
        )

    def labelled_of_class(self, tickets_below: int) -> Ints:
        """int64[C]: pool texts of each pseudo-class, of the tickets below a number."""
        label_N = self.label[: self.n_pool]
        is_there_N = (label_N != NONE) & (self.ticket[: self.n_pool] < tickets_below)
        return np.bincount(label_N[is_there_N], minlength=self.n_classes)

    def trained_of_class(self) -> Ints:
        """int64[C]: texts of each pseudo-class that the student has trained on."""
        return np.bincount(self.label[self.trained != NONE], minlength=self.n_classes)

    def count_labelled(self) -> int:
        """Rows of the pool, hold-out included, that the teacher has labelled."""
        return int(np.count_nonzero(self.label[: self.n_pool] != NONE))

    def count_trained(self) -> int:
        return int(np.count_nonzero(self.trained != NONE))
