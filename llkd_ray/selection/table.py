"""The score table: the state of every text, one dense numpy column for each signal.

Columns are indexed by row number, so an update is one indexed assignment. All updates are idempotent: the
first label of a row stays. A row takes 20 bytes, and queries process the columns in chunks, so that
100 million rows fit in one process. A call never names a row twice. This module does not use Ray.

Sums of floats depend on the order of addition, and so on the chunks; sums of integers do not.

Shapes in names: N texts, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from llkd_ray.metrics.uncertainty import Floats, Ints, Mask, StudentScores

NONE = -1
HELD_OUT = -2
"""In the column ``trained``: labelled by the teacher, never trained on."""
COLUMNS = ("label", "confidence", "uncertainty", "margin", "support", "refreshed", "trained", "ticket")
_ROWS_A_STEP = 1 << 20
Part = slice


@dataclass(frozen=True)
class Candidates:
    """Labelled texts that the student has not trained on, one entry per text."""

    row_N: Ints
    label_N: Ints
    confidence_N: Floats
    """The teacher's confidence in ``label_N``."""
    uncertainty_N: Floats
    """The student's entropy, in [0, 1]; nan where it has not scored the text."""
    margin_N: Floats
    """The student's best probability minus its second, in [0, 1]; nan where it has not scored the text."""
    support_N: Floats
    """The student's probability of ``label_N``; nan where it has not scored the text."""
    n_classes: int

    def __len__(self) -> int:
        return int(self.row_N.size)

    def take(self, index_M: Ints | slice) -> Candidates:
        """The candidates at these positions, in this order."""
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
        """In ascending row order, so that a choice does not depend on the order of input."""
        if (self.row_N[1:] > self.row_N[:-1]).all():
            return self
        return self.take(np.argsort(self.row_N, kind="stable"))


@dataclass(frozen=True)
class Unread:
    """Pool texts without a ticket, one entry per text, by row."""

    row_N: Ints
    uncertainty_N: Floats
    """The student's entropy, in [0, 1]; nan where it has not scored the text."""
    margin_N: Floats
    """The student's best probability minus its second, in [0, 1]; nan where it has not scored the text."""

    def __len__(self) -> int:
        return int(self.row_N.size)

    def take(self, index_M: Ints | slice) -> Unread:
        """The texts at these positions, in this order."""
        return Unread(self.row_N[index_M], self.uncertainty_N[index_M], self.margin_N[index_M])


