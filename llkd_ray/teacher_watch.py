"""Who teaches, and whether it goes on: tickets under way, teachers that have given up."""

from __future__ import annotations

import time
from collections import deque

from llkd_ray.config import Config


class TeacherWatch:
    """Tickets at the teachers, those that came back undone, and the actors that gave up."""

    def __init__(self, config: Config) -> None:
        self.members = dict(config.teacher.members())
        self.given_back: deque[int] = deque()
        """Tickets that wait for another actor."""
        self._under_way: set[int] = set()
        self._calls: set[str] = set()
        """Those by which tickets came back: one that is repeated is known by it."""
        self._lost: dict[str, dict[str, str]] = {name: {} for name in self.members}
        self._last_sign = time.monotonic()

    def leased(self, ticket: int) -> None:
        self._sign()
        self._under_way.add(ticket)

    def finished(self, ticket: int) -> None:
        self._sign()
        self._under_way.discard(ticket)

    def lost(self, ticket: int, teacher: str, actor: str, reason: str, call: str) -> None:
        """An actor that has given up gives its ticket back; the same ``call`` again changes nothing.

        Another call of the same actor with the same ticket does: it works on several at a time, and while
        one of its places has given the ticket back, another may have been handed it.
        """
        self._sign()
        self._lost[teacher][actor] = reason
        if ticket in self._under_way and call not in self._calls:
            self._under_way.discard(ticket)
            if ticket not in self.given_back:  # a selector that begins anew hears of all calls at once
                self.given_back.append(ticket)
        self._calls.add(call)

    def all_lost(self) -> bool:
        """Whether some teacher has no actor left, so that its tickets can never be done.

        A pool that may grow replaces who has given up, until as many have as there may be.
        """
        return any(len(self._lost[name]) >= one.max_actors for name, one in self.members.items())

    def trouble(self) -> str | None:
        """Why teaching cannot go on, in a sentence for the user, or None."""
        for name, teacher in self.members.items():
            lost = self._lost[name]
            if len(lost) >= teacher.max_actors:
                who = "the teacher" if name == "teacher" else f"the {name} teacher"
                return f"{who} has given up, all {teacher.max_actors} actor(s): {_reasons(lost)}"
        quiet = time.monotonic() - self._last_sign
        patience = max(teacher.stall_s for teacher in self.members.values())
        waiting = len(self._under_way) + len(self.given_back)
        if waiting and quiet > patience:
            return (
                f"the teachers have made no progress for {quiet:.0f} s with {waiting} ticket(s) "
                "under way (teacher.stall_s): an actor waits for resources, or its node is lost"
                + "".join(f"; {len(lost)} gave up: {_reasons(lost)}" for lost in self._lost.values() if lost)
            )
        return None

    def _sign(self) -> None:
        self._last_sign = time.monotonic()


def _reasons(lost: dict[str, str]) -> str:
    """Why actors gave up, each reason once."""
    return "; ".join(dict.fromkeys(lost.values()))
