"""The status of a run: one line for a log, a few rows for a terminal, numbers for a dashboard.

The driver publishes all of them, so each has a single source even if actors restart. Ray prefixes metrics
with ``ray_``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.util.metrics import Counter, Gauge

from llkd_ray.display import count, duration, money, percent

BAR = 24
"""Width of a progress bar in characters."""


@dataclass(frozen=True)
class RunStatus:
    """A snapshot of a run. None means unknown or unlimited."""

    labelled: int
    to_label: int
    trained: int
    to_train: int
    labels_a_second: float
    tokens: int
    tokens_a_second: float
    round_number: int
    rounds: int
    note: str
    """The student's current activity."""
    last: dict[str, Any]
    """The metrics of the last finished round; empty before the first."""
    seconds_left: float | None
    budget_left: str
    """The remaining budget under the cap, as text; '' without a cap."""

    def line(self) -> str:
        """For a log."""
        rate = f", {self.labels_a_second:,.0f}/s" if self.labels_a_second >= 0.5 else ""
        trained = f"trained on {self.trained} of {self.to_train}"
        parts = [
            f"labelled {self.labelled} of {self.to_label}{rate}, {trained}",
            self.note or "starting",
        ]
        if self.budget_left:
            parts.append(f"left: {self.budget_left}")
        if self.seconds_left is not None:
            parts.append(f"about {_plain(duration(_rounded(self.seconds_left)))} to go")
        return "; ".join(parts)

    def rows(self) -> list[tuple[str, str]]:
        """For a terminal: name and state of each part."""
        tokens = f"{count(self.tokens)} tokens"
        if self.tokens_a_second >= 0.5:
            tokens += f", {self.tokens_a_second:,.0f} a second"
        labelled = f"{count(self.labelled)} of {count(self.to_label)} labelled"
        if self.labels_a_second >= 0.5:
            labelled += f", {self.labels_a_second:,.0f} a second"
        # The student's notes already name the round.
        doing = self.note.removeprefix(f"round {self.round_number}: ") or "starting"
        rows = [
            ("round", f"{self.round_number} ({self.round_number + 1} of {self.rounds}): {doing}"),
            ("teacher", f"{_bar(self.labelled, self.to_label)} {labelled}; {tokens}"),
            (
                "student",
                f"{_bar(self.trained, self.to_train)} {count(self.trained)} of {count(self.to_train)} "
                f"trained on{_figures(self.last)}",
            ),
        ]
        if self.budget_left:
            rows.append(("budget", f"{self.budget_left} left"))
        left = "not known before the end of a round"
        if self.seconds_left is not None:
            left = f"about {duration(_rounded(self.seconds_left))}"
        rows.append(("to go", left))
        return [(name, _plain(text)) for name, text in rows]

    def numbers(self) -> dict[str, float]:
        """For a dashboard; unknown values are omitted."""
        known: dict[str, float | None] = {
            "labelled_texts": self.labelled,
            "trained_texts": self.trained,
            "labels_per_second": self.labels_a_second,
            "teacher_tokens": self.tokens,
            "round": self.round_number,
            "seconds_left": self.seconds_left,
            **{key: self.last.get(key) for key in ("accuracy", "macro_f1", "teacher_agreement", "loss")},
        }
        return {name: float(value) for name, value in known.items() if value is not None}


def seconds_left(lines: Sequence[dict[str, Any]], rounds: int, in_round: float) -> float | None:
    """Assume that each remaining round takes as long as the last one; None before a round has finished.

    The first round may include the start of the engines, but no better measure is available at that point.
    """
    if not lines:
        return None
    last = sum(lines[-1]["seconds"].values())
    return max(0.0, last * (rounds - len(lines)) - in_round)


def budget_left(cap: dict[str, Any], used: dict[str, float], currency: str) -> str:
    """The remaining texts, tokens and cost under ``budget.cap``, as text."""
    said = []
    for unit in ("texts", "tokens"):
        if cap.get(unit) is not None:
            said.append(f"{count(max(0, cap[unit] - used[unit]))} {unit}")
    if cap.get("cost") is not None:
        said.append(money(max(0.0, cap["cost"] - used["cost"]), currency))
    return _plain(", ".join(said))


def _figures(last: dict[str, Any]) -> str:
    known = [
        f"{name} {show(last[key])}"
        for key, name, show in (
            ("loss", "loss", lambda value: f"{value:.3f}"),
            ("macro_f1", "macro-F1", percent),
            ("teacher_agreement", "agreement", percent),
        )
        if last.get(key) is not None
    ]
    return f"; last round: {', '.join(known)}" if known else ""