class ScoreTable:
    """One entry for each row of the run: the pool, then the test set.

    Rounds are numbered up to 32,767, labels up to 32,766, tickets up to 2,147,483,647.
    """

    def __init__(self, n_classes: int, n_pool: int, n_test: int = 0) -> None:
        self.n_classes = n_classes
        n_rows = n_pool + n_test
        self.n_pool = n_pool
        self.label = np.full(n_rows, NONE, dtype=np.int16)
        # The sign encodes the label's teacher: negative for all but the first teacher of a cascade.
        self.confidence = np.full(n_rows, np.nan, dtype=np.float32)
        self.uncertainty = np.full(n_rows, UNKNOWN, dtype=np.uint16)  # see to_16_bits
        self.margin = np.full(n_rows, np.nan, dtype=np.float16)
        self.support = np.full(n_rows, np.nan, dtype=np.float16)
        self.refreshed = np.full(n_rows, NONE, dtype=np.int16)
        self.trained = np.full(n_rows, NONE, dtype=np.int16)
        self.ticket = np.full(n_rows, NONE, dtype=np.int32)
        self._count()

    def __len__(self) -> int:
        return int(self.label.size)

    @property
    def nbytes(self) -> int:
        """Size of the columns: 20 bytes per row."""
        return sum(getattr(self, name).nbytes for name in COLUMNS)

    # --- updates -------------------------------------------------------------------------------------

    def hold_out(self, row_M: Ints) -> None:
        """Permanently exclude these rows, none of which is trained on, from training."""
        self.trained[row_M] = HELD_OUT

    def lease(self, ticket: int, row_M: Ints) -> None:
        """Assign these rows to a ticket; they are no longer unread."""
        self.ticket[row_M] = ticket

    def put_labels(self, row_M: Ints, label_M: Ints, confidence_M: Floats, member_M: Ints) -> int:
        """Store a teacher's labels and return how many rows are new. The first label of a row stays.

        ``member_M`` is the teacher's index in the cascade, 0 for the first.
        """
        new = self.label[row_M] == NONE
        fresh = row_M[new]
        self.label[fresh] = label_M[new]
        self.confidence[fresh] = _signed(confidence_M[new], member_M[new])
        self._n_labelled += int(np.count_nonzero(fresh < self.n_pool))
        self._trained_C += self._by_class(label_M[new][self.trained[fresh] >= 0])
        return int(fresh.size)

    def relabel(self, row_M: Ints, label_M: Ints, confidence_M: Floats, member_M: Ints) -> int:
        """Replace labels by those of a better teacher; returns 0, because no row is new.

        The support of the old label is dropped: the student has to score the row again.
        """
        is_trained_M = self.trained[row_M] >= 0
        self._trained_C += self._by_class(label_M[is_trained_M])
        self._trained_C -= self._by_class(self.label[row_M][is_trained_M])
        self.label[row_M] = label_M
        self.confidence[row_M] = _signed(confidence_M, member_M)
        self.support[row_M] = np.nan
        return 0

    def refresh(self, round_number: int, row_M: Ints, scores: StudentScores) -> None:
        """Store the student's scores before ``round_number``; those of an older round change nothing.

        Where a row's label has changed since, its support is unknown.
        """
        newer = self.refreshed[row_M] <= round_number
        row_M, scores = row_M[newer], scores.take(newer)
        same_label = self.label[row_M] == scores.label_M
        self.uncertainty[row_M] = to_16_bits(scores.uncertainty_M)
        self.margin[row_M] = scores.margin_M
        self.support[row_M] = np.where(same_label, scores.support_M, np.nan)
        self.refreshed[row_M] = round_number

    def mark_trained(self, round_number: int, row_M: Ints) -> None:
        """Store the first round that trains on these rows."""
        first = row_M[self.trained[row_M] == NONE]
        self.trained[first] = round_number
        self._n_trained += int(first.size)
        self._trained_C += self._by_class(self.label[first])

    # --- queries -------------------------------------------------------------------------------------

    def held_out(self) -> Ints:
        """int64[M], ascending: the rows that the student never trains on."""
        return self._rows(lambda part: self.trained[part] == HELD_OUT, self.n_pool)

    def contradicted(self, lead: float, limit: int) -> Ints:
        """int64[M], ascending: untrained pool rows whose label by the first teacher a student contradicts.

        The margin of its best label is above ``lead``, which is at least 0.5, and that label differs from the
        teacher's: a label with less support than that cannot be the best. At most ``limit`` rows, those with
        the largest margins.
        """

        def is_contradicted(part: Part) -> Mask:
            by_first = self._is_open(part) & ~np.signbit(self.confidence[part])
            return by_first & (self.margin[part] > lead) & (self.support[part] < lead)

        row_N = self._rows(is_contradicted, self.n_pool)
        surest = np.argsort(-self.margin[row_N], kind="stable")[:limit]
        return np.sort(row_N[surest])

    def scores(self, round_number: int) -> tuple[Ints, StudentScores]:
        """Rows that the student scored before a round, and their scores."""
        row_M = self._rows(lambda part: self.refreshed[part] == round_number, len(self))
        uncertainty_M = from_16_bits(self.uncertainty[row_M])
        return row_M, StudentScores(self.label[row_M], uncertainty_M, self.margin[row_M], self.support[row_M])

    def unread(self) -> Unread:
        """Pool texts without a ticket, by row. All at once: for large pools, use :meth:`unread_chunks`."""
        return self._unread(self._rows(self._is_unread, self.n_pool))

    def unread_chunks(self) -> Chunked[Unread]:
        """As :meth:`unread`, a chunk at a time; each is valid until the table changes."""
        return Chunked(lambda: map(self._unread, self._chunks(self._is_unread, self.n_pool)))

    def untrained(self) -> Ints:
        """int64[N]: pool rows, labelled or not, that the student may still train on."""
        return self._rows(self._is_open, self.n_pool)

    def candidates(self, tickets_below: int) -> Candidates:
        """Labelled, untrained pool rows of the tickets below a number, ascending.

        The bound makes a round depend only on the tickets it waited for, not on others that happen to be
        finished. All at once: for large pools, use :meth:`candidate_chunks`.
        """
        return self._candidates(self._rows(self._may_be_chosen(tickets_below), self.n_pool))

    def candidate_chunks(self, tickets_below: int) -> Chunked[Candidates]:
        """As :meth:`candidates`, a chunk at a time; each is valid until the table changes."""
        may_be_chosen = self._may_be_chosen(tickets_below)
        return Chunked(lambda: map(self._candidates, self._chunks(may_be_chosen, self.n_pool)))

    def candidate_sample(self, tickets_below: int, step: int) -> Candidates:
        """Those of :meth:`candidates` that are among every ``step``-th row of the pool."""
        row_N = np.arange(0, self.n_pool, step)
        labelled_N = (self.label[row_N] != NONE) & (self.ticket[row_N] < tickets_below)
        return self.look_up(row_N[labelled_N & (self.trained[row_N] == NONE)])

    def look_up(self, row_M: Ints) -> Candidates:
        """Some rows that have a label."""
        return self._candidates(row_M)

    def labelled_of_class(self, tickets_below: int) -> Ints:
        """int64[C]: pool texts of each pseudo-class, of the tickets below a number."""
        count_C = np.zeros(self.n_classes, dtype=np.int64)
        for part in slices(self.n_pool):
            is_labelled = (self.label[part] != NONE) & (self.ticket[part] < tickets_below)
            count_C += np.bincount(self.label[part][is_labelled], minlength=self.n_classes)
        return count_C

    def trained_of_class(self) -> Ints:
        """int64[C]: texts of each pseudo-class that the student has trained on."""
        return self._trained_C.copy()

    def count_labelled(self) -> int:
        """Rows of the pool, hold-out included, that the teacher has labelled."""
        return self._n_labelled

    def count_trained(self) -> int:
        return self._n_trained

    # --- snapshots -----------------------------------------------------------------------------------------

    def copy_into(self, columns: dict[str, NDArray[Any]]) -> Iterator[None]:
        """Copy the columns in steps of a million rows, so that other calls are processed in between.

        Every row is consistent, but rows are from different moments: updates made from the first step on
        have to be repeated on top of the snapshot. They are idempotent, so extra repetitions do no harm.
        """
        columns.update({name: np.empty_like(getattr(self, name)) for name in COLUMNS})
        for start in range(0, len(self), _ROWS_A_STEP):
            part = slice(start, start + _ROWS_A_STEP)
            for name in COLUMNS:
                columns[name][part] = getattr(self, name)[part]
            yield

    def restore(self, columns: Mapping[str, NDArray[Any]]) -> None:
        """Load a snapshot of this table or one of the same size; the table takes over its arrays.

        Raises ValueError where its columns are not those of this table.
        """
        for name in COLUMNS:
            own, other = getattr(self, name), columns.get(name)
            if other is None or (other.dtype, other.shape) != (own.dtype, own.shape):
                found = "missing" if other is None else f"{other.dtype}[{other.size}]"
                raise ValueError(
                    f"snapshot column {name} is {found}, the table's is {own.dtype}[{own.size}]: "
                    "leave the snapshot out and rebuild the table from labels and rounds"
                )
        for name in COLUMNS:
            setattr(self, name, columns[name])
        self._count()

    # --- inside --------------------------------------------------------------------------------------------

    def _count(self) -> None:
        """Recompute the counts that updates maintain from the columns."""
        self._n_labelled = self._n_trained = 0
        self._trained_C = np.zeros(self.n_classes, dtype=np.int64)
        for part in slices(len(self)):
            label, is_trained = self.label[part], self.trained[part] >= 0
            pool = max(0, self.n_pool - part.start)
            self._n_labelled += int(np.count_nonzero(label[:pool] != NONE))
            self._n_trained += int(np.count_nonzero(is_trained))
            self._trained_C += self._by_class(label[is_trained])

    def _by_class(self, label_M: Ints) -> Ints:
        """int64[C]: the number of these labels per class; NONE belongs to no class."""
        return np.bincount(label_M[label_M != NONE], minlength=self.n_classes)

    def _is_open(self, part: Part) -> Mask:
        return np.equal(self.trained[part], NONE)

    def _is_unread(self, part: Part) -> Mask:
        return (self.ticket[part] == NONE) & (self.trained[part] != HELD_OUT)

    def _may_be_chosen(self, tickets_below: int) -> Callable[[Part], Mask]:
        def may_be_chosen(part: Part) -> Mask:
            labelled = (self.label[part] != NONE) & (self.ticket[part] < tickets_below)
            return labelled & self._is_open(part)

        return may_be_chosen

    def _rows(self, mask: Callable[[Part], Mask], stop: int) -> Ints:
        """int64[M], ascending: the rows below ``stop`` where a mask holds."""
        # Counted first, so that no other array is as long as the result.
        row_M = np.empty(sum(np.count_nonzero(mask(part)) for part in slices(stop)), dtype=np.int64)
        at = 0
        for part in slices(stop):
            found = np.flatnonzero(mask(part))
            row_M[at : at + found.size] = found + part.start
            at += found.size
        return row_M

    def _chunks(self, mask: Callable[[Part], Mask], stop: int) -> Iterator[Ints | Part]:
        """The same in chunks: row numbers, or a slice where the mask holds for all of it."""
        for part in slices(stop):
            found = np.flatnonzero(mask(part))
            yield part if found.size == part.stop - part.start else found + part.start

    def _unread(self, rows: Ints | Part) -> Unread:
        return Unread(_numbers(rows), from_16_bits(self.uncertainty[rows]), self.margin[rows])

    def _candidates(self, rows: Ints | Part) -> Candidates:
        return Candidates(
            _numbers(rows),
            self.label[rows],
            np.abs(self.confidence[rows]),
            from_16_bits(self.uncertainty[rows]),
            self.margin[rows],
            self.support[rows],
            self.n_classes,
        )


