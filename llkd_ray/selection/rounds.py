"""A round's selection from the score table: the texts the student scores first, and the chosen texts.

Scoring every text is the largest cost of a round, and most texts have no chance of being selected. Where the
student scores only a share (``selection.refresh_share``), the policy chooses under an optimistic estimate of
the student's uncertainty: 1 for a text never scored, and for others increasing with the rounds since they
were scored. The texts it would choose first are scored. The random numbers are those of the selection itself,
so texts that the draw excludes are not scored either.

Shapes in names: N texts of a chunk, M texts of the round, C labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
import pyarrow as pa

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import Config
from llkd_ray.metrics.calibration import Calibrator
from llkd_ray.metrics.uncertainty import Floats, Ints, hash_uniform
from llkd_ray.selection.acquisition import AcquisitionPolicy
from llkd_ray.selection.policies import Selection, SelectionPolicy
from llkd_ray.selection.table import NONE, Candidates, Chunked, ScoreTable, Unread
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import LABELS_DIR, RunStore
from llkd_ray.storage.tables import AuditAnswers, Examples, list_column, matrix_of, read_labels

# First words of the generators' seeds, so that no two share a stream.
_SELECT_SEED, _SCORE_SEED = 3, 4
DECAY = 0.5
"""Factor on the student's certainty of a text for each round since it was scored."""
_TIE_BREAK = 1e-3


@dataclass(frozen=True)
class RoundSelection:
    """The selection of one round; depends only on config, policies and score table."""

    config: Config
    policy: SelectionPolicy
    acquisition: AcquisitionPolicy
    table: ScoreTable
    round_number: int
    tickets_below: int
    """The round may choose from the labels of these tickets."""

    def choose(self, n: int) -> Selection:
        """At most ``n`` texts to train on.

        Where the student scores only a share, texts without a score are excluded if the others are enough:
        they were not worth scoring, and a missing score would overrate them.
        """
        candidates = self.table.candidate_chunks(self.tickets_below)
        chosen = None
        if self.config.selection.refresh_share < 1:
            chosen = self._choose(_scored_only(candidates), n)
        if chosen is None or chosen.candidates < n:
            chosen = self._choose(candidates, n)
        return chosen

    def to_score(self) -> Ints:
        """int64[M], ascending: the rows that the student scores before the selection.

        Unread texts are included where acquisition uses the student.
        """
        settings = self.config.selection
        if settings.refresh_share == 1:
            if self.acquisition.uses_student:
                return self.table.untrained()
            return self.table.candidates(self.tickets_below).row_N
        optimistic = self._optimistic_candidates()
        rows = [self._choose(optimistic, ceil(settings.refresh_share * len(optimistic))).row_M]
        if self.acquisition.uses_student:
            unread = self._optimistic_unread()
            n = ceil(settings.refresh_share * len(unread))
            rng, seed = self._rng(_SCORE_SEED), self.config.run.seed
            rows.append(self.acquisition.choose(unread, n, rng, seed=seed))
        return np.sort(np.concatenate(rows))

    def staleness(self, row_M: Ints) -> dict[str, float | int | None]:
        """Age in rounds of the student's scores of some rows, and how many have no score.

        The mean is None where no row has a score.
        """
        refreshed_M = self.table.refreshed[row_M]
        scored = refreshed_M != NONE
        age_M = self.round_number - refreshed_M[scored].astype(np.int64)
        return {
            "mean_age": float(age_M.mean()) if age_M.size else None,
            "never_scored": int(np.count_nonzero(~scored)),
        }

    def _choose(self, candidates: Chunked[Candidates], n: int) -> Selection:
        return self.policy.choose(
            candidates,
            n,
            self._rng(_SELECT_SEED),
            quota=self.config.selection.quota,
            trained_C=self.table.trained_of_class(),
            options=self.config.selection.options,
        )

    def _rng(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.config.run.seed, purpose, self.round_number])

    def _optimistic_candidates(self) -> Chunked[Candidates]:
        """The candidates with the maximum uncertainty that the student might have about them now."""

        def read() -> Iterator[Candidates]:
            for chunk in self.table.candidate_chunks(self.tickets_below):
                decay_N, at_most_N = self._decay_and_uncertainty(chunk.row_N)
                yield replace(
                    chunk,
                    uncertainty_N=at_most_N - decay_N * (1.0 - _known(chunk.uncertainty_N)),
                    margin_N=1.0 - at_most_N + decay_N * _known(chunk.margin_N),
                    support_N=1.0 - decay_N * (1.0 - _known(chunk.support_N)),
                )

        return Chunked(read)

    def _optimistic_unread(self) -> Chunked[Unread]:
        """The unread texts with the same estimate."""

        def read() -> Iterator[Unread]:
            for chunk in self.table.unread_chunks():
                decay_N, at_most_N = self._decay_and_uncertainty(chunk.row_N)
                uncertainty_N = at_most_N - decay_N * (1.0 - _known(chunk.uncertainty_N))
                yield Unread(chunk.row_N, uncertainty_N, 1.0 - at_most_N + decay_N * _known(chunk.margin_N))

        return Chunked(read)

    def _decay_and_uncertainty(self, row_N: Ints) -> tuple[Floats, Floats]:
        """float64[N] each: the weight of the student's last score, and the uncertainty without one.

        The latter is 1, and randomly slightly less for a text without a score; otherwise row numbers would
        decide between such texts.
        """
        refreshed_N = self.table.refreshed[row_N].astype(np.int64)
        is_new_N = refreshed_N == NONE
        decay_N = np.where(is_new_N, 0.0, DECAY ** np.maximum(self.round_number - refreshed_N, 0.0))
        chance_N = hash_uniform(self.config.run.seed * 1_000 + self.round_number, row_N)
        return decay_N, 1.0 - np.where(is_new_N, _TIE_BREAK * chance_N, 0.0)


