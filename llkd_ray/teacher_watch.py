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
        self._undone: set[tuple[int, str]] = set()
        """Tickets and the actors that have given them back."""
        self._lost: dict[str, dict[str, str]] = {name: {} for name in self.members}
        self._last_sign = time.monotonic()

    def leased(self, ticket: int) -> None:
        self._sign()
        self._under_way.add(ticket)

    def finished(self, ticket: int) -> None:
        self._sign()
        self._under_way.discard(ticket)

    def lost(self, ticket: int, teacher: str, actor: str, reason: str) -> None:
        """An actor that has given up gives its ticket back; coming twice with one changes nothing."""
        self._sign()
        self._lost[teacher][actor] = reason
        if ticket in self._under_way and (ticket, actor) not in self._undone:
            self._undone.add((ticket, actor))
            self._under_way.discard(ticket)
            self.given_back.append(ticket)

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
