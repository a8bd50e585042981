"""Where a run stands, in words: one line for a log, a few rows for a terminal, numbers for a dashboard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llkd_ray.words import count, duration, money, percent

BAR = 24
"""Characters of a bar."""


@dataclass(frozen=True)
class Standing:
    """A moment of a run. None stands for what is not known, or not limited."""

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
    """What the student is doing."""
    last: dict[str, Any]
    """The metrics of the last finished round; empty before."""
    seconds_left: float | None
    budget_left: str
    """What the cap still allows, in words; '' without a cap."""

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
        """For a terminal: what, and how it stands."""
        tokens = f"{count(self.tokens)} tokens"
        if self.tokens_a_second >= 0.5:
            tokens += f", {self.tokens_a_second:,.0f} a second"
        labelled = f"{count(self.labelled)} of {count(self.to_label)} labelled"
        if self.labels_a_second >= 0.5:
            labelled += f", {self.labels_a_second:,.0f} a second"
        # The student's notes name the round themselves.
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
        """For a dashboard; what is not known is left out."""
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
    """As long again for each round to come as the last one took; None before one is over.

    The first one is a poor measure where it waited for engines to start, and there is no better yet.
    """
    if not lines:
        return None
    last = sum(value or 0.0 for value in (lines[-1].get("seconds") or {}).values())
    return max(0.0, last * (rounds - len(lines)) - in_round)


def budget_left(cap: dict[str, Any], used: dict[str, float], currency: str) -> str:
    """What the limits of ``budget.cap`` still allow of texts, tokens and cost, in words."""
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
    """An estimate has no need of seconds."""
    return round(seconds / 10) * 10 if seconds < 300 else round(seconds / 60) * 60


def _plain(text: str) -> str:
    """Not every terminal has a narrow space."""
    return text.replace("\u202f", " ")
