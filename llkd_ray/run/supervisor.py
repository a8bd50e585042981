"""Supervises selector, teacher stream and training run: waiting for one ends when another fails."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayTaskError

from llkd_ray.cluster import Background
from llkd_ray.config.base import ConfigError
from llkd_ray.config.schedule import Schedule
from llkd_ray.config.schema import Config
from llkd_ray.display import Display
from llkd_ray.evaluation.teacher_check import ENOUGH, check_labels
from llkd_ray.run.progress import Gauges, RunStatus, ThroughputMeter, budget_left, seconds_left
from llkd_ray.selection.recovery import delete_snapshots
from llkd_ray.selection.selector import start_selector
from llkd_ray.storage.lock import Session
from llkd_ray.storage.run_dir import LABELS_DIR, TEACHER_CHECK, RunStore, ticket_of
from llkd_ray.student.ray_train import start_training
from llkd_ray.teacher.base import TeacherDown, Usage
from llkd_ray.teacher.stream import spare_tickets, start_stream

POLL_S = 0.25
STREAM_ENDS_S = 30.0
"""Seconds that the teacher stream may take to end after the selector was killed."""


class Run:
    """Context manager for the selector, teacher stream and training run of one distillation.

    All of them are stopped on exit.
    """

    def __init__(
        self,
        config: Config,
        store: RunStore,
        session: Session,
        schedule: Schedule,
        display: Display,
        over: bool = False,
        lines: Sequence[dict[str, Any]] = (),
    ) -> None:
        """``over``: no rounds remain; ``lines``: metrics of finished rounds, which the caller extends."""
        self.config, self.store, self.session = config, store, session
        self.schedule, self.display, self.over = schedule, display, over
        self.teacher: Background | None = None
        self.student: Background | None = None
        self.lines = lines
        self.throughput = ThroughputMeter()
        self.gauges = Gauges(store.root.rpartition("/")[2] if store else "")
        self._asked: list[int] | None = None
        self._reported: set[str] = set()
        self._teacher_is_checked = store is not None and store.exists(TEACHER_CHECK)

    def __enter__(self) -> Run:
        delete_snapshots(self.store)
        self.selector = start_selector(self.config, self.store.uri(), self.session.id)
        try:
            self._start_others()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, kind: object = None, error: BaseException | None = None, trace: object = None) -> None:
        if error is not None:
            # Reported first, so that the reason is known even if the driver crashes during shutdown.
            self.display.say(f"stopping: {' '.join(str(error).split()) or type(error).__name__}")
        ray.kill(self.selector)
        # Pending calls fail now. Calls still pending when Ray shuts down can crash the driver.
        if self.teacher:
            self.teacher.wait(STREAM_ENDS_S)
        delete_snapshots(self.store)

    def _start_others(self) -> None:
        over = self.call("next_round") == self.schedule.rounds or self.over
        # At this point the selector has read all label files and moved damaged ones aside.
        self._asked = open_tickets(self.store, self.schedule, over)
        if self._asked:
            tickets = [*spare_tickets(self.config), *self._asked]
            self.teacher = start_stream(self.config, self.store.uri(), self.selector, tickets)
        if not over:
            self.student = start_training(self.config, self.store, self.selector)

    def call(self, method: str, *arguments: Any) -> Any:
        """The result of a selector call; raises an error of teacher or student if that occurs first."""
        answer = getattr(self.selector, method).remote(*arguments)
        while not ray.wait([answer], timeout=POLL_S)[0]:
            self._check()
        return ray.get(answer)

    def finish(self) -> None:
        """After the last round: let the teacher label hold-out and test set, and wait until all parts end."""
        self.call("finish")
        for part in (self.teacher, self.student):
            while part and not part.ended:
                self._check()
                time.sleep(POLL_S)
        self._check()

    def _check(self) -> None:
        self.session.check()
        for part in (self.teacher, self.student):
            if part and part.error:
                raise plain_error(part.error)
        stats = ray.get(self.selector.stats.remote())
        for line in stats["broken_files"]:
            if line not in self._reported:
                self.display.say(line)
                self._reported.add(line)
        if self._asked is not None and not set(stats["damaged"]) <= set(self._asked):
            # A restarted selector found the damage, but the stream's list of tickets is already fixed.
            raise TeacherDown("the label file of a ticket that was done is damaged")
        # Texts without a label count, too: a teacher that refuses all of them is to be noticed.
        asked = stats["tickets_done"] * self.config.teacher.ticket_size
        if not self._teacher_is_checked and max(stats["labelled"], asked / 2) >= ENOUGH:
            self._check_teacher()
        if stats["trouble"]:
            raise TeacherDown(stats["trouble"])
        if stats["student_failure"]:
            raise ConfigError(stats["student_failure"])
        self._show(stats)

    def _check_teacher(self) -> None:
        self._teacher_is_checked = True
        for line in check_labels(self.store, self.config.labels.names):
            if self.config.run.strict:
                raise ConfigError(f"run.strict: {line}")
            self.display.warn(line)

    def _show(self, stats: dict[str, Any]) -> None:
        """Publish the run's status on the display and in Ray's metrics."""
        now = time.monotonic()
        self.throughput.note(now, stats["labelled"], stats["teacher_tokens"])
        labels_a_second, tokens_a_second = self.throughput.rates()
        rounds = self.schedule.rounds
        status = RunStatus(
            labelled=stats["labelled"],
            to_label=self.schedule.labels + self.schedule.holdout,
            trained=stats["trained"],
            to_train=self.schedule.train,
            labels_a_second=labels_a_second,
            tokens=stats["teacher_tokens"],
            tokens_a_second=tokens_a_second,
            round_number=min(len(self.lines), rounds - 1),
            rounds=rounds,
            note=stats["note"],
            last=self.lines[-1] if self.lines else {},
            seconds_left=seconds_left(self.lines, rounds, self.throughput.in_round(now)),
            budget_left=self._budget_left(stats["usage"]),
        )
        self.gauges.show(status.numbers())
        self.display.update(status.line(), status.rows())

    def _budget_left(self, usage: dict[str, dict[str, Any]]) -> str:
        cap = self.config.budget.cap
        if cap.is_off:
            return ""
        members = dict(self.config.teacher.members())
        used = {name: Usage(**one) for name, one in usage.items()}
        spent = {
            "texts": float(sum(one.texts for one in used.values())),
            "tokens": float(sum(one.tokens for one in used.values())),
            "cost": float(sum(one.cost(members[name].price) for name, one in used.items())),
        }
        return budget_left(cap.model_dump(), spent, next(iter(members.values())).price.currency)


def open_tickets(store: RunStore, schedule: Schedule, over: bool) -> list[int]:
    """Tickets without a label file, in order; if no rounds remain, only those of hold-out and test set."""
    done = {ticket_of(name) for name in store.names(LABELS_DIR, ".parquet")}
    wanted = schedule.fixed_tickets() if over else schedule.in_order()
    return [ticket for ticket in wanted if ticket not in done]


def plain_error(error: BaseException) -> BaseException:
    """The ConfigError inside Ray's wrapper exceptions, if there is one; otherwise the error itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigError):
            return cause
        cause = cause.cause if isinstance(cause, RayTaskError) else cause.__cause__
    return error