def _numbers(rows: Ints | Part) -> Ints:
    return np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows


def _signed(confidence_M: Floats, member_M: Ints) -> Floats:
    """Confidences, negative for any but the first teacher of a cascade."""
    return np.where(np.asarray(member_M) > 0, -confidence_M, confidence_M)


CHUNK = 1 << 16
"""Rows looked at together. Results do not depend on it; sums by class need 2**20 at most.

With four times as many, counting grades took three times as long a row."""


def slices(n: int) -> Iterator[slice]:
    """``range(n)`` in chunks; one empty chunk if ``n`` is 0."""
    for start in range(0, max(n, 1), CHUNK):
        yield slice(start, min(start + CHUNK, n))


class Texts(Protocol):
    """Columns over some texts."""

    def __len__(self) -> int: ...


T = TypeVar("T", bound=Texts)


class Chunked(Generic[T]):
    """Texts in ascending row order, read chunk by chunk at each iteration and never all in memory."""

    def __init__(self, read: Callable[[], Iterable[T]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[T]:
        return iter(self._read())

    def __len__(self) -> int:
        return sum(len(chunk) for chunk in self)


UNIT = 2.0**-32
"""Unit of sums. Any float32 from 2**-9 on is a multiple of it; int64 holds a sum of two billion ones."""
UNKNOWN = np.uint16(65535)
"""Represents nan in 16 bits."""
_STEPS = 65534
# A look-up table is as fast as the division, and nan needs no second pass.
_SHARE_OF_CODE = np.append(np.arange(65535) / _STEPS, np.nan).astype(np.float32)


def to_16_bits(share_N: Floats) -> NDArray[np.uint16]:
    """uint16[N]: the nearest of 65,535 values in [0, 1], off by 1/131,068 at most; nan stays nan."""
    code_N = np.rint(np.asarray(share_N, dtype=np.float64) * _STEPS)
    return np.where(np.isnan(code_N), UNKNOWN, np.nan_to_num(code_N)).astype(np.uint16)


def from_16_bits(code_N: NDArray[np.uint16]) -> NDArray[np.float32]:
    """float32[N]: the input of :func:`to_16_bits`, to half a step; converting it back gives the same code."""
    return _SHARE_OF_CODE.take(code_N)


def class_sums(signal_N: Floats, label_N: Ints, n_classes: int) -> NDArray[np.int64]:
    """int64[C]: the sum of a signal in [0, 1] over each label's texts, in units of :data:`UNIT`."""
    sum_C = np.zeros(n_classes, dtype=np.int64)
    for part in slices(label_N.size):
        # bincount adds in float64, which is exact up to 2**53: a chunk's sum is at most 2**48.
        units_N = np.rint(signal_N[part] * np.float64(1 / UNIT))
        sum_C += np.bincount(label_N[part], weights=units_N, minlength=n_classes).astype(np.int64)
    return sum_C