def _scored_only(chunks: Chunked[Candidates]) -> Chunked[Candidates]:
    """The candidates that the student has scored, in this round or before."""
    return Chunked(lambda: (chunk.take(np.flatnonzero(~np.isnan(chunk.uncertainty_N))) for chunk in chunks))


def _known(signal_N: Floats) -> Floats:
    return np.nan_to_num(signal_N.astype(np.float64))


def batch_of(
    chosen: Selection,
    store: RunStore,
    examples: Examples,
    table: ScoreTable,
    reviews: Iterable[int],
    calibrator: Calibrator,
    audited: AuditAnswers,
) -> pa.Table:
    """ROUND of the chosen texts; ``reviews`` are the tickets of all reviews so far.

    Raises :class:`ConfigError` where the files of labels are not those that the table was filled from.
    """
    row_M = np.asarray(chosen.row_M, dtype=np.int64)
    texts = examples.read(row_M, ["text"])["text"]
    # Reviews come last, because the last of several answers to a row counts.
    labels = read_labels(store, [*np.unique(table.ticket[row_M]).tolist(), *reviews])
    of_labels = labels["row"].to_numpy()
    by_row = np.argsort(of_labels, kind="stable")
    place_M = by_row[np.searchsorted(of_labels, row_M, side="right", sorter=by_row) - 1]
    p_MC = calibrator.apply(matrix_of(labels["probs"].take(pa.array(place_M)), table.n_classes))
    columns = [
        pa.array(row_M),
        texts,
        pa.array(table.label[row_M]),
        list_column(p_MC),
        pa.array(np.asarray(chosen.weight_M, dtype=np.float32)),
    ]
    batch = audited.correct(pa.Table.from_arrays(columns, schema=tables.ROUND), table.n_classes)
    # The files are what the table was filled from, unless somebody has changed them since.
    is_of_label_M = matrix_of(batch["probs"], table.n_classes).argmax(axis=1) == batch["label"].to_numpy()
    if not (is_of_label_M.all() and np.array_equal(of_labels[place_M], row_M)):
        raise ConfigError(
            f"{store.uri(LABELS_DIR)}: its files have changed since their labels were counted; resume the "
            "run, which reads them again"
        )
    return batch


SAMPLE_SIZE = 1_000
"""Of the selected texts, and about as many of the others."""


def sample_candidates(table: ScoreTable, tickets_below: int, candidates: int, chosen_M: Ints) -> pa.Table:
    """CANDIDATE_SAMPLE of a round, from the table before the round's texts are marked as trained on.

    ``candidates`` is their number. The sample is every n-th row, without random numbers. Only the report
    reads it.
    """
    chosen_M = np.asarray(chosen_M, dtype=np.int64)
    spread = np.linspace(0, chosen_M.size - 1, min(SAMPLE_SIZE, chosen_M.size)).round().astype(np.int64)
    seen = table.candidate_sample(tickets_below, step=max(1, candidates // SAMPLE_SIZE))
    others = seen.take(np.flatnonzero(~np.isin(seen.row_N, chosen_M)))
    parts = [(table.look_up(chosen_M[spread]), True), (others, False)]
    columns = [
        np.concatenate([getattr(part, name) for part, _ in parts])
        for name in ("row_N", "label_N", "confidence_N", "uncertainty_N", "support_N")
    ]
    columns.append(np.concatenate([np.full(len(part), is_chosen) for part, is_chosen in parts]))
    arrays = [pa.array(x, field.type) for x, field in zip(columns, tables.CANDIDATE_SAMPLE, strict=True)]
    return pa.Table.from_arrays(arrays, schema=tables.CANDIDATE_SAMPLE)
