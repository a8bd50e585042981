"""A run's numbers as Ray metrics: in the dashboard's charts, and for Prometheus wherever Ray is scraped.

They come from the driver, so there is one source of each, whatever restarts. Ray puts ``ray_`` before the
names.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

EVERY_S = 2.0
"""Ray gathers metrics every few seconds; nobody sees more."""
COUNTED = ("labelled_texts", "trained_texts", "teacher_tokens")
"""What only grows is a counter, too, so that rates can be asked for."""


class Gauges:
    """A gauge for each number that comes, and counters of those that only grow."""

    def __init__(self, run: str) -> None:
        """``run`` is the name that tells one run from another on the same cluster."""
        self.tags = {"run": run}
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._counted: dict[str, float] = {}
        self._shown = -EVERY_S

    def show(self, numbers: Mapping[str, float]) -> None:
        """Publish these, unless some were published a moment ago."""
        now = time.monotonic()
        if now - self._shown < EVERY_S:
            return
        self._shown = now
        for name, value in numbers.items():
            self._gauge(name).set(value, self.tags)
            if name in COUNTED:
                # The first value may be of an earlier driver, and is no growth.
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