def _bar(done: int, whole: int) -> str:
    filled = round(BAR * min(1.0, done / whole)) if whole else 0
    return "━" * filled + "╌" * (BAR - filled)


def _rounded(seconds: float) -> float:
    """Round an estimate to ten seconds, or to a minute from five minutes on."""
    return round(seconds / 10) * 10 if seconds < 300 else round(seconds / 60) * 60


def _plain(text: str) -> str:
    """Replace narrow spaces, which some terminals cannot display."""
    return text.replace("\u202f", " ")


WINDOW_S = 30.0
"""Seconds over which rates are averaged."""
POINTS = 64
"""Maximum number of points kept for a round; a long round keeps at least half as many."""


class ThroughputMeter:
    """Labelling rates from observed counts of texts and tokens; the caller supplies the times."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._round: list[tuple[float, int]] = []
        self._every, self._seen = 1, 0
        self._recent: deque[tuple[float, int, int]] = deque()
        self._last: tuple[float, int] | None = None

    def begin_round(self, now: float) -> None:
        self._began, self._round, self._every, self._seen = now, [], 1, 0
        if self._last:
            self._round.append((0.0, self._last[1]))

    def note(self, now: float, labelled: int, tokens: int) -> None:
        """Record the total of texts labelled and tokens used at time ``now``."""
        self._last = now, labelled
        self._recent.append((now, labelled, tokens))
        while now - self._recent[0][0] > WINDOW_S:
            self._recent.popleft()
        if self._began is None:
            return
        moment = now - self._began, labelled
        if len(self._round) > 1 and self._round[-1][1] == self._round[-2][1] == labelled:
            self._round[-1] = moment  # no change: only the first and last point of a pause are kept
            return
        if self._seen % self._every == 0:
            self._round.append(moment)
        self._seen += 1
        if len(self._round) > POINTS:
            self._round, self._every = self._round[::2], self._every * 2

    def points(self) -> list[list[float]]:
        """Pairs of seconds since the round started and texts labelled by then, for the metrics."""
        found = list(self._round)
        if (
            self._last
            and self._began is not None
            and self._last[0] - self._began > (found or [(0, 0)])[-1][0]
        ):
            found.append((self._last[0] - self._began, self._last[1]))
        return [[round(seconds, 2), labelled] for seconds, labelled in found]

    def rates(self) -> tuple[float, float]:
        """Labels and tokens per second over the last WINDOW_S; 0 before two observations."""
        if len(self._recent) < 2:
            return 0.0, 0.0
        (first, labels, tokens), (last, more_labels, more_tokens) = self._recent[0], self._recent[-1]
        if last <= first:
            return 0.0, 0.0
        return (more_labels - labels) / (last - first), (more_tokens - tokens) / (last - first)

    def in_round(self, now: float) -> float:
        """Seconds since the round started; 0 before the first round."""
        return 0.0 if self._began is None else now - self._began


EVERY_S = 2.0
"""Seconds between two publications; Ray does not collect metrics more often."""
COUNTED = ("labelled_texts", "trained_texts", "teacher_tokens")
"""Numbers that only increase; also published as counters, so that dashboards can compute rates."""


class Gauges:
    """A Ray gauge for each number, and a counter for each number that only increases."""

    def __init__(self, run: str) -> None:
        """``run`` tags the metrics, to distinguish the runs of one cluster."""
        self.tags = {"run": run}
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._counted: dict[str, float] = {}
        self._shown = -EVERY_S

    def show(self, numbers: Mapping[str, float]) -> None:
        """Publish the numbers, unless the last publication was less than EVERY_S ago."""
        now = time.monotonic()
        if now - self._shown < EVERY_S:
            return
        self._shown = now
        for name, value in numbers.items():
            self._gauge(name).set(value, self.tags)
            if name in COUNTED:
                # The first value may include an earlier driver's work, so it does not count as growth.
                grown = value - self._counted.setdefault(name, value)
                if grown > 0:
                    self._counter(name).inc(grown, self.tags)
                    self._counted[name] = value

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            words = name.replace("_", " ")
            self._gauges[name] = Gauge(f"llkd_{name}", f"{words} of a distillation", tag_keys=("run",))
        return self._gauges[name]

    def _counter(self, name: str) -> Counter:
        if name not in self._counters:
            words = name.replace("_", " ")
            self._counters[name] = Counter(f"llkd_new_{name}", f"new {words}", tag_keys=("run",))
        return self._counters[name]
