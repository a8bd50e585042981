"""How fast labels come in, by the driver's own watch: over a round, and lately."""

from __future__ import annotations

from collections import deque

WINDOW_S = 30.0
"""The rate is that of the last so many seconds."""
POINTS = 64
"""Moments of a round that are kept, of which there are half as many at least once the round is long."""


class Pace:
    """Moments at which something was looked at: seconds, labelled texts, tokens. Times are the caller's."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._round: list[tuple[float, int]] = []
        self._every, self._seen = 1, 0
        self._lately: deque[tuple[float, int, int]] = deque()
        self._last: tuple[float, int] | None = None

    def begin_round(self, now: float) -> None:
        self._began, self._round, self._every, self._seen = now, [], 1, 0
        if self._last:
            self._round.append((0.0, self._last[1]))

    def note(self, now: float, labelled: int, tokens: int) -> None:
        """So many texts are labelled by now, for so many tokens."""
        self._last = now, labelled
        self._lately.append((now, labelled, tokens))
        while now - self._lately[0][0] > WINDOW_S:
            self._lately.popleft()
        if self._began is None:
            return
        moment = now - self._began, labelled
        if len(self._round) > 1 and self._round[-1][1] == self._round[-2][1] == labelled:
            self._round[-1] = moment  # nothing happens: its begin and its end are enough
            return
        if self._seen % self._every == 0:
            self._round.append(moment)
        self._seen += 1
        if len(self._round) > POINTS:
            self._round, self._every = self._round[::2], self._every * 2

    def points(self) -> list[list[float]]:
        """Seconds since the round began and texts labelled by then, for the metrics."""
        found = list(self._round)
        if (
            self._last
            and self._began is not None
            and self._last[0] - self._began > (found or [(0, 0)])[-1][0]
        ):
            found.append((self._last[0] - self._began, self._last[1]))
        return [[round(seconds, 2), labelled] for seconds, labelled in found]

    def rates(self) -> tuple[float, float]:
        """Labels and tokens a second, lately; 0 before anything is known."""
        if len(self._lately) < 2:
            return 0.0, 0.0
        (first, labels, tokens), (last, more_labels, more_tokens) = self._lately[0], self._lately[-1]
        if last <= first:
            return 0.0, 0.0
        return (more_labels - labels) / (last - first), (more_tokens - tokens) / (last - first)

    def in_round(self, now: float) -> float:
        """Seconds since the round began; 0 before the first."""
        return 0.0 if self._began is None else now - self._began
