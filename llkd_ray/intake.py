"""What comes in from the teachers: made comparable by a calibrator that is fitted once, then noted.

Nothing counts as labelled before the calibrator is there, so that a label never changes after somebody has
acted on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from llkd_ray.answers import Usage, add_usages
from llkd_ray.confidence import MIN_GOLD, Calibrator
from llkd_ray.config import Config, ConfigError
from llkd_ray.label_files import TicketLabels
from llkd_ray.schedule import Schedule
from llkd_ray.signals import confidence
from llkd_ray.store import CALIBRATION, Examples, RunStore
from llkd_ray.table import ScoreTable

# First word of the seed of the generator that the hold-out is drawn by; the selector's others differ.
_HOLDOUT_SEED = 1


class Intake:
    """Tickets that are done, what they have used, and the calibrator between them and the score table."""

    def __init__(
        self, config: Config, store: RunStore, examples: Examples, schedule: Schedule, table: ScoreTable
    ) -> None:
        self.config = config.teacher.confidence
        self.store, self.examples, self.schedule, self.table = store, examples, schedule, table
        self.n_classes = table.n_classes
        self.done: set[int] = set()
        self.usage: dict[str, Usage] = {}
        self.unasked = 0
        self.calibrator = read_calibrator(store, config)
        self._waiting: dict[int, TicketLabels] = {}
        self._n_to_fit_on = 0
        """How many of those that wait the calibrator is fitted on."""

    def take(self, ticket: int, labels: TicketLabels) -> int:
        """Note a ticket's labels, whose file is in place, now or when the calibrator is fitted; a second time
        changes nothing. Returns how many rows are new in the table.
        """
        if ticket in self.done or ticket in self._waiting:
            return 0
        self.usage = add_usages(self.usage, labels.usage)
        self.unasked += labels.unasked
        if self.calibrator is not None:
            return self._note(ticket, labels)
        self._waiting[ticket] = labels
        fitted_on = self._fitted_on()
        self._n_to_fit_on += ticket in fitted_on
        if self._n_to_fit_on < len(fitted_on):
            return 0
        self.calibrator = self._fit()
        self.store.write_json(CALIBRATION, self.calibrator.as_dict())
        waiting, self._waiting = self._waiting, {}
        return sum(self._note(*one) for one in sorted(waiting.items()))

    def restore(self, tickets: Iterable[int], usage: Mapping[str, Usage], unasked: int) -> None:
        """These tickets, which have used so much, are done and in the table."""
        self.done.update(tickets)
        self.usage = add_usages(self.usage, usage)
        self.unasked += unasked

    def _note(self, ticket: int, labels: TicketLabels) -> int:
        assert self.calibrator is not None
        p_MC = self.calibrator.apply(labels.probs_MC)
        self.done.add(ticket)
        put = self.table.relabel if ticket in self.schedule.review_tickets else self.table.put_labels
        return put(labels.row_M, p_MC.argmax(axis=1), confidence(p_MC), labels.member_M)

    def _fitted_on(self) -> range:
        """The tickets whose answers the calibrator is fitted on: read before any student chose."""
        if self.config.method == "temperature":
            return self.schedule.holdout_tickets
        return range(self.schedule.tickets_before(0))

    def _fit(self) -> Calibrator:
        there = [self._waiting[ticket] for ticket in self._fitted_on()]
        row_M = np.concatenate([np.empty(0, dtype=np.int64), *(one.row_M for one in there)])
        mass_MC = np.concatenate([np.empty((0, self.n_classes)), *(one.probs_MC for one in there)])
        gold_M = self.examples.read(row_M, ["gold"])["gold"].to_numpy()
        try:
            return Calibrator.fit(self.config, mass_MC, gold_M)
        except ValueError as error:
            raise ConfigError(str(error)) from None


def read_calibrator(store: RunStore, config: Config) -> Calibrator | None:
    """A run's calibrator; None where it is yet to be fitted."""
    if store.exists(CALIBRATION):
        return Calibrator.from_dict(store.read_json(CALIBRATION))
    if config.teacher.confidence.method in ("batch", "temperature"):
        return None
    return Calibrator(config.teacher.confidence.method)


def draw_holdout(config: Config, examples: Examples, schedule: Schedule) -> np.ndarray:
    """int64[holdout], ascending: pool rows that the teacher labels and the student never trains on.

    Drawn at random by the run's seed; where a temperature is to be fitted on them, from the texts with known
    gold as far as there are. Raises :class:`ConfigError` where those are too few.
    """
    rng, n = np.random.default_rng([config.run.seed, _HOLDOUT_SEED]), schedule.holdout
    if config.teacher.confidence.method != "temperature":
        return np.sort(rng.choice(examples.n_pool, n, replace=False))
    gold_N = examples.read(np.arange(examples.n_pool), ["gold"])["gold"].to_numpy()
    known, others = np.flatnonzero(gold_N >= 0), np.flatnonzero(gold_N < 0)
    n_known = min(n, known.size)
    if n_known < MIN_GOLD:
        raise ConfigError(
            f"teacher.confidence.method 'temperature': {n_known} texts of the hold-out have known gold (the "
            f"pool has {known.size}, evaluation.holdout comes to {n}); give {MIN_GOLD} at least, or take "
            "'batch' or 'raw'"
        )
    drawn = [rng.choice(known, n_known, replace=False), rng.choice(others, n - n_known, replace=False)]
    return np.sort(np.concatenate(drawn))
