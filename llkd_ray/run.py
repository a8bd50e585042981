"""A run's three parts under watch: whoever waits for one hears at once when another has failed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayTaskError

from llkd_ray.answers import TeacherDown
from llkd_ray.cluster import Background
from llkd_ray.config import Config, ConfigError
from llkd_ray.console import Display
from llkd_ray.repair import put_aside_broken
from llkd_ray.schedule import Schedule
from llkd_ray.selector import start_selector
from llkd_ray.session import Session
from llkd_ray.store import LABELS_DIR, RunStore, ticket_of
from llkd_ray.teacher import spare_tickets, start_stream
from llkd_ray.training import start_training

POLL_S = 0.25


class Run:
    """Selector, teacher stream and training run of one distillation."""

    def __init__(
        self,
        config: Config,
        store: RunStore,
        store_uri: str,
        session: Session,
        schedule: Schedule,
        display: Display,
        over: bool = False,
    ):
        self.session, self.schedule, self.display = session, schedule, display
        self.teacher: Background | None = None
        self.student: Background | None = None
        put_aside_broken(store, display.say)  # before anybody reads them
        self.selector = start_selector(config, store_uri, session.id)
        first = self.call("next_round")
        over = over or first == schedule.rounds
        tickets = open_tickets(store, schedule, over)
        if tickets:
            self.teacher = start_stream(config, store_uri, self.selector, [*spare_tickets(config), *tickets])
        if not over:
            self.student = start_training(config, store, store_uri, self.selector)

    def call(self, method: str, *arguments: Any) -> Any:
        """The selector's answer; raises what broke in teacher or student if that comes first."""
        answer = getattr(self.selector, method).remote(*arguments)
        while not ray.wait([answer], timeout=POLL_S)[0]:
            self._check()
        return ray.get(answer)

    def finish(self) -> None:
        """No more rounds: let the teacher finish what is not for training, then let all go home."""
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
        if stats["trouble"]:
            raise TeacherDown(stats["trouble"])
        self.display.update(
            f"labelled {stats['labelled']} of {self.schedule.labels + self.schedule.holdout}, "
            f"trained on {stats['trained']} of {self.schedule.train}; {stats['note'] or 'starting'}"
        )


@contextmanager
def running(
    config: Config,
    store: RunStore,
    store_uri: str,
    session: Session,
    schedule: Schedule,
    display: Display,
    over: bool,
) -> Iterator[Run]:
    """The parts of a run whose rounds are over or not; nothing of them is left at the end."""
    run = Run(config, store, store_uri, session, schedule, display, over)
    try:
        yield run
    finally:
        ray.kill(run.selector)


def open_tickets(store: RunStore, schedule: Schedule, over: bool) -> list[int]:
    """Tickets without a label file, in their order; once no round comes, of hold-out and test set only."""
    done = {ticket_of(name) for name in store.names(LABELS_DIR, ".parquet")}
    wanted = schedule.fixed_tickets() if over else schedule.in_order()
    return [ticket for ticket in wanted if ticket not in done]


def plain_error(error: BaseException) -> BaseException:
    """The user's own mistake from under Ray's wrappers, if there is one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigError):
            return cause
        cause = cause.cause if isinstance(cause, RayTaskError) else cause.__cause__
    return error
